"""What README and docs claim is what the committed rows say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from d3po_bench import registry, sweep
from d3po_bench.config import make

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
        ("README.md", ("results/summary.py", "results/tiny")),
        ("docs/quick-preset.md", ("results/summary.py", "results/confirm")),
        ("docs/quick-preset.md", ("results/search/d3po/table.py",)),
    ],
)
def test_tables_are_what_the_rows_say(document: str, script: tuple[str, ...]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8").splitlines()
    lines = printed(*script)
    assert len(lines) > 2
    assert [line for line in lines if line not in text] == []


def test_commands_of_tries_give_their_configs() -> None:
    searched = ROOT / "results" / "search"
    spec = importlib.util.spec_from_file_location("commands", searched / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(commands)
    tries = sorted(searched.rglob("config.json"))
    assert len(tries) > 50
    for path in tries:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        arguments = commands.command(recorded)
        changes = dict(a.split("=", 1) for a in arguments if "=" in a)
        run, _ = make(
            recorded["method"], recorded["objective"], "quick", changes, seed=recorded["seed"]
        )
        made = {**vars(run), **registry.method(run.method)(**run.options).__dict__}
        for key, value in {**recorded, **recorded["options"]}.items():
            if key not in ("options", "run_id"):
                assert made[key] == (tuple(value) if isinstance(value, list) else value), path


def test_the_grid_makes_the_published_configs() -> None:
    published = ROOT / "results" / "tiny"
    grid = sweep.read(published / "grid.toml")
    cells = set(product(grid.methods, grid.objectives, grid.seeds))
    for path in published.rglob("config.json"):
        recorded = path.read_text(encoding="utf-8")
        found = json.loads(recorded)
        cell = found["method"], found["objective"], found["seed"]
        cells.remove(cell)
        changes = grid.settings_of(*cell[:2])
        run, _ = make(*cell[:2], "quick", changes, model=grid.model, seed=cell[2])
        assert run.to_json() == recorded
    assert cells == set()
