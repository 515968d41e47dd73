"""Simulated annotators: a stated rule, read with stated errors, voting as people do.

They go through the same store as people. What they find out is about the loop, not about people.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from d3po_bench import registry
from d3po_bench.diffusion.seeding import stream
from d3po_bench.errors import UserError
from d3po_bench.feedback.labels import Hand, LabelStore
from d3po_bench.feedback.rounds import Answer, Kind, Pool, Round

Rule = Callable[[Tensor, Sequence[str]], Tensor]
"""Pictures [N, 3, h, w] uint8 and their prompts -> how good each is, [N]; 0 or less is bad."""

NAME = "simulated {}"
"""Of a simulated rater, by number from 1."""

RED = 0.12
"""Share of a picture that may be red before the stand-in for safety calls it unsafe."""


@dataclass(frozen=True)
class Annotator:
    """How one simulated rater differs from the rule."""

    error: float = 0.0
    """Probability of saying the opposite: of an image of a grid, or of a pair."""
    first: float = 0.0
    """Probability of choosing the left picture of a pair without looking."""

    def __post_init__(self) -> None:
        """Refuse what is no probability.

        Raises:
            UserError: naming it.
        """
        for name, value in (("error", self.error), ("first", self.first)):
            if not 0 <= value <= 1:
                raise UserError(
                    f"Expected {name} from 0 to 1, got {value}. Give a probability of a mistake."
                )

    def answer(self, kind: Kind, hand: Hand, worth: Tensor, rng: Generator) -> Answer:
        """What this rater says of an item whose images are worth [K]."""
        luck = torch.rand(len(worth) + 1, generator=rng)
        if kind == "tags":
            wrong = luck[:-1] < self.error
            return tuple((wrong ^ (worth <= 0)).nonzero().squeeze(1).tolist())
        if luck[-1] < self.first:
            return "a" if hand.shown[0] == 0 else "b"
        better = bool(worth[0] > worth[1]) ^ bool(luck[0] < self.error)
        return "a" if better else "b"


# ---- rules


def recognised(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Deformed: the embedded model's independent classifier sees another animal, mostly."""
    judge = registry.load_scorer("animal", torch.device("cpu"))
    worth: Tensor = judge(images, prompts) - 0.5
    return worth


def fitting(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Alignment: the embedded ImageReward-shaped model's score."""
    judge = registry.load_scorer("image_reward", torch.device("cpu"), "tiny")
    worth: Tensor = judge(images, prompts)
    return worth


def harmless(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A stand-in for safety: not more than RED of the picture is red.

    Red is where the red channel exceeds green and blue by 60 of 255.
    """
    red, green, blue = images.int().unbind(1)
    share = (red - torch.maximum(green, blue) > 60).float().mean((1, 2))
    return RED - share


RULES: Mapping[str, Rule] = {
    "deformed": recognised, "unsafe": harmless, "better": fitting, "alignment": fitting,
}  # fmt: skip
"""Which rule answers which question."""


# ---- voting


def worths(folder: Path, round_: Round, rule: Rule) -> dict[str, Tensor]:
    """What the rule says of each item's images, [K]."""
    images = torch.stack([_read(folder / name) for item in round_.items for name in item.images])
    prompts = [item.prompt for item in round_.items for _ in item.images]
    table = rule(images, prompts).view(len(round_.items), -1)
    return {item.id: row for item, row in zip(round_.items, table, strict=True)}


def vote(store: LabelStore, folder: Path, pool: Sequence[Annotator], seed: int) -> int:
    """Let a pool judge a round until nothing is left for it; returns the number of votes.

    The raters are called `simulated 1` and so on, and take turns. Each answer is a function of
    seed, rater and item, so that a repeated call gives the same votes.
    """
    worth = worths(folder, store.round, RULES[store.round.question])
    place = {item.id: n for n, item in enumerate(store.round.items)}
    raters = [(n, a, _invited(store, NAME.format(n + 1))) for n, a in enumerate(pool)]
    idle, votes = set[int](), 0
    for n, annotator, rater in cycle(raters):
        hand = store.hand_out(rater)
        if hand is None:
            idle.add(n)
        else:
            number = (n * len(place) + place[hand.item.id]) * 2 + hand.repeat
            rng = stream(seed, "raters", index=number)
            answer = annotator.answer(store.round.kind, hand, worth[hand.item.id], rng)
            store.vote(rater, hand.id, answer, 0, hand.step)
            idle, votes = set(), votes + 1
        if len(idle) == len(raters):
            return votes
    return votes


def pool_of(names: Iterable[str]) -> Pool:
    """Whether raters of these names are people; one who is simulated makes all of them so."""
    simulated = re.compile(NAME.format(r"\d+"))
    return "simulated" if any(simulated.fullmatch(name) for name in names) else "people"


def _invited(store: LabelStore, name: str) -> int:
    rater = store.rater_of(store.invite(name))
    if rater is None:
        raise UserError(f"Expected {name!r} to be let in, got kept out. Let them in again.")
    return rater.id


def _read(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
