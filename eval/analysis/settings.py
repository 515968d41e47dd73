"""What each method was run with, and whether its clip ever acted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from d3po_bench.errors import UserError
from eval.analysis.gains import Groups
from eval.analysis.runs import Run
from eval.analysis.tables import Record, Table, number, text
from eval.analysis.tries import options

CLIPPED = ("clipped", "saturated")
"""Share of probability ratios that the clip changed, as methods call it."""

SHARED = ("learning_rate", "units_per_update", "skip_steps", "timestep_fraction", "sampling_steps")


def settings(groups: Groups) -> Table:
    """A row for each method; options are named where they are not the method's own defaults.

    Raises:
        UserError: a method was run with several settings.
    """
    methods: dict[str, list[Run]] = {}
    for (_, _, method), runs in groups.items():
        methods.setdefault(method, []).extend(runs)
    columns = {
        "method": text("method"),
        "learning rate": number("learning_rate", "g"),
        "pairs or images an update": text("units_per_update"),
        "steps trained on": lambda r: f"{r['timestep_fraction']:.0%} of {r['steps']}",
        "options": lambda r: ", ".join(f"`{part}`" for part in r["options"].split()),
        "ratios clipped, most in a round (mean)": _clipped,
    }
    records = [_record(method, runs) for method, runs in sorted(methods.items())]
    return Table(records, columns, left=("method", "options"))


def _record(method: str, runs: Sequence[Run]) -> Record:
    said = {json.dumps([run.config.options, *(getattr(run.config, k) for k in SHARED)])
            for run in runs}  # fmt: skip
    if len(said) > 1:
        raise UserError(
            f"{method} was run with {len(said)} different settings below these folders. Name the "
            "folder of one experiment."
        )
    first, usual = runs[0].config, options(method)
    rounds = [line for run in runs for line in run.files.metrics]
    shares = [float(line[name]) for line in rounds for name in CLIPPED if name in line]
    return {
        "method": method,
        "learning_rate": first.learning_rate,
        "units_per_update": first.units_per_update,
        "timestep_fraction": first.timestep_fraction,
        "steps": first.sampling_steps - first.skip_steps,
        "options": " ".join(f"{k}={v}" for k, v in first.options.items() if usual.get(k) != str(v)),
        "clipped_most": max(shares, default=math.nan),
        "clipped": sum(shares) / len(shares) if shares else math.nan,
    }


def _clipped(record: Record) -> str:
    """Nothing for methods without a clip."""
    most, mean = record["clipped_most"], record["clipped"]
    return "" if math.isnan(most) else f"{most:.1%} ({mean:.1%})"
