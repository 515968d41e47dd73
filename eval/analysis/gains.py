"""What each method gained over the base model, and at what cost.

Scores are means over the held-out images, training sampler unless "eta 0" is said. Gains and
differences keep the score's own sign, so where smaller is better a negative one is good. All is
averaged over seeds, with 95 % t-intervals over seeds. Methods are compared over the seeds that both
have, where one has all of the other: a seed brings the same prompts and first noise to both. What a
run did not measure is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from d3po_bench import registry
from d3po_bench.errors import UserError
from eval.analysis import measured
from eval.analysis.gap import gap
from eval.analysis.runs import DRIFTS, Group, Run
from eval.analysis.scores import score_of
from eval.analysis.statistics import (
    Difference,
    by_seed,
    from_zero,
    holm,
    interval,
    paired_seeds,
    smallest_shown,
)
from eval.analysis.tables import Cell, Record, Table, change, number, over_seeds, spread, text

Groups = Mapping[Group, Sequence[Run]]
"""Model, objective and method -> the runs of each seed, as `read_groups` gives them."""

RIVALS = ("d3po", "d3po_of_two")
"""What the other methods are compared with: the first of these that there is."""

SIDES = {"tiny": 32, "tiny2": 64, "sd15": 512}
"""Pixels a side of the pictures of the models that we know."""


NAMES = {"objective": text("objective"), "method": text("method")}


def learned(rival: str) -> dict[str, Cell]:
    """The columns of `gains`."""
    return {
        **NAMES, "seeds": text("seeds"),
        "base": number("base", ".3f"), "end": number("end", ".3f"),
        "gain (95 % interval)": spread("gain", ""), "worst seed": number("worst", "+.3f"),
        "share of excess": number("share_of_excess", "+.0%"),
        f"difference to {rival} (95 % interval)": spread("difference"),
        "seeds compared": text("seeds_compared"),
        "p, Holm": number("p_holm", ".2g"),
        "shown with 80 % power from": number("smallest", ".2g"),
        "gain, eta 0": number("gain_eta0", "+.3f"),
    }  # fmt: skip


PAID = {
    **NAMES, "recognised": change("recognised", ".2f"), "diversity": change("diversity", ".2f"),
    "Vendi score": change("vendi", ".2f"), "base model covered": number("coverage", ".2f"),
    "proxy-gold gap (95 % interval)": spread("gap"), "drift": number("drift", ".4f"),
    "KL, steps trained on": number("kl_trained", ".3f"), "KL, all steps": number("kl", ".3f"),
    "pairs (or single images)": number("pairs", ",.0f"), "images": number("images", ",.0f"),
    "images scored": number("scorer_calls", ",.0f"),
    "UNet passes": number("unet_forwards", ",.0f"),
    "backward passes": number("unet_backwards", ",.0f"),
    "seconds a seed": number("seconds", ",.0f"), "CPU seconds a seed": number("cpu", ",.0f"),
}  # fmt: skip

BRIEF = (
    "method", "objective", "unit", "seeds", "base", "end", "gain (95 % interval)", "drift",
    "recognised", "images", "seconds a seed",
)  # fmt: skip
"""Of both, what a command shows when its runs have ended."""


def rival_of(groups: Groups) -> str:
    """The method that the others of these groups are compared with."""
    there = {method for _, _, method in groups}
    return next((name for name in RIVALS if name in there), RIVALS[0])


def gains(groups: Groups) -> Table:
    """A row for each objective and method: what was learned.

    Raises:
        UserError: methods were judged on different held-out images.
    """
    return Table(records(groups), learned(rival_of(groups)), left=(*NAMES,))


def cost(groups: Groups) -> Table:
    """A row for each objective and method: what it took, and what was lost on the way.

    Raises:
        UserError: methods were judged on different held-out images.
    """
    return Table(records(groups), PAID, left=(*NAMES,))


def brief(groups: Groups) -> Table:
    """The most important columns of both tables.

    Raises:
        UserError: methods were judged on different held-out images.
    """
    every = learned(rival_of(groups)) | PAID | {"unit": _unit}
    return Table(records(groups), {name: every[name] for name in BRIEF}, left=(*NAMES, "unit"))


def _unit(record: Record) -> str:
    better = "larger" if record["sign"] > 0 else "smaller"
    return f"{record['unit']}, {better} is better"


def contrast(groups: Groups) -> Table:
    """A row for each method that was trained for larger and for smaller scores: S and D.

    S = (gain up - gain down) / 2 is what follows the reward, and D = (gain up + gain down) / 2 what
    happens whichever way it points: drift, if the reward pulls equally hard both ways. Seeds are
    paired. P-values are adjusted for being two for each row.
    """
    found: list[Record] = [
        {"objectives": objectives, "method": method, "seeds": len(seeds),
         **_halves(np.array([*seeds.values()]).reshape(-1, 2))}
        for (objectives, method), seeds in both_signs(groups).items()
    ]  # fmt: skip
    names = [(r, f"{half}_p") for r in found for half in ("s", "d")]
    for (record, name), p in zip(names, holm([r[name] for r, name in names]), strict=True):
        record[name] = p
    columns = {
        "objectives": text("objectives"), "method": text("method"), "seeds": text("seeds"),
        "S, by the reward (95 % interval)": spread("s"), "p of S, Holm": number("s_p", ".2g"),
        "D, whichever way (95 % interval)": spread("d"), "p of D, Holm": number("d_p", ".2g"),
    }  # fmt: skip
    return Table(found, columns, left=("objectives", "method"))


def both_signs(groups: Groups) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """The two objectives and a method -> seed -> its gain up and down, of seeds that have both."""
    found = {}
    for (model, objective, method), runs in groups.items():
        for (other_model, other, name), against in groups.items():
            if (other_model, name) == (model, method) and _opposite(runs[0], against[0]):
                up, down = gained(runs), gained(against)
                seeds = sorted(up.keys() & down.keys())
                found[f"{objective}, {other}", method] = {s: (up[s], down[s]) for s in seeds}
    return found


def gained(runs: Sequence[Run]) -> dict[int, float]:
    """Seed -> how much the held-out score has changed."""
    return {run.seed: float(np.diff(both_ends(run))[0]) for run in runs}


def _opposite(up: Run, down: Run) -> bool:
    """Whether the one asks for larger scores and the other for smaller ones."""
    one, other = score_of(up.files), score_of(down.files)
    return (one.scorer, one.sign, other.sign) == (other.scorer, 1, -1)


def _halves(pairs: Any) -> Record:
    """S and D of gains [seeds, 2], with their intervals; NaN without a seed."""
    found: Record = {}
    for name, sign in (("s", -1), ("d", 1)):
        values = (pairs[:, 0] + sign * pairs[:, 1]) / 2
        test = from_zero(values) if len(values) else Difference.unsure(math.nan)
        found |= _named((name, f"{name}_low", f"{name}_high", f"{name}_p"), test[:4])
    return found


def records(groups: Groups) -> list[Record]:
    """Everything that both tables show, a record for each objective and method.

    P-values of the differences, and the smallest ones that would be shown, are adjusted for their
    number in all records.
    """
    rival = rival_of(groups)
    rivals = [groups.get((*group[:2], rival), ()) for group in groups]
    sides = [*zip(groups.values(), rivals, strict=True)]
    tests = [_test(*both) for both in sides]
    p = holm([test.p for test in tests])
    together = sum(not math.isnan(value) for value in p)
    return [
        _record(group, both[0], test, together)
        | {"p_holm": value, "seeds_compared": _compared(*both)}
        for group, both, test, value in zip(groups, sides, tests, p, strict=True)
    ]


def _test(runs: Sequence[Run], rivals: Sequence[Run]) -> Difference:
    """The difference to a rival, if there is another."""
    return against(runs, rivals) if rivals and runs != rivals else Difference.unsure(math.nan)


def _compared(runs: Sequence[Run], rivals: Sequence[Run]) -> str:
    """How many seeds a difference is over; nothing where it is over all, as the seeds say."""
    ours, theirs = ({run.seed for run in side} for side in (runs, rivals))
    if not rivals or ours == theirs:
        return ""
    shared = paired_seeds(ours, theirs)
    return str(len(shared)) if shared else f"{len(ours)} and {len(theirs)}, not paired"


def _record(group: Group, runs: Sequence[Run], test: Difference, together: int) -> Record:
    model, objective, method = group
    base, end = np.array([both_ends(run) for run in runs]).T
    first, last = np.array([both_ends(run, sampler="eta0") for run in runs]).T
    gain, score = end - base, score_of(runs[0].files)
    known = np.mean([both_ends(run, "animal") for run in runs], axis=0)
    return {
        "objective": objective,
        "method": method,
        "unit": score.unit,
        "sign": score.sign,
        "seeds": len(runs),
        "base": float(base.mean()),
        "end": float(end.mean()),
        "gain": float(gain.mean()),
        **_named(("low", "high"), interval(gain)),
        "worst": score.sign * float((score.sign * gain).min()),
        "share_of_excess": float(gain.mean() / _excess(model, score.scorer, base.mean())),
        **_named(("difference", "difference_low", "difference_high", "p"), test[:4]),
        "smallest": smallest_shown(test, together),
        "gain_eta0": float((last - first).mean()),
        **_named(("recognised_before", "recognised"), known),
        **_named(("diversity_before", "diversity"), _of_pictures(runs, "diversity")),
        **_named(("vendi_before", "vendi"), _of_pictures(runs, "vendi")),
        "coverage": _of_pictures(runs, "coverage")[1],
        **over_seeds("gap", [gap(run) for run in runs]),
        **{name: float(np.mean([_drift(run, name) for run in runs])) for name in DRIFTS},
        **{what: _spent(runs, what) for what in SPENT},
    }


SPENT = (
    "pairs", "images", "scorer_calls", "unet_forwards", "unet_backwards", "seconds", "cpu"
)  # fmt: skip


def _named(names: Sequence[str], values: Sequence[Any]) -> Record:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def both_ends(run: Run, column: str = "score", sampler: str = "eta1") -> tuple[float, float]:
    """Mean of a column at the first and last evaluation of a logged round; NaN where not known."""
    if column not in run.scores or sampler not in run.scores.index.levels[0]:
        return math.nan, math.nan
    values = run.scores.loc[sampler][column]
    values = values[values.index.isin(list(run.spent))]
    return (float(values.iloc[0]), float(values.iloc[-1])) if len(values) else (math.nan, math.nan)


def _spent(runs: Sequence[Run], what: str) -> float:
    """What a run had cost by its last round, mean over runs; NaN where not known."""
    return float(np.mean([run.spent[max(run.spent)].get(what, math.nan) for run in runs]))


def _excess(model: str, scorer: str, base: float) -> float:
    """How much larger the base model's files are than that of a flat image, kB; NaN elsewhere."""
    if scorer != "jpeg_size" or model not in SIDES:
        return math.nan
    return base - flat_size(SIDES[model])


@cache
def flat_size(side: int) -> float:
    """JPEG size of a flat grey image of that many pixels a side, kB."""
    import torch

    image = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    return float(registry.load_scorer("jpeg_size", torch.device("cpu"))(image, [""])[0])


def _drift(run: Run, name: str) -> float:
    """At the last evaluation. Of the steps trained on, earlier versions logged it in training."""
    found = both_ends(run, name)[1]
    if name == "kl_trained" and math.isnan(found) and run.files.metrics:
        return float(run.files.metrics[-1].get("kl", math.nan))
    return found


def _of_pictures(runs: Sequence[Run], name: str) -> tuple[float, float]:
    """Before and after, mean over runs: by an evaluation, or as `report --measure` found it.

    NaN where not all of them have it.
    """
    found = np.array([both_ends(run, name) for run in runs])
    if np.isnan(found).any():
        rows = [measured.numbers(run) for run in runs]
        found = np.array([[measured.number(row, name) for row in pair] for pair in rows])
    before, after = map(float, found.mean(0))
    return before, after


def against(runs: Sequence[Run], rivals: Sequence[Run]) -> Difference:
    """The difference to a rival on the same held-out prompts and noise, over seeds.

    Images without a score are left out of all runs.

    Raises:
        UserError: the held-out images are not the same.
    """
    every = [*runs, *rivals]
    scores = [run.held_out for run in every]
    for run, found in zip(every, scores, strict=True):
        if not found.index.equals(scores[0].index):
            raise UserError(
                f"{runs[0].folder} and {run.folder} were not evaluated on the same images, so they "
                "cannot be compared. Report their methods one by one."
            )
    scored = np.isfinite(scores).all(0)
    ends = [float(found[scored].mean()) for found in scores]
    ours, theirs = (
        {run.seed: end for run, end in part}
        for part in (zip(runs, ends[: len(runs)], strict=True),
                     zip(rivals, ends[len(runs) :], strict=True))
    )  # fmt: skip
    return by_seed(ours, theirs)
