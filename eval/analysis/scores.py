"""What the scores of a run mean: their unit, and whether larger is better.

A run says so itself. Those of earlier versions name an objective, which has to be installed here.
No file that a run names is loaded: somebody else may have written it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from d3po_bench import registry
from d3po_bench.errors import UserError
from d3po_bench.runs.run import RunFolder


@dataclass(frozen=True)
class Score:
    """What a number in the column `score` is."""

    scorer: str
    """Name of what gives it."""
    unit: str
    sign: int
    """1 where larger is better, -1 where smaller is; 0 where nothing says so."""

    @property
    def better(self) -> str:
        """An arrow to where better is, in words for a title; "" where nothing says so."""
        return {1: "↑ better", -1: "↓ better", 0: ""}[self.sign]


def score_of(run: RunFolder) -> Score:
    """What a run's scores mean.

    Raises:
        UserError: the run does not say, and no objective here is called as its is.
    """
    known = run.facts.get("score")
    return Score(**known) if known else _installed(run.config.objective)


def shown_score(run: RunFolder) -> Score:
    """The same; nothing of what nobody knows."""
    try:
        return score_of(run)
    except UserError:
        return Score("", "", 0)


def scores_of(runs: Iterable[RunFolder]) -> dict[str, Score]:
    """Objective -> what its scores mean, as far as anybody knows."""
    return {run.config.objective: shown_score(run) for run in runs}


def _installed(objective: str) -> Score:
    """By the objective of that name; the unit is read from a file: loading may need weights."""
    found = registry.objective(objective)
    path = registry.HOME / "eval" / "scorers" / f"{found.scorer}.py"
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    unit = re.search(r"""^    unit\b[^=\n]*=\s*["'](.*)["']""", source, re.MULTILINE)
    return Score(str(found.scorer), unit[1] if unit else "", found.sign)
