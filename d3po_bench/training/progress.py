"""How far a run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from d3po_bench.config import RunConfig


@dataclass(frozen=True)
class Progress:
    """Where a run is, for whoever shows it."""

    run: str
    """Which run: see `label`."""
    done: float
    """Share of the run, 0 to 1."""
    text: str
    note: str = ""
    """Something to say once, however many runs say it; the rest then tells nothing new."""


Report = Callable[[Progress], None]


def label(config: RunConfig) -> str:
    """What a run is called where several are shown."""
    return f"{config.method} {config.objective} seed {config.seed}"
