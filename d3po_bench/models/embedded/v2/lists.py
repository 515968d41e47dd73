"""Captions to train on, to evaluate on, and of combinations that no picture ever showed.

    python -m d3po_bench.models.embedded.v2.lists FOLDER

writes geneval.txt, geneval-dev.txt, geneval-held-out.txt and geneval-unseen.txt: as many of each of
GenEval's six kinds where there are so many. The first is to train on, the second to choose settings
on, the third to report. What the base model learned from holds these three, not the last.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

import click

from d3po_bench.errors import said_in_one_line
from d3po_bench.models.embedded.render import COLOURS, PATTERNS
from d3po_bench.models.embedded.render import caption as on_a_background
from d3po_bench.models.embedded.v2.captions import ANIMALS, CARDS, RELATIONS, a, on_card, several
from d3po_bench.models.embedded.v2.scenes import card_is_drawn, count_is_drawn, pair_is_drawn

TRAINING, DEV, HELD_OUT, UNSEEN = 40, 20, 40, 40
"""Captions of each kind, at the most."""

Caption = tuple[str, bool]
"""A caption, and whether pictures like it were ever drawn."""


def _single() -> Iterator[Caption]:
    yield from ((a(animal), True) for animal in ANIMALS)


def _two() -> Iterator[Caption]:
    for one, other in permutations(ANIMALS, 2):
        yield f"{a(one)} and {a(other)}", pair_is_drawn(one, other)


def _counting() -> Iterator[Caption]:
    for animal, count in product(ANIMALS, (1, 2, 3, 4)):
        yield several(animal, count), count_is_drawn(animal, count)


def _colors() -> Iterator[Caption]:
    for animal, colour in product(ANIMALS, CARDS):
        yield on_card(animal, colour), card_is_drawn(animal, colour)


def _position() -> Iterator[Caption]:
    for (one, other), relation in product(permutations(ANIMALS, 2), RELATIONS):
        yield f"{a(one)} {relation} {a(other)}", pair_is_drawn(one, other)


def _attribution() -> Iterator[Caption]:
    """Each pair of animals once, with colours of its own."""
    rng = random.Random(0)
    for one, other in permutations(ANIMALS, 2):
        first, second = rng.sample(CARDS, 2)
        drawn = card_is_drawn(one, first) and card_is_drawn(other, second)
        caption = f"{on_card(one, first)} and {on_card(other, second)}"
        yield caption, drawn and pair_is_drawn(one, other)


EVERY = {
    "single_object": _single, "two_object": _two, "counting": _counting, "colors": _colors,
    "position": _position, "color_attr": _attribution,
}  # fmt: skip
"""Kind -> all its captions."""


def lists() -> dict[str, list[str]]:
    """List -> its captions, sorted. No caption is in two."""
    names = ("geneval", "geneval-dev", "geneval-held-out", "geneval-unseen")
    chosen: dict[str, list[str]] = {name: [] for name in names}
    for number, captions in enumerate(EVERY.values()):
        every = list(captions())
        random.Random(number).shuffle(every)
        drawn = [caption for caption, seen in every if seen]
        training = min(TRAINING, len(drawn) * 2 // 5)
        chosen["geneval"] += drawn[:training]
        rest = drawn[training:]
        dev = min(DEV, len(rest) // 3)
        chosen["geneval-dev"] += rest[:dev]
        chosen["geneval-held-out"] += rest[dev : dev + HELD_OUT]
        chosen["geneval-unseen"] += [caption for caption, seen in every if not seen][:UNSEEN]
    return {name: sorted(captions) for name, captions in chosen.items()}


def vocabulary() -> list[str]:
    """Captions that hold every word of every caption, to make the tokenizer from."""
    grounds = [
        on_a_background(animal, *rest) for animal, *rest in product(ANIMALS, PATTERNS, COLOURS)
    ]
    return [caption for every in EVERY.values() for caption, _ in every()] + grounds


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write the lists to FOLDER.

    Example: python -m d3po_bench.models.embedded.v2.lists d3po_bench/prompts
    """
    for name, captions in lists().items():
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        click.echo(f"{name}: {len(captions)} captions")


if __name__ == "__main__":
    with said_in_one_line():
        main()
