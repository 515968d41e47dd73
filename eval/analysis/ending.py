"""What `run` and `sweep` say when their runs have ended."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from d3po_bench.errors import UserError
from d3po_bench.runs.run import LORA, RunFolder
from eval.analysis.gains import Groups, brief
from eval.analysis.runs import read_groups

LEVELS = ("OBJECTIVE", "METHOD", "seed-N")
"""Of folders, below that of the model."""


def ending(folders: Sequence[Path], out: Path) -> tuple[str, list[str]]:
    """The table of the runs, in the numbers of `report`, and what to do with them next.

    Args:
        folders: of finished runs.
        out: in which they lie.

    Returns:
        The table, "" where these runs have none, and lines.
    """
    groups: Groups = {}
    lines, table = list[str](), ""
    if any(RunFolder(folder).config.eval_every > 0 for folder in folders):
        try:
            groups = read_groups(folders)
            table = brief(groups).plain()
        except UserError as problem:  # the runs have ended well, whatever can be said of them
            lines.append(f"note: There is no table of these runs. {problem}")
    else:
        lines.append("note: eval_every=0 switched evaluation off, so there are no gains to show.")
        return "", [*lines, _trained(folders)]
    return table, [*lines, _trained(folders), *_next(groups, shlex.quote(str(out)))]


def _trained(folders: Sequence[Path]) -> str:
    what = "trained network" if RunFolder(folders[0]).config.full else "LoRA"
    whose = f"The {what} is" if len(folders) == 1 else f"The {what} of each run is"
    return f"{whose} in {_pattern(folders) / LORA}"


def _next(groups: Groups, out: str) -> Iterator[str]:
    if groups and min(map(len, groups.values())) == 1:
        yield "One seed has no interval. For one, give the same command with more of them."
    if pair := _rivals(groups):
        yield f"Is one better? d3po-bench compare {shlex.join(map(str, pair))}"
    yield f"Tables, curves and pictures on one page: d3po-bench report {out} --out report.html"
    yield f"Runs are in {out}. Draw them: d3po-bench plot {out}"


def _pattern(folders: Sequence[Path]) -> Path:
    """The run folders, with a word for each part that differs."""
    place = Path(os.path.commonpath(folders))
    apart = len(folders[0].parts) - len(place.parts)
    return place.joinpath(*LEVELS[len(LEVELS) - apart :])


def _rivals(groups: Groups) -> tuple[Path, Path] | None:
    """Folders of the first two methods on one objective that have several seeds, if any do."""
    places = {g: runs[0].folder.parent for g, runs in groups.items() if len(runs) > 1}
    pairs = ((a, b) for a in places for b in places if a < b and a[:2] == b[:2])
    return next(((places[a], places[b]) for a, b in pairs), None)
