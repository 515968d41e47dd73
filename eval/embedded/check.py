"""How well the embedded scorers judge renders that none of them was trained on.

    python -m eval.embedded.check [--write]

Prints a line for each number of the card, CARD.md, which --write makes from them and from
card.json, the recipe's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import said_in_one_line
from d3po_bench.models.embedded.v2.captions import ANIMALS
from eval.embedded import facts, recipe
from eval.embedded.facts import Facts

COUNT = 2000
HERE = Path(__file__).parent / "v2"
WRONG = 5
"""Wrong captions beside each right one."""


def retrieval(scorer: Any, held: Facts) -> dict[str, float]:
    """Share of pictures whose nearest text is right: of 45 names, and of captions.

    The first is of pictures with animals of one kind. The captions are the picture's own and WRONG
    that differ in a word or in which animal is where.
    """
    clip = scorer.clip
    seen, rng = clip.images(held.pictures()), random.Random(1)
    one_kind = [n for n, s in enumerate(held.scenes) if len({t.animal for t in s.things}) == 1]
    best = (seen[one_kind] @ clip.texts(list(ANIMALS)).T).argmax(1)
    true = torch.tensor([ANIMALS.index(held.scenes[n].things[0].animal) for n in one_kind])
    texts = [[s.caption, *(facts.wrong(s, rng) for _ in range(WRONG))] for s in held.scenes]
    read = clip.texts([t for row in texts for t in row]).view(len(held), WRONG + 1, -1)
    captions = (read @ seen[:, :, None]).squeeze(2).argmax(1) == 0
    return {"clip_animal": _share(best == true), "clip_caption": _share(captions)}


def matching(blip: Any, held: Facts) -> dict[str, float]:
    """Share of right and wrong captions that the matching head tells apart at probability 1/2."""
    rng, pictures = random.Random(2), held.pictures()
    right = blip.columns(pictures, held.captions())
    wrong = blip.columns(pictures, [facts.wrong(scene, rng) for scene in held.scenes])
    apart = torch.cat([right["blip_itm_prob"] > 0.5, wrong["blip_itm_prob"] < 0.5])
    return {"itm": _share(apart)}


def pairwise(reward: Any, held: Facts) -> dict[str, float]:
    """Share of pairs whose better picture, by the stated utility, gets the larger reward."""
    batches = recipe.Batches(held, 4)
    pairs = recipe.choices(batches, len(held), torch.Generator().manual_seed(2))
    first, second = reward(pairs.first, pairs.captions), reward(pairs.second, pairs.captions)
    clear = pairs.better.abs() > recipe.CLEAR
    return {"image_reward_pairs": _share(((first - second) * pairs.better > 0)[clear])}


def prettiness(aesthetic: Any, held: Facts) -> dict[str, float]:
    """Correlation of the aesthetic score with the stated rule."""
    pictures = held.pictures()
    both = torch.stack([aesthetic(pictures, [""] * len(held)), recipe.prettiness(pictures)])
    return {"aesthetic_correlation": float(torch.corrcoef(both)[0, 1])}


def _share(right: Tensor) -> float:
    return float(right.double().mean())


CHECKS: tuple[tuple[str, Callable[[Any, Facts], dict[str, float]]], ...] = (
    ("clip", retrieval), ("blip", matching), ("image_reward", pairwise), ("aesthetic", prettiness),
)  # fmt: skip


def measured(weights: str = "tiny2", count: int = COUNT) -> Iterator[tuple[str, float]]:
    """Each number of the card by its name."""
    held = facts.held_out(count)
    for name, check in CHECKS:
        guarded = registry.load_scorer(name, torch.device("cpu"), weights)
        # The guard has no CLIP to look into.
        yield from check(guarded.scorer, held).items()


WORDS = {
    "clip_animal": "CLIP: the right one of 45 animals",
    "clip_caption": f"CLIP: the right caption before {WRONG} that are wrong in a word",
    "itm": "BLIP matching: right caption, or one wrong in a word",
    "image_reward_pairs": "ImageReward-shaped: the better of two pictures",
    "aesthetic_correlation": "aesthetic: correlation with the rule",
}


def card(count: int, found: dict[str, float]) -> str:
    """CARD.md from what was measured and the recipe's card.json."""
    made = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    stages = "\n".join(
        f"| {name} | {stage['steps']:,} | {stage['seconds']:,} |"
        for name, stage in made["stages"].items()
        if "steps" in stage
    )
    measured = "\n".join(f"| {WORDS[name]} | {value:.4f} |" for name, value in found.items())
    kinds = (".json", ".safetensors", ".txt")
    size = sum(p.stat().st_size for p in HERE.rglob("*") if p.suffix in kinds) / 1e6
    text = (HERE / "CARD.template.md").read_text(encoding="utf-8")
    return text.format(
        megabytes=size, stages=stages, count=count, measured=measured,
        count_scale=recipe.SCALED_ON,
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
