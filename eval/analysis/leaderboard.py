"""What the report page shows: the numbers of `report`, with what is behind each of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3po_bench.errors import UserError
from d3po_bench.runs.run import find_runs
from eval.analysis import tries
from eval.analysis.gains import Groups, contrast, records
from eval.analysis.runs import Group, Run, evaluated, read_groups
from eval.analysis.tables import Record

MADE_WITH = ("cpu", "gpu", "device", "python", "platform", "commit")
"""Of provenance, beside the versions of packages."""


NO_HALVES = dict.fromkeys(("s", "s_low", "s_high", "d", "d_low", "d_high"), math.nan)
"""S and D of an objective that has no opposite here."""


@dataclass(frozen=True)
class Entry:
    """A method on an objective: a row of the page, and what its numbers open."""

    group: Group
    runs: Sequence[Run]
    """All of them, by seed."""
    shown: Sequence[Run]
    """Those that the numbers are means of."""
    record: Record
    """The numbers of `gains` and `cost`, and S and D where there are any."""
    seeds: Sequence[Record]
    """The same numbers of each of `shown` alone."""
    apart: Sequence[tuple[str, str, str]]
    """Setting, its value, and those of the other methods on the objective, where they differ."""

    @property
    def rounds(self) -> int:
        """Up to where the numbers go."""
        return max(self.shown[0].spent)

    @property
    def unfinished(self) -> int:
        """How many runs have not ended."""
        return sum(not run.ended for run in self.runs)


@dataclass(frozen=True)
class Board:
    """The entries of one base model, whose numbers may be compared."""

    model: str
    entries: Sequence[Entry]


def boards(folders: Sequence[Path]) -> tuple[list[Board], list[Path]]:
    """The runs below `folders`, a board for each base model.

    Where some seeds of a method have ended, its numbers are of those. Where none has, they are of
    all of them after the last round at which each was evaluated.

    Returns:
        The boards, and the runs that have no evaluation yet.

    Raises:
        UserError: no run has been evaluated, one cannot be read, or those of a model do not belong
            together.
    """
    found = find_runs(folders)
    due = [run.folder for run in found if run.config.eval_every > 0]
    waiting = [folder for folder in due if not (folder / "eval.csv").is_file()]
    there: dict[str, list[Path]] = defaultdict(list)
    for run in evaluated([run.folder for run in found if run.folder not in waiting] or folders):
        there[run.config.model].append(run.folder)
    return [_board(model, places) for model, places in sorted(there.items())], waiting


def _board(model: str, folders: Sequence[Path]) -> Board:
    groups: Groups = read_groups(folders, unfinished=True)
    shown: Groups = {group: _abreast(runs) for group, runs in groups.items()}
    # What has not been trained to its end is compared with nothing.
    whole: Groups = {group: runs for group, runs in shown.items() if runs[0].ended}
    numbers = dict(zip(whole, records(whole), strict=True))
    halves = {(objective, record["method"]): record for record in contrast(whole).records
              for objective in record["objectives"].split(", ")}  # fmt: skip
    entries = [
        Entry(
            group, groups[group], runs,
            halves.get(group[1:], NO_HALVES) | (numbers.get(group) or records({group: runs})[0]),
            [records({group: [run]})[0] for run in runs], _apart(group, shown),
        )
        for group, runs in shown.items()
    ]  # fmt: skip
    return Board(model, entries)


def _abreast(runs: Sequence[Run]) -> Sequence[Run]:
    """Those that have ended, or else all of them up to the last evaluation that they share."""
    if whole := [run for run in runs if run.ended]:
        return whole
    common = set.intersection(*({*run.scores.loc["eta1"].index} & run.spent.keys()
                                for run in runs))  # fmt: skip
    if not common:
        raise UserError(
            f"{runs[0].folder} and {runs[-1].folder} have no evaluation after the same round, so "
            "they cannot be averaged. Name one of them."
        )
    last = max(common)
    return [replace(run, spent={n: cost for n, cost in run.spent.items() if n <= last})
            for run in runs]  # fmt: skip


def _apart(group: Group, groups: Groups) -> list[tuple[str, str, str]]:
    """The settings in which a method differs from others on its objective."""
    own = tries.settings(groups[group][0].config)
    others = [tries.settings(runs[0].config) for other, runs in groups.items()
              if other[:2] == group[:2] and other != group]  # fmt: skip
    found = {key: {other[key] for other in others if key in other} for key in own}
    return [(key, own[key], " or ".join(sorted(values)))
            for key, values in found.items() if values - {own[key]}]  # fmt: skip


def provenance(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What runs were made with: each fact with all its values, and the days of their ends."""
    found: dict[str, set[str]] = defaultdict(set)
    for facts in (run.files.facts for entry in entries for run in entry.runs):
        known: dict[str, Any] = {"ended": str(facts.get("ended", ""))[:10]}
        known |= {name: facts.get(name) for name in MADE_WITH} | facts.get("packages", {})
        for name, value in known.items():
            if value not in (None, ""):
                found[name].add(str(value)[:80])
    return {name: sorted(values) for name, values in found.items()}
