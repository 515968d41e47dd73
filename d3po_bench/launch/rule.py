"""By what the trials of a search are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 2.0
"""A trial that is beyond its bounds by at most this factor may be promising at another rate."""


@dataclass(frozen=True)
class Seen:
    """What the runs of one seed showed at their end, on held-out noise."""

    gain: float
    """Of the objective, positive where it went the right way; S where there are two."""
    recognised: float
    """Probability of the prompted animal, of the worse run; NaN where nothing measured it."""
    drift: float
    """As evaluations measure it, of the run that went farther."""


def seen_of(ends: Sequence[Mapping[str, float]], signs: Sequence[int]) -> Seen:
    """What the runs of one seed showed: one for each objective.

    Args:
        ends: gain, recognised and drift of each run; NaN where not measured.
        signs: of each objective.
    """
    gains = [sign * one["gain"] for sign, one in zip(signs, ends, strict=True)]
    return Seen(
        gain=sum(gains) / len(gains),  # (grown + shrunk) / 2, where there are two signs
        recognised=float(np.min([one["recognised"] for one in ends])),  # NaN if any is
        drift=float(np.max([one["drift"] for one in ends])),
    )


@dataclass(frozen=True)
class Rule:
    """Which trial is best: the largest mean gain over the seeds, none of which breaks a bound."""

    recognised: float | None = None
    """The least."""
    drift: float | None = None
    """The most."""

    def broken(self, seen: Seen) -> str:
        """Which bound a seed breaks, with its number; "" for none. NaN breaks each."""
        if self.recognised is not None and not seen.recognised >= self.recognised:
            return f"recognised {seen.recognised:.3f}, below {self.recognised:g}"
        if self.drift is not None and not seen.drift <= self.drift:
            return f"drift {seen.drift:.3f}, above {self.drift:g}"
        return "" if math.isfinite(seen.gain) else "no gain was measured"

    def misses(self, seen: Seen) -> float:
        """How many times over a seed is beyond its bounds: above 1 if it breaks one."""
        least, most = self.recognised, self.drift
        parts = [0.0 if math.isfinite(seen.gain) else math.inf]
        parts += [] if least is None else [least / max(seen.recognised, 1e-12)]
        parts += [] if most is None else [seen.drift / max(most, 1e-12)]
        return math.inf if any(map(math.isnan, parts)) else max(parts)

    def worth(self, seeds: Sequence[Seen]) -> float | None:
        """Mean gain, or None where a seed breaks a bound."""
        if any(self.broken(seen) for seen in seeds):
            return None
        return sum(seen.gain for seen in seeds) / len(seeds)

    def promising(self, trials: Sequence[Sequence[Seen]]) -> tuple[int, bool]:
        """The trial to repeat at other rates.

        That is the one with the largest gain of those that are beyond no bound by more than a
        factor of 2; if there is none, the one that is least beyond them.

        Args:
            trials: what the seeds of each showed; none where a trial failed.

        Returns:
            Its place, and whether it breaks a bound.
        """
        misses = [max(map(self.misses, seen), default=math.inf) for seen in trials]
        gains = [sum(one.gain for one in seen) / max(1, len(seen)) for seen in trials]
        near = [place for place, missed in enumerate(misses) if missed <= NEAR]
        best = (
            max(near, key=lambda place: gains[place]) if near
            else min(range(len(trials)), key=lambda place: misses[place])
        )  # fmt: skip
        return best, misses[best] > 1
