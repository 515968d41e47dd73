"""What README and docs claim is what the committed rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def printed(*command: str) -> list[str]:
    """Lines that a committed script prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize(
    ("document", "script"),
    [
        ("README.md", ("results/summary.py", "results/tiny/quick")),
        ("docs/quick-preset.md", ("results/tiny/quick-search/table.py",)),
    ],
)
def test_tables_are_what_the_rows_say(document: str, script: tuple[str, ...]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8").splitlines()
    lines = printed(*script)
    assert len(lines) > 2
    assert [line for line in lines if line not in text] == []
