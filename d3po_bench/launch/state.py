"""How far runs are, by what is in their folders and by nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.runs.files import FAILED, LOCK
from d3po_bench.runs.holder import SIZE, Holder
from d3po_bench.runs.remote import seen
from d3po_bench.runs.run import RunFolder
from d3po_bench.training.listeners import by_round, mean_score
from d3po_bench.training.progress import IMAGE, ROUND, START, Progress, evaluations_after, planned

Name = Literal["finished", "running", "dead", "failed", "stopped", "not begun"]


@dataclass(frozen=True)
class State:
    """Where a run is."""

    config: RunConfig
    name: Name
    """`dead`: its process is no more, and had no time to say so; `stopped`: it had."""
    rounds: int
    """Done so far."""
    gain: float | None = None
    """Held-out score of the last evaluation, minus that of the first."""
    unit: str = ""
    why: str = ""
    """Who works there, or what went wrong."""

    @property
    def gained(self) -> str:
        """The gain with its unit, for people."""
        return "" if self.gain is None else f"{self.gain:+.3f} {self.unit}"

    @property
    def progress(self) -> Progress:
        """For whoever shows it."""
        plan, rounds = planned(self.config), self.config.rounds
        each = plan.left.get(IMAGE, 0) / (1 + evaluations_after(self.config, 0))
        left = {
            START: float(self.name == "not begun"),
            ROUND: float(rounds - self.rounds),
            IMAGE: each * evaluations_after(self.config, self.rounds),
        }
        if self.name == "finished":
            left = {}
        return replace(
            plan, left=left, gain=self.gain, unit=self.unit,
            done={kind: units - left.get(kind, 0.0) for kind, units in plan.left.items()},
            text=f"{self.name}, round {self.rounds}/{rounds}",
        )  # fmt: skip


def read_state(folder: Path, config: RunConfig) -> State:
    """Where the run of that config is, whose folder may be there or not.

    Raises:
        UserError: a file in it is damaged.
    """
    if not (folder / "config.json").exists():
        return State(config, "not begun", 0)
    run = RunFolder(folder)
    held_out = [mean_score(rows) for rows in by_round(run.evaluation).values()]
    gain = held_out[-1] - held_out[0] if len(held_out) > 1 else None
    found = State(
        config, "stopped", len(run.metrics), gain, str(run.facts.get("score", {}).get("unit", ""))
    )
    if run.finished:
        return replace(found, name="finished")
    if (holder := _holder(folder)) is not None:
        return replace(found, name="running" if holder.alive else "dead", why=str(holder))
    if (folder / FAILED).exists():
        return replace(found, name="failed", why=(folder / FAILED).read_text().strip())
    return found


def _holder(folder: Path) -> Holder | None:
    try:
        with (folder / LOCK).open("rb") as file:
            return Holder.read(file.read(SIZE))
    except OSError:
        return None


def read_states(runs: Mapping[Path, RunConfig]) -> list[State]:
    """Where each run is; one with a damaged file has failed.

    Args:
        runs: folder -> the config of the run that belongs there.
    """
    found = []
    for folder, config in runs.items():
        try:
            found.append(read_state(seen(folder), config))
        except UserError as problem:
            found.append(State(config, "failed", 0, why=str(problem)))
    return found
