"""Sentences that say what tests show: documents take them from here, and write none of their own.

A mean is shown to differ from 0 where its p-value, adjusted by Holm for all tests of its table, is
below 0.05. "Not shown" says no more than that: the seeds may be too few. That two methods are
equivalent is a test of its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from eval.analysis.statistics import Difference, equivalence, holm, smallest_shown

LEVEL = 0.05

K = TypeVar("K", bound=Hashable)


class Words(NamedTuple):
    """What to say of means above 0, of those below, and of those that are shown to be neither."""

    above: str
    below: str
    neither: str


def adjusted(tests: Mapping[K, Difference]) -> dict[K, float]:
    """The p-values of a table, by Holm."""
    return dict(zip(tests, holm([found.p for found in tests.values()]), strict=True))


def said(means: Mapping[str, tuple[float, float]], words: Words) -> str:
    """What is shown, such as `Gain: d3po (p = 0.002). No gain is shown: dpok (p = 0.3).`.

    Args:
        means: name -> mean and its adjusted p-value.
        words: for each outcome.
    """
    found: dict[str, dict[str, float]] = {phrase: {} for phrase in words}
    for name, (mean, p) in means.items():
        shown = words.above if mean > 0 else words.below
        found[shown if p < LEVEL else words.neither][name] = p
    parts = []
    for phrase, names in found.items():
        if names:
            side = "at least" if phrase == words.neither else "at most"
            parts.append(f"{phrase}: {', '.join(names)}{_p([*names.values()], side)}.")
    return " ".join(parts)


def _p(values: Sequence[float], side: str) -> str:
    """The p-values in brackets: one, or the least or the largest of several."""
    known = [f"{p:.2g}" for p in sorted(values) if not math.isnan(p)]
    if not known:
        return ""
    if known[0] == known[-1]:
        return f" (p = {known[0]})"
    return f" (p {side} {known[0] if side == 'at least' else known[-1]})"


def power(tests: Mapping[str, Difference], unit: str, together: int) -> str:
    """How small a true difference the seeds would have shown, four times out of five.

    Args:
        tests: name -> one of those that are spoken of.
        unit: of the differences.
        together: tests that are adjusted together, these among them.
    """
    sizes = [size for found in tests.values() if (size := smallest_shown(found, together)) > 0]
    if not sizes:
        return ""
    between = f"{min(sizes):.2g} to {max(sizes):.2g}" if len(sizes) > 1 else f"{sizes[0]:.2g}"
    return f"A difference of {between} {unit}".rstrip() + " would be shown with 80 % power."


def within(tests: Mapping[K, tuple[Difference, float]]) -> dict[K, float]:
    """Holm's p-values of being within a margin.

    All tests of a table belong among them. Those that show no difference are a choice by the same
    seeds, and adjusting for them alone would not keep the level.

    Args:
        tests: name -> a difference and its margin.
    """
    p = holm([equivalence(found, margin) for found, margin in tests.values()])
    return dict(zip(tests, p, strict=True))


def equivalent(p: Mapping[str, float], margin: float, unit: str, rival: str) -> str:
    """Which methods are shown to be as good as the rival, within the margin.

    Args:
        p: method -> its p-value, from `within`.
        margin: of all of these.
        unit: of the margin.
        rival: its name.
    """
    names = [name for name, value in p.items() if value < LEVEL]
    size = f"{margin:.2g} {unit}".rstrip()
    return f"Shown to be within {size} of {rival}: {', '.join(names) or 'none'}."
