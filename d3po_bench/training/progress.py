"""How far a run is, and what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from d3po_bench.config import RunConfig
from d3po_bench.prompts import read_prompts

START, IMAGE, ROUND = "start", "image", "round"
"""Units of a run's work: loading its model, drawing and scoring an evaluation image, a round."""

SAMPLERS = 2
"""Of an evaluation."""

Units = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run, or another piece of work, is, for whoever shows it."""

    run: str
    """Which one: see `label`."""
    like: str = ""
    """Its kind: what a unit takes in one is what it takes in others of that kind."""
    done: Units = field(default_factory=dict)
    """Units of work, by an earlier process too."""
    left: Units = field(default_factory=dict)
    seconds: Units = field(default_factory=dict)
    """What one unit takes, as far as that has been measured."""
    text: str = ""
    gain: float | None = None
    """Held-out score now, minus that at the start."""
    unit: str = ""
    """Of the score."""
    detail: str = ""
    """What has just ended, and what it took; for those who want to know more."""
    note: str = ""
    """Something to say once, however many runs say it; the rest then tells nothing new."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left of it."""
        return not any(self.left.values())


Report = Callable[[Progress], None]


def label(config: RunConfig) -> str:
    """What a run is called where several are shown."""
    return f"{config.method} {config.objective} seed {config.seed}"


def planned(config: RunConfig) -> Progress:
    """A run that has not begun."""
    left = {START: 1.0, ROUND: float(config.rounds)}
    if config.eval_every:
        left[IMAGE] = evaluation_images(config) * (1 + evaluations_after(config, 0))
    kind = f"{config.method} {config.objective}"
    return Progress(run=label(config), like=kind, left=left, text="waiting")


def ended_before(config: RunConfig) -> Progress:
    """A run that an earlier process has made."""
    plan, said = planned(config), "finished before"
    return replace(plan, left={}, done=plan.left, text=said, detail=said)


def evaluation_images(config: RunConfig) -> int:
    """Pictures in one evaluation."""
    known = len(dict.fromkeys(read_prompts(config.eval_source)))
    return SAMPLERS * config.eval_images * min(known, config.eval_prompts)


def evaluations_after(config: RunConfig, round_: int) -> int:
    """How many evaluations come after that of a round: at intervals, and at the end."""
    every, last = config.eval_every, config.rounds
    if not every or round_ >= last:
        return 0
    return last // every - round_ // every + (last % every > 0)


class Stopwatch:
    """What a unit of each kind of work takes."""

    def __init__(self, before: Mapping[str, list[float]] | None = None) -> None:
        """`before`: seconds in earlier processes, which count until there is something newer."""
        self.before = dict(before or {})
        self.taken: dict[str, list[float]] = {}
        self.kind, self.since = START, time.monotonic()

    def start(self, kind: str) -> None:
        """Work of that kind begins now, unless it has already."""
        if self.kind != kind:
            self.kind, self.since = kind, time.monotonic()

    def stop(self, units: float, *, counts: bool = True) -> float:
        """So many units of the work that began last are done now: the seconds of all.

        `counts`: whether they tell what others will take.
        """
        seconds = time.monotonic() - self.since
        if counts:
            self.taken.setdefault(self.kind, []).append(seconds / units)
        self.kind = ""
        return seconds

    def seconds(self, under_way: float = 0) -> dict[str, float]:
        """Mean seconds of a unit, by kind.

        Args:
            under_way: units done of what began last.
        """
        known = {kind: sum(s) / len(s) for kind, s in {**self.before, **self.taken}.items()}
        if under_way > 0 and self.kind not in self.taken:
            known[self.kind] = (time.monotonic() - self.since) / under_way
        return known


class Counted:
    """Tells of work of equal units, as they are done."""

    def __init__(self, name: str, kind: str, report: Report) -> None:
        """`name` and `kind` of the work; `report` is told of it."""
        self.name, self.kind, self.report = name, kind, report
        self.first: tuple[float, float] | None = None
        """When the first call came, and how much was done by then."""

    def __call__(self, done: float, total: float) -> None:
        """So many units are done, earlier processes' included, of so many in all."""
        now = time.monotonic()
        since, before = self.first = self.first or (now, done)
        taken = {self.kind: (now - since) / (done - before)} if done > before else {}
        self.report(
            Progress(
                run=self.name, done={self.kind: done}, left={self.kind: total - done},
                seconds=taken, text=f"{done:.0f} of {total:.0f} {self.kind}s",
            )
        )  # fmt: skip
