"""What happens beside training: records, progress, checkpoints, trackers. The trainer knows none.

A listener is told what happens in the order of the list. One that writes rows comes before the
checkpoints, which hold digests of what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from d3po_bench.config import RunConfig
from d3po_bench.diffusion import parallel
from d3po_bench.runs.store import RunStore
from d3po_bench.training.progress import Progress, Report, label
from d3po_bench.training.tools import spread

Row = dict[str, Any]

SHOWN = 10
"""Prompts whose evaluation images are kept as PNG files."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: its rows, and the pictures [N, 3, h, w] uint8 of each sampler."""

    rows: Sequence[Row]
    pictures: Mapping[str, Tensor]
    prompts: Sequence[str]
    images: int
    """Of each prompt."""

    @property
    def mean(self) -> float:
        """Mean score with the training sampler."""
        scores = [row["score"] for row in self.rows if row["sampler"] == "eta1"]
        return float(sum(scores) / len(scores))


class Listener:
    """Hears of a run; each kind says more about what it wants to hear of."""

    def evaluating(self, round_: int) -> None:
        """An evaluation begins, after so many rounds."""

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """An evaluation has ended."""

    def working(self, round_: int, share: float) -> None:
        """The share that is done of the round after `round_`."""

    def round(self, metrics: Row, timing: Row) -> None:
        """A round has ended."""

    def finished(self) -> None:
        """The last round has ended."""

    def stopped(self) -> None:
        """The run ends before its last round."""


class OfFirstRank(Listener):
    """What hears of a run is on its first rank; if it fails there, it fails on all of them."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        """`listeners`: none on the other ranks."""
        self.listeners = listeners

    def _each(self, tell: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            tell(listener)

    def evaluating(self, round_: int) -> None:
        """Pass it on."""
        self._each(lambda listener: listener.evaluating(round_))

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """Pass it on, and let the other ranks wait for it."""
        tell = partial(self._each, lambda listener: listener.evaluated(round_, found))
        with parallel.at("writing"):
            parallel.lead(tell)

    def working(self, round_: int, share: float) -> None:
        """Pass it on."""
        self._each(lambda listener: listener.working(round_, share))

    def round(self, metrics: Row, timing: Row) -> None:
        """Pass it on, and let the other ranks wait for it."""
        tell = partial(self._each, lambda listener: listener.round(metrics, timing))
        with parallel.at(f"writing after round {metrics['round']}"):
            parallel.lead(tell)

    def finished(self) -> None:
        """Pass it on, and let the other ranks wait for it."""
        parallel.lead(partial(self._each, lambda listener: listener.finished()))

    def stopped(self) -> None:
        """Pass it on: the other ranks may be no more."""
        self._each(lambda listener: listener.stopped())


class Recorder(Listener):
    """Writes rows and sample pictures to the run folder."""

    def __init__(self, store: RunStore) -> None:
        """`store`: the writer of the folder."""
        self.store = store

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """Rows of all images; the first picture of some prompts, deployment sampler."""
        self.store.log_evaluation([{"round": round_, **row} for row in found.rows])
        prompts = list(found.prompts)
        drawn = found.pictures["eta0"][:: found.images]
        shown = {prompt: drawn[prompts.index(prompt)] for prompt in spread(prompts, SHOWN)}
        self.store.save_samples(round_, shown)

    def round(self, metrics: Row, timing: Row) -> None:
        """A line of metrics, and its seconds."""
        self.store.log(metrics, timing)


class ProgressListener(Listener):
    """Tells how far the run is."""

    def __init__(self, config: RunConfig, unit: str, report: Report) -> None:
        """`unit` of the score; `report` shows it."""
        self.config, self.unit, self.report = config, unit, report
        self.text = ""

    def _tell(self, done: float, text: str) -> None:
        self.report(Progress(label(self.config), done / self.config.rounds, text))

    def evaluating(self, round_: int) -> None:
        """Say so where nothing else has happened yet."""
        if round_ == 0:
            first = "the LoRA to begin with" if self.config.lora else "the base model"
            self._tell(0, f"evaluating {first}")

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """Remember the score of the base model."""
        if round_ == 0:
            self.text = f"held-out {found.mean:.3f} {self.unit}"

    def working(self, round_: int, share: float) -> None:
        """Round and last score."""
        place = f"round {round_ + 1}/{self.config.rounds} {self.text}"
        self._tell(round_ + share, place)

    def round(self, metrics: Row, timing: Row) -> None:
        """Remember the reward."""
        self.text = f"reward {metrics['reward_mean']:+.3f} {self.unit}"

    def finished(self) -> None:
        """All is done."""
        self._tell(self.config.rounds, self.text)
