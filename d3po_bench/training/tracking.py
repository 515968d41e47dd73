"""What every tracker is told of a run; `trackers/` has one file for each program that shows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import UserError, install
from d3po_bench.training.listeners import Evaluated, Listener

Row = dict[str, Any]

Scalars = Mapping[str, float]

IMAGE = ("round", "sampler", "prompt", "index")
"""Columns of an evaluation's rows that name an image; the others measure it."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A run, before its first round in this process."""

    folder: Path
    name: str
    settings: Mapping[str, Any]
    """All that decides its numbers, and how it is computed."""
    command: str
    """What makes it again."""
    after: int | None
    """Round of the checkpoint that it resumes from; None at its beginning."""
    first: Sequence[Row]
    """Rows of its first evaluation, from which gains are counted; [] before it."""


class Tracker(Listener, ABC):
    """Sends the numbers of a run, and its pictures of fixed prompts, to another program."""

    NEEDS: ClassVar[str]
    """The module, which the extra `track` brings."""
    where = ""
    """Where it is to be seen, for people; "" where the run's folder says it."""

    def __init__(self, run: Tracked) -> None:
        """`run`: what is to be shown."""
        self.base = means(run.first)

    @classmethod
    def require(cls) -> None:
        """Refuse where it could not send anything.

        Raises:
            UserError: with what to do about it.
        """

    @abstractmethod
    def log(self, round_: int, scalars: Scalars, pictures: Mapping[str, Tensor]) -> None:
        """Numbers, and pictures [3, h, w] uint8 by prompt, after a round."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Nothing more comes."""

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """Means over the images of each sampler, gains over the first evaluation, pictures."""
        now = means(found.rows)
        self.base = self.base or now
        gains = {
            name.replace("/score", "/gain"): value - self.base[name]
            for name, value in now.items()
            if name.endswith("/score") and name in self.base
        }
        self.log(round_, {**now, **gains}, found.shown)

    def round(self, metrics: Row, timing: Row) -> None:
        """Every metric of the round, and the seconds of its stages."""
        seconds = {f"seconds/{k}": v for k, v in timing.items() if k != "round"}
        self.log(metrics["round"], {k: v for k, v in metrics.items() if k != "round"} | seconds, {})

    def finished(self) -> None:
        """Close it."""
        self.close(failed=False)

    def stopped(self) -> None:
        """Close it."""
        self.close(failed=True)


def means(rows: Sequence[Row]) -> dict[str, float]:
    """`held-out SAMPLER/COLUMN` -> mean over the images that have one."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in (n for n in row if n not in IMAGE and row[n] != ""):
            values[f"held-out {row['sampler']}/{name}"].append(float(row[name]))
    return {name: sum(found) / len(found) for name, found in values.items()}


def require(names: Sequence[str]) -> tuple[str, ...]:
    """Refuse trackers that could not send anything, before hours are spent.

    Returns:
        Each name once.

    Raises:
        UserError: there is no such tracker, its package is not installed, or it is not logged in.
    """
    for name in names:
        tracker = registry.part("tracker", name)
        if find_spec(tracker.NEEDS) is None:
            raise UserError(
                f"--track {name} needs the extra `track`. Install it: {install('track')}."
            )
        tracker.require()
    return tuple(dict.fromkeys(names))
