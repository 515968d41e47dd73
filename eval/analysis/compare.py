"""Is one set of runs better than another? `d3po-bench compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d3po_bench.errors import UserError
from eval.analysis.gains import gained, records
from eval.analysis.runs import Run, read_groups, require_same_inputs
from eval.analysis.scores import Score, score_of
from eval.analysis.statistics import (
    Difference,
    by_seed,
    difference,
    equivalence,
    paired_seeds,
    smallest_shown,
)
from eval.analysis.tables import Record, finite
from eval.analysis.worded import LEVEL

SHOWN = ("method", "base", "end", "gain", "low", "high", "recognised_before", "recognised", "kl")
"""What is told of each side in the numbers of `report`."""

Verdict = Literal["better", "worse", "equivalent", "not shown"]


@dataclass(frozen=True)
class Side:
    """The runs of one method, with one set of settings."""

    name: str
    folder: Path
    runs: Sequence[Run]
    """Of one group, by seed."""

    @property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return [run.seed for run in self.runs]

    @property
    def gains(self) -> dict[int, float]:
        """Score at the end minus that of the base model, of each seed."""
        return gained(self.runs)

    @property
    def record(self) -> Record:
        """The numbers of `report`."""
        return records({self.runs[0].group: self.runs})[0]


@dataclass(frozen=True)
class Comparison:
    """Two sides, and how much more the first has gained."""

    ours: Side
    theirs: Side
    same_images: bool
    """Whether both were evaluated on the same prompts and noise."""
    margin: float | None = None
    """A difference below it does not matter, in the score's unit; None where nothing says so."""

    @property
    def objective(self) -> str:
        """Of all runs."""
        return self.ours.runs[0].config.objective

    @property
    def score(self) -> Score:
        """What the scores of both mean."""
        return score_of(self.ours.runs[0].files)

    @property
    def sign(self) -> int:
        """1 where larger is better, -1 where smaller is."""
        return self.score.sign

    @property
    def paired(self) -> list[int]:
        """The seeds that are compared one by one, as in `report`; none of other images."""
        return paired_seeds(self.ours.seeds, self.theirs.seeds) if self.same_images else []

    @property
    def difference(self) -> Difference:
        """Of the gains, in the score's own unit and sign."""
        ours, theirs = self.ours.gains, self.theirs.gains
        if self.same_images:
            return by_seed(ours, theirs)
        return difference([*ours.values()], [*theirs.values()])

    @property
    def equivalence(self) -> float:
        """P-value of a difference of at least the margin; NaN where there is none to test."""
        return math.nan if self.margin is None else equivalence(self.difference, self.margin)

    @property
    def verdict(self) -> Verdict:
        """What is shown of the first side: the interval lies on one side of 0, or near it."""
        low, high = sorted(self.sign * end for end in (self.difference.low, self.difference.high))
        if low > 0 or high < 0:
            return "better" if low > 0 else "worse"
        return "equivalent" if self.equivalence < LEVEL else "not shown"

    def sentence(self) -> str:
        """The verdict with its numbers, for people."""
        found, unit = self.difference, self.score.unit
        size = f"{abs(found.mean):.3f} {unit}".rstrip()
        more = "more" if self.sign * found.mean >= 0 else "less"
        does = f"gains {size} {more} than"
        if self.sign < 0:
            does = f"lowers the score {size} {more} than"
        spread = "no interval without two seeds of each: run more"
        if not math.isnan(found.low):
            spread = f"95 % interval {found.low:+.3f} to {found.high:+.3f}, p = {found.p:.2g}"
        facts = [f"difference {found.mean:+.3f}", spread, self._seeds()]
        if not math.isnan(self.equivalence):
            facts.append(f"p = {self.equivalence:.2g} of being {self.margin:g} or more apart")
        facts += [] if self.same_images else ["evaluated on different images"]
        shown = (
            "no difference is shown"
            if self.verdict == "not shown"
            else f"shown to be {self.verdict}"
        )
        return (
            f"{self.ours.name} {does} {self.theirs.name} on {self.objective} "
            f"({', '.join(facts)}): {shown}."
        )

    def _seeds(self) -> str:
        a, b = len(self.ours.seeds), len(self.theirs.seeds)
        each = f"{a} seed{'s' * (a > 1)} each" if a == b else f"{a} and {b} seeds"
        if not self.paired:
            return each
        return f"{each}, paired" if a == b else f"{each}, paired over the {min(a, b)} of both"

    def as_json(self) -> dict[str, Any]:
        """Every number; None for one that there is not."""
        sides = {
            name: {"runs": str(side.folder), "seeds": side.seeds, "gains": [*side.gains.values()],
                   **{k: v for k, v in finite([side.record])[0].items() if k in SHOWN}}
            for name, side in (("a", self.ours), ("b", self.theirs))
        }  # fmt: skip
        found = dict(zip(("difference", "low", "high", "p"), self.difference, strict=False))
        return {
            "verdict": self.verdict, "sentence": self.sentence(), "objective": self.objective,
            "unit": self.score.unit, "sign": self.sign, "paired": bool(self.paired),
            "seeds_paired": self.paired, "same_images": self.same_images, "margin": self.margin,
            **finite([{**found, "p_equivalent": self.equivalence,
                       "smallest": smallest_shown(self.difference)}])[0],
            **sides,
        }  # fmt: skip


def compare(ours: Path, theirs: Path, margin: float | None = None) -> Comparison:
    """Compare the runs in two folders.

    Seeds are paired where one has all those of the other and both were evaluated on the same
    images. Else the difference is Welch's.

    Args:
        ours: a run folder, or a folder of the runs of one method on one objective.
        theirs: likewise.
        margin: above 0: a difference that would not matter, chosen before the runs.

    Raises:
        UserError: a folder has no runs or those of several methods or objectives, the two are of
            different objectives, models or scorers, or the runs cannot be read.
    """
    sides = [_runs(folder) for folder in (ours, theirs)]
    every = [run for runs in sides for run in runs]
    one, other = (runs[0].config for runs in sides)
    if one.objective != other.objective:
        raise UserError(
            f"{ours} is of {one.objective} and {theirs} of {other.objective}. Compare runs on one "
            "objective."
        )
    require_same_inputs([run.files for run in every])
    first, *rest = (run.held_out.index for run in every)
    names = [one.method, other.method] if one.method != other.method else [str(ours), str(theirs)]
    a, b = (Side(*side) for side in zip(names, (ours, theirs), sides, strict=True))
    return Comparison(a, b, same_images=all(index.equals(first) for index in rest), margin=margin)


def _runs(folder: Path) -> Sequence[Run]:
    """Those of one method on one objective, by seed."""
    groups = read_groups([folder])
    if len(groups) > 1:
        found = ", ".join(f"{method} on {objective}" for _, objective, method in groups)
        place = next(iter(groups.values()))[0].folder.parent
        raise UserError(
            f"{folder} holds {found}. Name the runs of one method on one objective, such as "
            f"{place}."
        )
    return next(iter(groups.values()))
