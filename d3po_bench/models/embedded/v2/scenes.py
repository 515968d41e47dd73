"""What is in a picture of version 2: random scenes, each with a caption that is true of it.

A scene is one to four animals, each with its place, size and the card that it stands on, on a
background. Some combinations never occur, in no picture of any kind, so that a third list of
captions can ask for what no model of ours has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d3po_bench.models.embedded.render import COLOURS, PATTERNS
from d3po_bench.models.embedded.render import caption as on_a_background
from d3po_bench.models.embedded.v2.captions import ANIMALS, CARDS, RELATIONS, a, on_card, several

Rng = np.random.Generator

TABLES = {"sand": (232, 226, 214), "slate": (70, 76, 86), "mist": (176, 186, 196)}
"""Backgrounds that no caption names; cards lie on them."""

KINDS = {
    "name": 0.19, "single_object": 0.10, "background": 0.14, "two_object": 0.11,
    "counting": 0.15, "colors": 0.09, "position": 0.11, "color_attr": 0.11,
}  # fmt: skip
"""Kind of caption -> its share of the pictures. Six are named as GenEval names them."""

_PATTERN_ODDS = (0.28, 0.18, 0.11, 0.11, 0.11, 0.11, 0.10)
_APART = 8
"""One combination in so many is never drawn."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One animal. Lengths are shares of the picture's width; the centre, from the top left."""

    animal: str
    x: float
    y: float
    side: float
    card: str | None = None
    card_side: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that a caption can ask of a picture."""

    kind: str
    caption: str
    things: tuple[Thing, ...]
    ground: str
    """A colour of COLOURS, or one of TABLES."""
    pattern: str = "plain"


# ---- combinations that are never drawn


def pair_is_drawn(one: str, other: str) -> bool:
    """Whether two different animals are ever in one picture."""
    return (ANIMALS.index(one) + ANIMALS.index(other)) % _APART != 3


def card_is_drawn(animal: str, colour: str) -> bool:
    """Whether an animal ever stands on a card of this colour."""
    return (ANIMALS.index(animal) + 3 * CARDS.index(colour)) % _APART != 3


def count_is_drawn(animal: str, count: int) -> bool:
    """Whether there are ever exactly `count` of an animal."""
    return count == 1 or (ANIMALS.index(animal) + 3 * count) % _APART != 3


# ---- layouts


def _one(rng: Rng, animal: str) -> tuple[Thing, ...]:
    side = rng.uniform(0.72, 0.95)
    x, y = rng.uniform(side / 2, 1 - side / 2, 2)
    return (Thing(animal=animal, x=x, y=y, side=side),)


def _pair(rng: Rng, animals: Sequence[str], way: tuple[int, int]) -> tuple[Thing, Thing]:
    """Two animals, the first in direction `way` from the second, clear of each other."""
    apart = rng.uniform(0.235, 0.26, 2)
    middle = 0.5 + rng.uniform(-0.015, 0.015, 2)
    slack = np.where(np.asarray(way) == 0, rng.uniform(-0.22, 0.22), 0)
    across = np.where(np.asarray(way) == 0, rng.uniform(-0.04, 0.04), 0)
    first = middle + np.asarray(way) * apart + slack + across
    second = middle - np.asarray(way) * apart + slack - across
    return tuple(  # type: ignore[return-value]
        Thing(animal=animal, x=place[0], y=place[1], side=rng.uniform(0.43, 0.48))
        for animal, place in zip(animals, (first, second), strict=True)
    )


def _any_way(rng: Rng) -> tuple[int, int]:
    ways = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1))
    return ways[rng.integers(len(ways))]


def _crowd(rng: Rng, animal: str, count: int) -> tuple[Thing, ...]:
    """One to four of an animal: three and four lie in the corners of a square, or a triangle."""
    if count == 1:
        return _one(rng, animal)
    if count == 2:
        return _pair(rng, (animal, animal), _any_way(rng))
    corners = [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    if count == 3:
        missing = int(rng.integers(8))
        triangles = ([(-1, -1), (1, -1), (0, 1)], [(0, -1), (-1, 1), (1, 1)])
        corners = triangles[missing % 2] if missing > 3 else corners
        corners = [c for i, c in enumerate(corners) if i != missing]
    side = rng.uniform(0.42, 0.46)
    return tuple(
        Thing(
            animal=animal, side=side,
            x=0.5 + 0.245 * i + rng.uniform(-0.02, 0.02),
            y=0.5 + 0.245 * j + rng.uniform(-0.02, 0.02),
        )
        for i, j in corners
    )  # fmt: skip


def _with_cards(rng: Rng, things: Sequence[Thing], cards: Sequence[str]) -> tuple[Thing, ...]:
    """The same, a little smaller, on cards as large as they were."""
    return tuple(
        Thing(
            animal=t.animal, x=t.x, y=t.y, side=t.side * rng.uniform(0.76, 0.84), card=colour,
            card_side=t.side,
        )
        for t, colour in zip(things, cards, strict=True)
    )  # fmt: skip


# ---- scenes


def _choice(rng: Rng, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _two_animals(rng: Rng) -> tuple[str, str]:
    while True:
        one, other = (ANIMALS[i] for i in rng.choice(len(ANIMALS), 2, replace=False))
        if pair_is_drawn(one, other):
            return one, other


def _card_for(rng: Rng, animal: str) -> str:
    return _choice(rng, [c for c in CARDS if card_is_drawn(animal, c)])


def _table(rng: Rng, cards: Sequence[str]) -> str:
    """A table on which every one of the cards stands out."""

    def clear(table: str) -> bool:
        tone = np.asarray(TABLES[table])
        return all(np.abs(tone - COLOURS[c]).sum() > 130 for c in cards)

    return _choice(rng, [t for t in TABLES if clear(t)])


def _plain_scene(rng: Rng, kind: str, caption: str, things: tuple[Thing, ...]) -> Scene:
    """On a background that the caption does not name."""
    pattern = "plain" if rng.random() < 0.7 else "gradient"
    ground = _choice(rng, tuple(COLOURS))
    return Scene(kind=kind, caption=caption, things=things, ground=ground, pattern=pattern)


def _alone(rng: Rng, kind: str) -> Scene:
    """One animal on any background, which a caption of kind `background` names."""
    animal, ground = _choice(rng, ANIMALS), _choice(rng, tuple(COLOURS))
    pattern = str(rng.choice(PATTERNS, p=_PATTERN_ODDS))
    named = {"name": animal, "single_object": a(animal)}
    caption = named.get(kind) or on_a_background(animal, pattern, ground)
    things = _one(rng, animal)
    return Scene(kind=kind, caption=caption, things=things, ground=ground, pattern=pattern)


def _counting(rng: Rng, kind: str) -> Scene:
    count = int(rng.integers(1, 5))
    animal = _choice(rng, [x for x in ANIMALS if count_is_drawn(x, count)])
    return _plain_scene(rng, kind, several(animal, count), _crowd(rng, animal, count))


def _two(rng: Rng, kind: str) -> Scene:
    animals = _two_animals(rng)
    caption = " and ".join(a(x) for x in animals)
    return _plain_scene(rng, kind, caption, _pair(rng, animals, _any_way(rng)))


def _position(rng: Rng, kind: str) -> Scene:
    animals, relation = _two_animals(rng), _choice(rng, tuple(RELATIONS))
    caption = f"{a(animals[0])} {relation} {a(animals[1])}"
    return _plain_scene(rng, kind, caption, _pair(rng, animals, RELATIONS[relation]))


def _on_cards(rng: Rng, kind: str) -> Scene:
    """One animal on a card, or two of which each has its own."""
    animals = _two_animals(rng) if kind == "color_attr" else (_choice(rng, ANIMALS),)
    cards: list[str] = []
    while len(set(cards)) < len(animals):
        cards = [_card_for(rng, x) for x in animals]
    bare = _pair(rng, animals, _any_way(rng)) if len(animals) > 1 else _one(rng, animals[0])
    caption = " and ".join(on_card(x, c) for x, c in zip(animals, cards, strict=True))
    things = _with_cards(rng, bare, cards)
    return Scene(kind=kind, caption=caption, things=things, ground=_table(rng, cards))


_MAKERS = {
    "name": _alone, "single_object": _alone, "background": _alone, "two_object": _two,
    "counting": _counting, "colors": _on_cards, "position": _position, "color_attr": _on_cards,
}  # fmt: skip


def scene(rng: Rng, kind: str | None = None) -> Scene:
    """A random scene, of one kind if that is given."""
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    return _MAKERS[kind](rng, kind)
