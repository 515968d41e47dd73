"""Turn run folders into a published set: their text files, figures and tables.

    python results/publish.py runs/grid/tiny results/tiny [--add] [--no-figures]

Weights and samples stay behind; figures and tables can be redrawn from the text files alone. What
the target held of an earlier set is replaced; with --add it stays beside the new runs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from eval.analysis.runs import find_runs
from eval.figures.curves import plot
from eval.verify.folder import FILES


def publish(runs: Path, target: Path, add: bool) -> None:
    """Copy the text of every run below `runs` to `target`, and what was measured beside it."""
    found = find_runs([runs])
    for old in [] if add else [path.parent for path in target.rglob("config.json")]:
        shutil.rmtree(old)
    for run in found:
        folder = target / run.relative_to(runs)
        folder.mkdir(parents=True)
        for name in FILES:
            shutil.copy2(run / name, folder / name)
    if (runs / "diversity.csv").is_file():
        shutil.copy2(runs / "diversity.csv", target)


def draw(runs: Path, target: Path) -> None:
    """Figures over the paper's axis, images and UNet passes; sheets need the runs, with samples."""
    figures = target / "figures"
    drawn = (
        plot([runs], figures),
        plot([target], figures),
        *(plot([target], figures / x, x) for x in ("images", "unet_forwards")),
    )
    for figure in sorted({path for paths in drawn for path in paths}):
        print(figure)


if __name__ == "__main__":
    folders = Path(sys.argv[1]), Path(sys.argv[2])
    publish(*folders, add="--add" in sys.argv)
    if "--no-figures" not in sys.argv:
        draw(*folders)
