"""What captions of version 2 ask for: said in words, and read from them.

They are of GenEval's six kinds (arXiv:2310.11513), bare names, and version 1's captions with a
background.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from d3po_bench.models.embedded.render import COLOURS, GLYPHS, PATTERNS

ANIMALS = tuple(GLYPHS)
IRREGULAR = {
    "sheep": "sheep", "deer": "deer", "fish": "fish", "mouse": "mice", "goose": "geese",
    "wolf": "wolves", "fox": "foxes", "butterfly": "butterflies", "fly": "flies",
}  # fmt: skip
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
CARDS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
"""Colours of cards: those of GenEval."""

RELATIONS = {
    "left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1),
}  # fmt: skip
"""Relation -> which way from the second animal the first is, across and down."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """So many of one animal, standing on a colour if that is named."""

    animal: str
    count: int = 1
    colour: str | None = None
    card: bool = False
    """Whether the colour is a card's; else the background's."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a picture must show to be right."""

    kind: str
    """One of GenEval's: single_object, two_object, counting, colors, position, color_attr."""
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    """Where the first is, seen from the second."""


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(animal: str) -> str:
    """More than one of an animal."""
    return IRREGULAR.get(animal, f"{animal}s")


def several(animal: str, count: int) -> str:
    """As in "three foxes"."""
    return f"{NUMBERS[count]} {animal if count == 1 else plural(animal)}"


def on_card(animal: str, colour: str) -> str:
    """As in "a fox on a red card"."""
    return f"{a(animal)} on {a(colour)} card"


_ANIMAL = f"(?:an? )?({'|'.join(ANIMALS)})"
_ON_CARD = rf"{_ANIMAL} on an? ({'|'.join(CARDS)}) card"
_ON_GROUND = rf"{_ANIMAL} on an? ({'|'.join(COLOURS)}) (?:(?:{'|'.join(PATTERNS)}) )?background"
_COUNTED = {several(animal, n): (animal, n) for animal in ANIMALS for n in NUMBERS}


def read(caption: str) -> Asked | None:
    """What the caption asks for; None if it is not one of ours."""
    if caption in _COUNTED:
        animal, count = _COUNTED[caption]
        return Asked(kind="counting", wanted=(Wanted(animal=animal, count=count),))
    if found := re.fullmatch(rf"{_ANIMAL} ({'|'.join(RELATIONS)}) {_ANIMAL}", caption):
        one, relation, other = found.groups()
        both = Wanted(animal=one), Wanted(animal=other)
        return Asked(kind="position", wanted=both, relation=relation)
    if found := re.fullmatch(rf"{_ON_CARD} and {_ON_CARD}", caption):
        one, colour, other, second = found.groups()
        both = (
            Wanted(animal=one, colour=colour, card=True),
            Wanted(animal=other, colour=second, card=True),
        )
        return Asked(kind="color_attr", wanted=both)
    for pattern, card in ((_ON_CARD, True), (_ON_GROUND, False)):
        if found := re.fullmatch(pattern, caption):
            wanted = Wanted(animal=found[1], colour=found[2], card=card)
            return Asked(kind="colors", wanted=(wanted,))
    if found := re.fullmatch(rf"{_ANIMAL} and {_ANIMAL}", caption):
        both = Wanted(animal=found[1]), Wanted(animal=found[2])
        return Asked(kind="two_object", wanted=both)
    if found := re.fullmatch(_ANIMAL, caption):
        return Asked(kind="single_object", wanted=(Wanted(animal=found[1]),))
    return None
