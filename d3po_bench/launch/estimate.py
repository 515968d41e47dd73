"""How much of a command's work is done, and how long the rest will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from d3po_bench.training.progress import Progress, Units


@dataclass(frozen=True)
class Standing:
    """Where a command is; None for what nothing measured so far tells."""

    share: float | None
    """Of the work that is done, 0 to 1; by whatever process."""
    left: float | None
    """Seconds."""


class Estimate:
    """All work of a command, and what its units have taken so far.

    A piece of work whose units have not been measured takes what others of its kind take, or else
    any other: a run that waits, what those take that are under way.
    """

    def __init__(self) -> None:
        self.work: dict[str, Progress] = {}
        self.stages: list[tuple[list[str], int]] = []
        """Names of what is done side by side, and how many at a time; a stage after the other."""

    def expect(self, work: Iterable[Progress], workers: int) -> None:
        """So much more is to be done, after all that was expected before."""
        coming = {progress.run: progress for progress in work}
        self.stages.append(([*coming], max(1, workers)))
        self.work |= coming

    def whole(self) -> Standing:
        """Of the command."""
        seconds = _Seconds(self.work.values())
        left = {name: seconds.of(p, p.left) for name, p in self.work.items()}
        done = [seconds.of(p, p.done) for p in self.work.values()]
        share = _share(done, [*left.values()])
        total = 0.0
        for names, workers in self.stages:
            parts = [left[name] for name in names]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return Standing(share, None)
            total += max([sum(known) / workers, *known])
        return Standing(share, total)

    def of(self, run: str) -> Standing:
        """Of one piece of work."""
        seconds, progress = _Seconds(self.work.values()), self.work[run]
        left = seconds.of(progress, progress.left)
        return Standing(_share([seconds.of(progress, progress.done)], [left]), left)


def _share(done: list[float | None], left: list[float | None]) -> float | None:
    before, rest = ([part for part in parts if part is not None] for parts in (done, left))
    if len(before) < len(done) or len(rest) < len(left):
        return None
    return sum(before) / whole if (whole := sum(before) + sum(rest)) else None


class _Seconds:
    """What a unit takes, by kind of unit: measured in that work, in its like, or in any."""

    def __init__(self, work: Iterable[Progress]) -> None:
        found: dict[tuple[str, str | None], list[float]] = defaultdict(list)
        for progress in work:
            for kind, seconds in progress.seconds.items():
                found[kind, progress.like].append(seconds)
                found[kind, None].append(seconds)
        self.means: Mapping[tuple[str, str | None], float] = {
            key: sum(values) / len(values) for key, values in found.items()
        }

    def of(self, progress: Progress, units: Units) -> float | None:
        """What so much of a piece of work takes; None while that is not known."""
        total = 0.0
        for kind, count in units.items():
            mean = self.means.get((kind, progress.like), self.means.get((kind, None)))
            unit = progress.seconds.get(kind, mean)
            if count and unit is None:
                return None
            total += count * (unit or 0)
        return total
