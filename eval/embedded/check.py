"""How well the embedded scorers judge renders that none of them was trained on.

    python -m eval.embedded.check

Needs the emoji font, as the recipe does. Prints a line for each number of the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from torch import Tensor

from d3po_bench import registry
from eval.embedded import facts, recipe
from eval.embedded.facts import Facts

COUNT = 2000


def retrieval(clip: Any, held: Facts) -> dict[str, float]:
    """Share of pictures whose nearest caption is right: among 45 animals; among all facts.

    The second is among the 84 captions of the picture's own animal, with every pattern and colour.
    """
    seen = clip.clip.images(held.pictures(slice(None)))
    names = clip.clip.texts(list(facts.ANIMALS))
    animal = (seen @ names.T).argmax(1) == held.truth[:, 0]
    return {"clip_animal": _share(animal), "clip_all_three": _share(_own_captions(clip, held))}


def _own_captions(clip: Any, held: Facts) -> Tensor:
    """Whether the best of the captions of a picture's animal has its pattern and colour, [N]."""
    patterns, colours = len(facts.PATTERNS), len(facts.COLOURS)
    every = torch.cartesian_prod(torch.arange(patterns), torch.arange(colours))
    found = torch.zeros(len(held), dtype=torch.bool)
    for a in held.truth[:, 0].unique():
        mine = (held.truth[:, 0] == a).nonzero().squeeze(1)
        about = torch.cat([torch.full((len(every), 1), int(a)), every], 1)
        texts = clip.clip.texts(facts.texts(about, torch.ones(len(about))))
        seen = clip.clip.images(held.pictures(mine.numpy()))
        found[mine] = (about[(seen @ texts.T).argmax(1)] == held.truth[mine]).all(1)
    return found


def matching(blip: Any, held: Facts) -> dict[str, float]:
    """Share of right and wrong captions that the matching head tells apart at probability 1/2.

    A wrong caption differs in one fact: of the captions with the animal alone in that, of the
    full ones in any of the three.
    """
    rng = torch.Generator().manual_seed(1)
    pictures, told = held.pictures(slice(None)), {}
    for name, full in (("animal", torch.zeros(len(held))), ("all_three", torch.ones(len(held)))):
        changed = facts.wrong(held.truth, full.long(), rng)
        right = blip.columns(pictures, facts.texts(held.truth, full))
        wrong = blip.columns(pictures, facts.texts(changed, full))
        apart = torch.cat([right["blip_itm_prob"] > 0.5, wrong["blip_itm_prob"] < 0.5])
        told[f"itm_{name}"] = _share(apart)
    return told


def pairwise(reward: Any, held: Facts) -> dict[str, float]:
    """Share of pairs whose better picture, by the stated utility, gets the larger reward."""
    pairs = recipe.choices(held, len(held), torch.Generator().manual_seed(2))
    first, second = reward(pairs.first, pairs.captions), reward(pairs.second, pairs.captions)
    clear = pairs.better.abs() > recipe.CLEAR
    return {"image_reward_pairs": _share(((first - second) * pairs.better > 0)[clear])}


def prettiness(aesthetic: Any, held: Facts) -> dict[str, float]:
    """Correlation of the aesthetic score with the stated rule."""
    pictures = held.pictures(slice(None))
    both = torch.stack([aesthetic(pictures, [""] * len(held)), recipe.prettiness(pictures)])
    return {"aesthetic_correlation": float(torch.corrcoef(both)[0, 1])}


def _share(right: Tensor) -> float:
    return float(right.double().mean())


CHECKS: tuple[tuple[str, Callable[[Any, Facts], dict[str, float]]], ...] = (
    ("clip", retrieval), ("blip", matching), ("image_reward", pairwise), ("aesthetic", prettiness),
)  # fmt: skip


def measured(weights: str = "tiny", count: int = COUNT) -> Iterator[tuple[str, float]]:
    """Each number of the card by its name."""
    held = facts.held_out(count)
    for name, check in CHECKS:
        yield from check(registry.scorer(name, torch.device("cpu"), weights), held).items()


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=COUNT, show_default=True)
def main(count: int) -> None:
    """Print how well the embedded scorers judge COUNT held-out renders.

    Example: python -m eval.embedded.check
    """
    for name, value in measured(count=count):
        click.echo(f"{name:22} {value:.4f}")


if __name__ == "__main__":
    main()
