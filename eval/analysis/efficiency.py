"""The methods at equal budgets, and how surely one beats another.

"After" so many pairs, images or UNet passes is where the method that spends least of them ends; a
curve is a straight line between its evaluations. Gains keep the score's own sign, so where smaller
is better a negative one is good. Everything is of held-out images and the training sampler, with
95 % t-intervals over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.analysis.gains import Groups, rival_of
from eval.analysis.heights import area_under_curve, images_to_threshold
from eval.analysis.runs import Run, curves
from eval.analysis.scores import score_of
from eval.analysis.statistics import probability_of_improvement
from eval.analysis.tables import Record, Table, ends, over_seeds, spread, text

BUDGETS = {"pairs": "pairs or single images", "images": "images", "unet_forwards": "UNet passes"}
"""What methods are compared at, and what to call it."""

Methods = Mapping[str, Sequence[Run]]
"""Of one objective: method -> its runs."""


def efficiency(groups: Groups) -> list[Table]:
    """A table for each objective, a row for each method.

    Raises:
        UserError: a run has no count of what is compared.
    """
    objectives: dict[str, dict[str, Sequence[Run]]] = {}
    for (_, objective, method), runs in groups.items():
        objectives.setdefault(objective, {})[method] = runs
    rival = rival_of(groups)
    return [_table(objective, methods, rival) for objective, methods in objectives.items()]


def _table(objective: str, methods: Methods, rival: str) -> Table:
    sign = score_of(next(iter(methods.values()))[0].files).sign
    budgets = {x: _least(methods, x) for x in BUDGETS}
    records = [_record(objective, m, methods, rival, budgets, sign) for m in methods]
    columns = {
        "method": text("method"),
        **{f"gain after {budget:,.0f} {BUDGETS[x]}": spread(f"gain_at_{x}")
           for x, budget in budgets.items()},
        "mean gain over the images drawn": spread("mean_gain"),
        f"images to half of {rival}'s gain": _speed,
        f"probability to end better than {rival}": _chance,
    }  # fmt: skip
    return Table(records, columns, left=("method",), title=f"`{objective}`:")


def _speed(record: Record) -> str:
    if math.isnan(record["seeds_to_half"]):
        return ""
    if record["seeds_to_half"] < record["seeds"]:
        return f"{record['seeds_to_half']:.0f} of {record['seeds']} seeds"
    return f"{record['images_to_half']:,.0f}"


def _chance(record: Record) -> str:
    found, low, high = (record[k] for k in ("probability", *ends("probability")))
    if math.isnan(found):
        return ""
    return f"{found:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")


def _record(
    objective: str,
    method: str,
    methods: Methods,
    rival: str,
    budgets: Mapping[str, float],
    sign: int,
) -> Record:
    runs = methods[method]
    area = np.array([area_under_curve(at, score) for at, score in _paths(runs, "images")])
    found: Record = {"objective": objective, "method": method, "seeds": len(runs)}
    for x, budget in budgets.items():
        found |= {f"budget_{x}": budget, **over_seeds(f"gain_at_{x}", _gains(runs, x, budget))}
    found |= over_seeds("mean_gain", area)
    there = _images_to_half(runs, methods.get(rival), sign)
    found["seeds_to_half"] = math.nan if there is None else int(np.isfinite(there).sum())
    # A mean without the seeds that never get there would leave out the slow ones.
    found["images_to_half"] = math.nan if there is None else float(np.mean(there))
    chance = (math.nan,) * 3
    if rival in methods and method != rival:
        chance = probability_of_improvement(sign * _at_end(runs), sign * _at_end(methods[rival]))
    return found | dict(zip(("probability", *ends("probability")), chance, strict=True))


def _paths(runs: Sequence[Run], x: str) -> list[tuple[Any, Any]]:
    """What each seed had spent [n], and its held-out score there [n]."""
    seeds = curves(runs, x).groupby("seed")
    return [(seed["x"].to_numpy(), seed["score"].to_numpy()) for _, seed in seeds]


def _least(methods: Methods, x: str) -> float:
    """The most of a budget that every run has spent."""
    return float(min(at[-1] for runs in methods.values() for at, _ in _paths(runs, x)))


def _gains(runs: Sequence[Run], x: str, budget: float) -> Any:
    """Gain of each seed [S] when it had spent that much."""
    return np.array([np.interp(budget, at, score) - score[0] for at, score in _paths(runs, x)])


def _at_end(runs: Sequence[Run]) -> Any:
    """Gain of each seed [S] at its last evaluation."""
    return _gains(runs, "images", np.inf)


def _images_to_half(runs: Sequence[Run], rivals: Sequence[Run] | None, sign: int) -> Any:
    """Images of each seed [S] until half of the rival's gain, NaN for never; None without one.

    A rival that got worse has none: every method is above half of its loss before it begins.
    """
    half = _at_end(rivals).mean() / 2 if rivals else math.nan
    if not sign * half > 0:
        return None
    return np.array([
        float(images_to_threshold(at, score - score[0], half, sign))
        for at, score in _paths(runs, "images")
    ])  # fmt: skip
