"""How wide the range of learning rates is at which a method beats the base model.

A search tries several rates, each on several seeds. A rate beats the base model where the 95 %
t-interval of its gain lies on the better side of 0, and pictures are still recognised. The window
is the longest stretch of neighbouring rates that do; its width counts powers of ten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from eval.analysis.statistics import interval
from eval.analysis.tables import Record, Table, number, text


def windows(tries: Iterable[Mapping[str, Any]], *, sign: int = 1, floor: float = 0.0) -> Table:
    """A row for each method.

    Args:
        tries: rows with `method`, `lr` and `gain`, one for each seed, and perhaps `recognised`;
            tries without a gain do not count.
        sign: 1 where larger scores are better, -1 where smaller ones are.
        floor: least mean of `recognised`, 0 to 1.
    """
    cells: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in tries:
        if math.isfinite(row["gain"]):
            cells.setdefault(row["method"], {}).setdefault(float(row["lr"]), []).append(row)
    records = [_record(method, cells[method], sign, floor) for method in sorted(cells)]
    columns = {
        "method": text("method"), "rates tried": text("rates"), "seeds at each": text("seeds"),
        "rates that beat the base model": text("window"), "powers of ten": number("width", ".2f"),
    }  # fmt: skip
    return Table(records, columns, left=("method",))


def _record(
    method: str, rates: Mapping[float, Sequence[Mapping[str, Any]]], sign: int, floor: float
) -> Record:
    flags = [(rate, _beats(rates[rate], sign, floor)) for rate in sorted(rates)]
    runs = [[r for r, _ in part] for beats, part in groupby(flags, lambda flag: flag[1]) if beats]
    best = max(runs, key=lambda run: run[-1] / run[0], default=[])
    counts = sorted({len(part) for part in rates.values()})
    return {
        "method": method,
        "rates": ", ".join(f"{rate:g}" for rate in sorted(rates)),
        "seeds": " or ".join(map(str, counts)),
        "window": " to ".join(f"{rate:g}" for rate in dict.fromkeys(best[:1] + best[-1:]))
        or "none shown",
        "low": best[0] if best else math.nan,
        "high": best[-1] if best else math.nan,
        "width": math.log10(best[-1] / best[0]) if best else math.nan,
    }


def _beats(seeds: Sequence[Mapping[str, Any]], sign: int, floor: float) -> bool:
    low, _ = interval([sign * row["gain"] for row in seeds])
    known = [row["recognised"] for row in seeds if math.isfinite(row.get("recognised", math.nan))]
    return bool(low > 0) and (not known or bool(np.mean(known) >= floor))
