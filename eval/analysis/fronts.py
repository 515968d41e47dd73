"""Reward against drift: what each method gains where all have moved equally far.

The drift is the first of `runs.DRIFTS` that all runs know. "At equal drift" is where the run that
moves least ends; a curve is a straight line between its evaluations, which start at the base model.
That model, which gains nothing and does not drift, is a method like the others on the front.
Gains keep the score's own sign. Means over seeds have 95 % t-intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from eval.analysis.gains import Groups, both_ends
from eval.analysis.heights import images_to_threshold
from eval.analysis.runs import DRIFTS, Run, curves, drift_of
from eval.analysis.scores import score_of
from eval.analysis.tables import Cell, Record, Table, number, over_seeds, shown, spread, text


def fronts(groups: Groups) -> list[Table]:
    """A table for each objective whose runs know their drift, a row for each method."""
    objectives: dict[str, dict[str, Sequence[Run]]] = {}
    for (_, objective, method), runs in groups.items():
        objectives.setdefault(objective, {})[method] = runs
    made = (_table(objective, methods) for objective, methods in objectives.items())
    return [table for table in made if table is not None]


def by_step(groups: Groups) -> Table:
    """A row for each objective and method: the KL of each denoising step at the end of training.

    Mean over seeds, nats per latent element; a star marks steps that were not trained on.
    """
    records: list[Record] = []
    for (_, objective, method), runs in groups.items():
        steps, config = [*_steps(runs)], runs[0].config
        trained = config.sampling_steps - config.skip_steps
        records.append({
            "objective": objective, "method": method, "seeds": len(runs),
            **{f"kl_{i}": kl for i, kl in enumerate(steps, 1)}, "trained": trained,
        })  # fmt: skip
    most = max(len(record) - 4 for record in records)
    columns = {"objective": text("objective"), "method": text("method"), "seeds": text("seeds")}
    columns |= {f"step {i}": _of_step(i) for i in range(1, most + 1)}
    return Table(records, columns, left=("objective", "method"))


def _steps(runs: Sequence[Run]) -> Iterator[float]:
    """Of each step, the mean over runs; NaN where one of them did not measure it."""
    for i in range(1, runs[0].config.sampling_steps + 1):
        yield float(np.mean([both_ends(run, f"kl_{i}")[1] for run in runs]))


def _of_step(step: int) -> Cell:
    def show(record: Record) -> str:
        value = shown(record.get(f"kl_{step}", math.nan), ".3g")
        return value + "*" * (bool(value) and step > record["trained"])

    return show


def _table(objective: str, methods: Mapping[str, Sequence[Run]]) -> Table | None:
    known = curves([run for runs in methods.values() for run in runs], "rounds")
    measure = drift_of(known)
    if measure is None:
        return None
    courses = {m: [c for _, c in part.groupby("seed")] for m, part in known.groupby("method")}
    level = min(float(seed[measure].max()) for seeds in courses.values() for seed in seeds)
    records = [_record(m, seeds, measure, level) for m, seeds in courses.items()]
    sign = score_of(next(iter(methods.values()))[0].files).sign
    before = known.loc[known["round"] == 0, "animal"]
    base = {"gain": 0.0, "drift": 0.0, "recognised": float(before.mean())}
    for record in records:
        record |= {
            "objective": objective,
            "front": not any(_beats(r, record, sign) for r in [*records, base]),
        }
    columns = {
        "method": text("method"), "seeds": text("seeds"),
        f"{DRIFTS[measure]}, at the end": number("drift", ".3g"),
        "recognised at the end": number("recognised", ".2f"), "gain at the end": spread("gain"),
        "on the front": lambda r: "yes" if r["front"] else "",
        f"gain where it was {level:.3g}": spread("gain_at_drift"),
        "recognised there": number("recognised_at_drift", ".2f"),
    }  # fmt: skip
    return Table(records, columns, left=("method",), title=f"`{objective}`:")


def _beats(other: Record, record: Record, sign: int) -> bool:
    """Whether another has no less gain, no more drift and is no less recognised, and one better."""
    pairs = [(sign * r["gain"], -r["drift"], r["recognised"]) for r in (other, record)]
    known = [(a, b) for a, b in zip(*pairs, strict=True) if not math.isnan(a + b)]
    return all(a >= b for a, b in known) and any(a > b for a, b in known)


def _record(method: Any, seeds: Sequence[Any], measure: str, level: float) -> Record:
    ends = np.array([seed[[measure, "animal"]].iloc[-1] for seed in seeds], dtype=float).mean(0)
    gains = [(seed["score"] - seed["score"].iloc[0]).to_numpy() for seed in seeds]
    there = [_place(seed[measure].to_numpy(), level) for seed in seeds]
    found: Record = {"method": method, "seeds": len(seeds), "level": level}
    found |= {"drift": float(ends[0]), "recognised": float(ends[1])}
    found |= over_seeds("gain", [gain[-1] for gain in gains])
    found |= over_seeds(
        "gain_at_drift", [_at(p, gain) for p, gain in zip(there, gains, strict=True)]
    )
    known = [_at(p, seed["animal"].to_numpy()) for p, seed in zip(there, seeds, strict=True)]
    return found | {"recognised_at_drift": float(np.mean(known))}


def _place(drift: Any, level: float) -> float:
    """Where among the evaluations [n] the drift first gets to a level."""
    return float(images_to_threshold(np.arange(len(drift), dtype=float), drift, level))


def _at(place: float, values: Any) -> float:
    return float(np.interp(place, np.arange(len(values)), values))
