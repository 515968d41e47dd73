"""Derive Table 1 from its published rows again: `python results/table1.py`.

Prints it, and fails where the published files say something else.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from eval.analysis import table1

HERE = Path(__file__).parent / "tiny" / "table1"


def again(folder: Path) -> tuple[str, list[str]]:
    """The table of the rows in a folder, and the names of its files that differ from it."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place) / "copy"))
        text = table1.write(copy)
        names = [f"table1.{kind}" for kind in ("csv", "md", "tex")]
        other = [n for n in names if (copy / n).read_bytes() != (folder / n).read_bytes()]
    return text, other


if __name__ == "__main__":
    text, other = again(HERE)
    print(text)
    if other:
        sys.exit(f"{HERE.name} has rows that give another {', '.join(other)}")
