"""The proxy-gold gap: how much more a run gained on what it was trained on than on what it was not.

    gap = sign * z(score) - mean over further scorers of z(column)
    z = (end - start) / standard deviation over the base model's evaluation pictures

In standard deviations, so that units cancel. A gap that grows while the first term does is what
reward hacking looks like; Gao et al. 2023 (arXiv:2210.10760) call the two sides proxy and gold.
"""

from __future__ import annotations

import math

import pandas as pd

from d3po_bench import registry
from eval.analysis.runs import Run
from eval.analysis.scores import score_of

NO_QUALITY = ("jpeg_size", "diversity", "vendi")
"""Scorers of which more is not better."""


def gap(run: Run) -> float:
    """The gap at the last evaluation, training sampler.

    NaN without a further scorer of quality among the run's `eval_scorers`.
    """
    rows = pd.DataFrame(run.files.evaluation)
    rows = rows[(rows["sampler"] == "eta1") & rows["round"].isin(list(run.spent))]
    if not len(rows):
        return math.nan
    first, last = (rows[rows["round"] == n] for n in (rows["round"].min(), rows["round"].max()))
    columns = ["score", *(name for name in rows if _is_gold(str(name), run))]
    moved = last[columns].mean() - first[columns].mean()
    z = moved / first[columns].std().where(lambda spread: spread > 0)
    return float(score_of(run.files).sign * z["score"] - z.drop("score").mean())


def _is_gold(column: str, run: Run) -> bool:
    """Whether it is of a further scorer that says how good a picture is, untouched by training."""
    known = {registry.name_of("scorer", text) for text in run.config.eval_scorers}
    trained = {score_of(run.files).scorer} | {
        name.removeprefix("score/") for line in run.files.metrics[:1] for name in line
    }
    owners = {name for name in known if column == name or column.startswith(f"{name}_")}
    return bool(owners - trained - {*NO_QUALITY})
