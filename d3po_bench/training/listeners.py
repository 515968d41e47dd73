"""What happens beside training: records, progress, checkpoints, trackers. The trainer knows none.

A listener is told what happens in the order of the list. One that writes rows comes before the
checkpoints, which hold digests of what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from d3po_bench.config import RunConfig
from d3po_bench.diffusion import parallel
from d3po_bench.runs.run import BESIDE
from d3po_bench.runs.store import RunStore
from d3po_bench.training.progress import (
    IMAGE,
    ROUND,
    START,
    Report,
    Stopwatch,
    evaluations_after,
    planned,
)
from d3po_bench.training.tools import SHOWN, spread

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: its rows, and the pictures [N, 3, h, w] uint8 of each sampler."""

    rows: Sequence[Row]
    pictures: Mapping[str, Tensor]
    prompts: Sequence[str]
    images: int
    """Of each prompt."""
    drawn: bool = True
    """False if it was kept by another run, so that it took no time."""

    @property
    def mean(self) -> float:
        """Mean score with the training sampler."""
        return mean_score(self.rows)

    @property
    def shown(self) -> dict[str, Tensor]:
        """The first picture [3, h, w] of some prompts, deployment sampler."""
        prompts = list(self.prompts)
        drawn = self.pictures["eta0"][:: self.images]
        return {prompt: drawn[prompts.index(prompt)] for prompt in spread(prompts, SHOWN)}


def mean_score(rows: Sequence[Row]) -> float:
    """Mean score of an evaluation's rows with the training sampler."""
    scores = [float(row["score"]) for row in rows if row["sampler"] == "eta1"]
    return sum(scores) / len(scores)


def by_round(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of each evaluation, in the order of the rounds."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(int(row["round"]), []).append(row)
    return found


class Listener:
    """Hears of a run; each kind says more about what it wants to hear of."""

    def evaluating(self, round_: int, share: float) -> None:
        """The share that is done of the evaluation after so many rounds; first 0."""

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

    def evaluating(self, round_: int, share: float) -> None:
        """Pass it on."""
        self._each(lambda listener: listener.evaluating(round_, share))

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
        self.store.save_samples(round_, found.shown)

    def round(self, metrics: Row, timing: Row) -> None:
        """A line of metrics, and its seconds."""
        self.store.log(metrics, timing)


class ProgressListener(Listener):
    """Tells how far the run is, from before its model is loaded."""

    def __init__(self, config: RunConfig, report: Report) -> None:
        """`report` is told."""
        self.config, self.report = config, report
        self.watch = Stopwatch()
        self.plan = planned(config)
        self.images = self.plan.left.get(IMAGE, 0) / (1 + evaluations_after(config, 0))
        self.starting, self.round_, self.share = 1, 0, 0.0
        self.due = 1.0
        """Share that is left of the evaluation that is due now."""
        self.held_out: list[float] = []
        """Mean scores of the evaluations so far."""
        self.reward = self.unit = ""
        self._tell("loading the model")

    def begin(self, round_: int, unit: str, store: RunStore) -> None:
        """The model is loaded, and training continues after that round.

        Args:
            round_: rounds that are done.
            unit: of the score.
            store: with the rows of earlier processes.
        """
        self.starting, self.round_, self.unit = 0, round_, unit
        self.due = float(round_ == 0 and not store.evaluation)
        seconds = self.watch.stop(1)
        self.watch.before = _taken(self.config, store.timing, self.images)
        self.held_out = [mean_score(rows) for rows in by_round(store.evaluation).values()]
        self._tell("loaded", detail=f"loaded in {seconds:.1f} s")

    def note(self, text: str) -> None:
        """Something to say once, however many runs say it."""
        self.report(replace(self.plan, note=text))

    def evaluating(self, round_: int, share: float) -> None:
        """What is evaluated."""
        self._end_round()
        self.watch.start(IMAGE)
        self.round_, self.share, self.due = round_, 0.0, 1 - share
        first = "the LoRA to begin with" if self.config.lora else "the base model"
        self._tell(f"evaluating {'the model' if round_ else first}", share * self.images)

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """The gain so far."""
        self.held_out.append(found.mean)
        self.due = 0.0
        seconds = self.watch.stop(self.images, counts=found.drawn)
        self._tell(
            f"round {round_}/{self.config.rounds}",
            detail=f"evaluated after round {round_} in {seconds:.1f} s",
        )

    def working(self, round_: int, share: float) -> None:
        """Which round."""
        self.watch.start(ROUND)
        self.round_, self.share = round_, share
        self._tell(f"round {round_ + 1}/{self.config.rounds}", share)

    def round(self, metrics: Row, timing: Row) -> None:
        """The reward, and what the stages took."""
        self._end_round()
        self.round_, self.share = metrics["round"], 0.0
        self.reward = f"reward {metrics['reward_mean']:+.3f}"
        stages = ", ".join(f"{k} {v:.1f} s" for k, v in timing.items() if k != "round")
        place = f"round {self.round_}/{self.config.rounds}"
        self._tell(place, detail=f"{place}: {stages}")

    def _end_round(self) -> None:
        if self.watch.kind == ROUND:
            self.watch.stop(1)

    def finished(self) -> None:
        """All is done."""
        self._tell("finished")

    def _tell(self, place: str, under_way: float = 0, detail: str = "") -> None:
        left = {
            START: float(self.starting),
            ROUND: self.config.rounds - self.round_ - self.share,
            IMAGE: self.images * (self.due + evaluations_after(self.config, self.round_)),
        }
        done = {kind: units - left[kind] for kind, units in self.plan.left.items()}
        gain = self.held_out[-1] - self.held_out[0] if len(self.held_out) > 1 else None
        scores = [f"held-out gain {gain:+.3f} {self.unit}"] if gain is not None else []
        text = ", ".join(filter(None, [place, *scores, self.reward]))
        self.report(
            replace(
                self.plan, done=done, left=left, seconds=self.watch.seconds(under_way), text=text,
                detail=detail and ", ".join(filter(None, [detail, *scores, self.reward])),
                gain=gain, unit=self.unit,
            )
        )  # fmt: skip


def _taken(config: RunConfig, timing: Sequence[Row], images: float) -> dict[str, list[float]]:
    """Seconds of the units of rounds that earlier processes made."""
    rounds = [sum(s for k, s in row.items() if k not in BESIDE) for row in timing]
    evaluations = [
        row["evaluate"] / images
        for row in timing
        if evaluations_after(config, row["round"] - 1) > evaluations_after(config, row["round"])
        and "evaluate" in row
    ]
    return {kind: s for kind, s in ((ROUND, rounds), (IMAGE, evaluations)) if s}
