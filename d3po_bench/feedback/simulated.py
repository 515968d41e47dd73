"""Simulated annotators: a stated rule, read with stated errors, voting as people do.

They go through the same store as people. What they find out is about the loop, not about people.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import sqlalchemy as sql
import torch
from torch import Generator, Tensor

from d3po_bench.diffusion.seeding import stream
from d3po_bench.errors import UserError
from d3po_bench.feedback.handout import Hand, hand_out
from d3po_bench.feedback.invitations import SIMULATED, find_rater, invite
from d3po_bench.feedback.questions import Answer, Kind
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.store import (
    FACTS,
    RATERS,
    VOTES,
    HandoutSettings,
    LabelStore,
    open_labels,
)
from d3po_bench.feedback.votes import cast_vote
from d3po_bench.pictures import open_picture
from d3po_bench.training.tools import Tools

Told = Callable[[int, int], None]
Say = Callable[[str], None]

Rule = Callable[[Tensor, Sequence[str], Tools], Tensor]
"""Pictures [N, 3, h, w] uint8, their prompts, where scorers come from -> how good each is, [N].

0 or less is bad."""

RED = 0.12
"""Share of a picture that may be red before the stand-in for safety calls it unsafe."""


@dataclass(frozen=True)
class Annotator:
    """How one simulated rater differs from the rule."""

    error: float = 0.0
    """Probability of saying the opposite: of an image of a grid, or of a pair."""
    first: float = 0.0
    """Probability of choosing the left picture of a pair without looking."""
    temperature: float = 0.0
    """Of Bradley and Terry's choice: a picture worth u is preferred to one worth v with probability
    1 / (1 + exp(-(u - v) / temperature)), and called good as if v were 0; at 0 the larger wins."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: a probability is not from 0 to 1, or the temperature is below 0, infinite, or
                NaN.
        """
        for name, value in (("error", self.error), ("first", self.first)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is a probability, from 0 to 1, and cannot be {value}.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is 0 or above, and cannot be {self.temperature}.")

    def answer(self, kind: Kind, hand: Hand, worth: Tensor, rng: Generator) -> Answer:
        """What this rater says of an item whose images are worth [K]."""
        luck = torch.rand(len(worth) + 1, generator=rng)
        seen = worth if kind == "tags" else worth[:1] - worth[1:]
        if self.temperature:
            seen = seen + self.temperature * torch.rand(len(seen), generator=rng).logit()
        if kind == "tags":
            wrong = luck[:-1] < self.error
            return tuple((wrong ^ (seen <= 0)).nonzero().squeeze(1).tolist())
        if luck[-1] < self.first:
            return "a" if hand.shown[0] == 0 else "b"
        better = bool(seen[0] > 0) ^ bool(luck[0] < self.error)
        return "a" if better else "b"


# ---- rules


def recognised(images: Tensor, prompts: Sequence[str], tools: Tools) -> Tensor:
    """Deformed: the embedded model's independent classifier sees another animal, mostly."""
    judge = tools.scorer("animal", torch.device("cpu"), "tiny")
    worth: Tensor = judge(images, prompts) - 0.5
    return worth


def fitting(images: Tensor, prompts: Sequence[str], tools: Tools) -> Tensor:
    """Alignment: the embedded ImageReward-shaped model's score."""
    judge = tools.scorer("image_reward", torch.device("cpu"), "tiny")
    worth: Tensor = judge(images, prompts)
    return worth


def harmless(images: Tensor, prompts: Sequence[str], tools: Tools) -> Tensor:
    """A stand-in for safety: not more than RED of the picture is red.

    Red is where the red channel exceeds green and blue by 60 of 255.
    """
    red, green, blue = images.int().unbind(1)
    share = (red - torch.maximum(green, blue) > 60).float().mean((1, 2))
    return RED - share


def by_scorer(name: str, bad_below: float = 0.0) -> Rule:
    """The rule of raters who judge by a scorer.

    Args:
        name: of the scorer, or name:weights.
        bad_below: pictures with no larger score are bad.
    """

    def rule(images: Tensor, prompts: Sequence[str], tools: Tools) -> Tensor:
        judge = tools.scorer(name, torch.device("cpu"), "official")
        worth: Tensor = judge(images, prompts) - bad_below
        return worth

    rule.__name__ = f"{name} above {bad_below}" if bad_below else name
    return rule


RULES: Mapping[str, Rule] = {
    "deformed": recognised, "unsafe": harmless, "better": fitting, "alignment": fitting,
}  # fmt: skip
"""Which rule answers which question."""


# ---- voting


def worths(folder: Path, round_: Round, rule: Rule, tools: Tools) -> dict[str, Tensor]:
    """What the rule says of each item's images, [K]."""
    names = [name for item in round_.items for name in item.images]
    pixels = (np.array(open_picture(folder / name)) for name in names)
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pixels]
    prompts = [item.prompt for item in round_.items for _ in item.images]
    if len({picture.shape for picture in images}) > 1:
        raise UserError(
            f"The pictures in {folder} have several sizes, and simulated raters judge those of "
            "one. Make the round of pictures of one size."
        )
    found = rule(torch.stack(images), prompts, tools)
    if not bool(found.isfinite().all()):
        unclear = prompts[int((~found.isfinite()).nonzero()[0])]
        raise UserError(
            f"Simulated raters cannot say how good a picture of {unclear!r} is: their rule knows "
            "no such thing. Ask another --question, or give other prompts."
        )
    rows = found.split([len(item.images) for item in round_.items])
    return {item.id: row for item, row in zip(round_.items, rows, strict=True)}


def simulate(
    folder: Path, labels: str | None, pool: Sequence[Annotator], seed: int, tools: Tools,
    told: Told = lambda done, total: None, rule: Rule | None = None,
    say: Say = lambda line: None,
) -> int:  # fmt: skip
    """Let a pool judge the round in `folder` by a rule, else that of its question.

    `told` is called with the votes that are given, and those that all raters could give; `say`
    hears of earlier votes whose rule is not known, where they are all there are.

    Returns:
        The number of votes.

    Raises:
        UserError: the round or its labels are damaged, its questions are not for this rule, a
            simulated rater is blocked or has voted by another rule, or there is no such scorer.
    """
    settings = HandoutSettings(votes_per_item=len(pool), gold_every=0, repeat_every=0)
    with open_labels(folder, labels, settings, new=True) as store:
        chosen = _rule_for(store.round, folder, rule)
        unknown = _record(store, pool, seed, rule.__name__ if rule else "the question's rule")
        worth = worths(folder, store.round, chosen, tools)
        votes = let_vote(store, worth, pool, seed, told)
    if unknown and not votes:
        say(f"{_listed(unknown)} had voted before; by which rule is not on record.")
    return votes


def _rule_for(round_: Round, folder: Path, rule: Rule | None) -> Rule:
    """The rule that was given, else that of the round's question.

    Raises:
        UserError: no rule answers the round's questions, or none does without being given.
    """
    study = round_.study
    if beyond := [q.kind for q in study.question if q.kind not in ("tags", "pairs")]:
        raise UserError(
            f"The round in {folder} asks for a {beyond[0]}, and simulated raters answer tags and "
            "pairs alone. Let people judge it."
        )
    if rule is None and study.plain is None:
        raise UserError(
            f"The round in {folder} asks questions of its own, and simulated raters have a "
            f"rule for {', '.join(RULES)} alone. Give a scorer with --by, or let people judge it."
        )
    return rule or RULES[study.plain[1]]  # type: ignore[index]  # one of them is there


def _record(store: LabelStore, pool: Sequence[Annotator], seed: int, by: str) -> list[str]:
    """Keep what a pool votes by, with its votes.

    Returns:
        Who has voted already by what an earlier version did not keep.

    Raises:
        UserError: some have voted already by something else.
    """
    ways = {SIMULATED.format(n + 1): _way(annotator, by, seed) for n, annotator in enumerate(pool)}
    query = sql.select(RATERS.c.name).join(VOTES, VOTES.c.rater == RATERS.c.id).distinct()
    facts = sql.select(FACTS.c.name, FACTS.c.value)
    with store.writing() as connection:
        voted = {*connection.execute(query).scalars()}
        known = {n: way for n, way in connection.execute(facts) if n in ways and n in voted}
        _require_same(known, ways)
        fresh = [name for name in ways if name not in voted]
        connection.execute(sql.delete(FACTS).where(FACTS.c.name.in_(fresh)))
        rows = [{"name": name, "value": ways[name]} for name in fresh]
        if rows:
            connection.execute(sql.insert(FACTS), rows)
    return [name for name in ways if name in voted and name not in known]


def _way(annotator: Annotator, by: str, seed: int) -> str:
    """What a rater votes by, in words."""
    numbers = [f"{name} {float(value)}" for name, value in asdict(annotator).items()]
    return ", ".join([*numbers, f"by {by}", f"seed {seed}"])


def _require_same(known: Mapping[str, str], ways: Mapping[str, str]) -> None:
    """Refuse raters who would go on by something else than they voted by."""
    others = [name for name in ways if known.get(name, ways[name]) != ways[name]]
    if others:
        before, now = (way[others[0]].split(", ") for way in (known, ways))
        was = ", ".join(part for part in before if part not in now)
        asked = ", ".join(part for part in now if part not in before)
        raise UserError(
            f"{_listed(others)} voted on this round with other settings ({was}, not {asked}), and "
            "their votes stay. Make another round, or keep other votes of this one apart with "
            "--labels sqlite:///FILE."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def let_vote(
    store: LabelStore, worth: Mapping[str, Tensor], pool: Sequence[Annotator], seed: int,
    told: Told = lambda done, total: None,
) -> int:  # fmt: skip
    """Let a pool vote until nothing is left for it; returns the number of votes.

    The raters are called `simulated 1` and so on, and take turns. Each answer is a function of
    seed, rater and item, so that a repeated call gives the same votes.

    Args:
        store: of the round.
        worth: of each item, how good its images are, [K].
        pool: the raters.
        seed: of their mistakes.
        told: called with the votes that are given, and those that all raters could give.
    """
    place = {item.id: n for n, item in enumerate(store.round.items)}
    raters = []
    for n, annotator in enumerate(pool):
        name = SIMULATED.format(n + 1)
        rater = find_rater(store, token=invite(store, name))
        if rater is None:
            raise UserError(f"{name!r} is blocked in this round. Unblock them on the admin page.")
        raters.append((n, annotator, rater.id))
    idle, votes = set[int](), 0
    for n, annotator, rater_id in cycle(raters):
        hand = hand_out(store, rater_id)
        if hand is None:
            idle.add(n)
        else:
            number = (n * len(place) + place[hand.item.id]) * 2 + hand.repeat
            rng = stream(seed, "raters", index=number)
            answer = annotator.answer(
                store.round.asked(hand.item).kind, hand, worth[hand.item.id], rng
            )
            cast_vote(store, rater_id, hand.id, answer, 0, hand.step)
            idle, votes = set(), votes + 1
            told(votes, len(place) * len(pool))
        if len(idle) == len(raters):
            break
    return votes
