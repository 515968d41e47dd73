"""How well the embedded scorers judge renders that none of them was trained on.

    python -m eval.embedded.check [--write]

Needs the emoji font, as the recipe does. Prints a line for each number of the card, CARD.md, which
--write makes from them and from card.json, the recipe's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import said_in_one_line
from eval.embedded import facts, recipe
from eval.embedded.facts import Facts

COUNT = 2000
HERE = Path(__file__).parent


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
        yield from check(registry.load_scorer(name, torch.device("cpu"), weights), held).items()


WORDS = {
    "clip_animal": "CLIP: the right one of 45 animals",
    "clip_all_three": "CLIP: the right one of the animal's 84 full captions",
    "itm_animal": "BLIP matching: right or wrong animal",
    "itm_all_three": "BLIP matching: right caption, or one wrong in one fact",
    "image_reward_pairs": "ImageReward-shaped: the better of two pictures",
    "aesthetic_correlation": "aesthetic: correlation with the rule",
}


def card(count: int, found: dict[str, float]) -> str:
    """CARD.md from what was measured and the recipe's card.json."""
    facts = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    stages = "\n".join(
        f"| {name} | {stage['steps']:,} | {stage['seconds']:,} |"
        for name, stage in facts["stages"].items()
        if "steps" in stage
    )
    measured = "\n".join(f"| {WORDS[name]} | {value:.4f} |" for name, value in found.items())
    kinds = (".json", ".safetensors", ".txt")
    size = sum(p.stat().st_size for p in HERE.rglob("*") if p.suffix in kinds) / 1e6
    text = (HERE / "CARD.template.md").read_text(encoding="utf-8")
    return text.format(
        megabytes=size, pictures=facts["recipe"]["pictures"], stages=stages, count=count,
        measured=measured, count_scale=recipe.SCALED_ON,
    )  # fmt: skip


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=COUNT, show_default=True)
@click.option("--write", is_flag=True, help="Write CARD.md, too.")
def main(count: int, write: bool) -> None:
    """Print how well the embedded scorers judge COUNT held-out renders.

    Example: python -m eval.embedded.check
    """
    found = dict(measured(count=count))
    for name, value in found.items():
        click.echo(f"{value:.4f}  {WORDS[name]}")
    if write:
        (HERE / "CARD.md").write_text(card(count, found), encoding="utf-8")


if __name__ == "__main__":
    with said_in_one_line():
        main()
