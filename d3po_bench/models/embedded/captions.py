"""How the prompt lists captions and captions-held-out came about.

`python -m d3po_bench.models.embedded.captions` writes both. Compositional captions name an
animal, a colour and a pattern, as in "a fox on a blue striped background". Bare animal names
leave a model that knows them no headroom; getting all three right does. No caption is in both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from d3po_bench import prompts
from d3po_bench.models.embedded.render import COLOURS, GLYPHS, PATTERNS, caption

TRAINING_EACH = 3
"""Captions of each animal to learn from."""

HELD_OUT = 300
"""Captions to evaluate on."""


def lists() -> tuple[list[str], list[str]]:
    """Captions to learn from, and others to evaluate on; every animal is in both."""
    training: list[str] = []
    rest: list[list[str]] = []
    for number, animal in enumerate(GLYPHS):
        every = [caption(animal, pattern, colour) for pattern in PATTERNS for colour in COLOURS]
        random.Random(number).shuffle(every)
        training += every[:TRAINING_EACH]
        rest.append(every[TRAINING_EACH:])
    return sorted(training), sorted(_in_turn(rest)[:HELD_OUT])


def _in_turn(groups: Sequence[Sequence[str]]) -> list[str]:
    """One of each group after the other, so that a cut leaves all groups about equal."""
    return [text for row in zip(*groups, strict=True) for text in row]


if __name__ == "__main__":
    for name, captions in zip(("captions", "captions-held-out"), lists(), strict=True):
        path = prompts.HOME / f"{name}.txt"
        path.write_text("\n".join(captions) + "\n", encoding="utf-8")
        print(f"{path.name}: {len(captions)} captions")
