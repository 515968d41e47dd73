"""GenEval (arXiv:2310.11513) on the pictures of the embedded model's version 2, by its judges.

A picture is right if the judge finds all that its caption asks for and nothing that it excludes:
GenEval's rules, with its margins. `geneval` says 1 or 0; `geneval_soft` the probability of the
same by the judge's own, which a method can climb. Overall scores are means over the six kinds of
captions, as GenEval's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.models.embedded.render import COLOURS
from d3po_bench.models.embedded.v2 import judge, render
from d3po_bench.models.embedded.v2.captions import ANIMALS, RELATIONS, Asked, Wanted, read
from d3po_bench.models.embedded.v2.judge import Found, Judge, Seen, objects

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MARGIN = 0.1
"""Share of two animals' sizes by which their centres must differ at the least, each way."""

_CANDIDATE = 0.02
"""Animals less probable than this do not count at all."""


# ---- right or wrong


def right(found: Sequence[Found], asked: Asked) -> bool:
    """Whether a picture with these animals is right for a caption."""
    groups = [[f for f in found if fits(f, wanted)] for wanted in asked.wanted]
    if any(len(g) < w.count for g, w in zip(groups, asked.wanted, strict=True)):
        return False
    if asked.kind == "counting" and len(groups[0]) > asked.wanted[0].count:
        return False
    if asked.relation:
        return towards(groups[0][0], groups[1][0], asked.relation) > 0.5
    return True


def fits(found: Found, wanted: Wanted) -> bool:
    """Whether an animal is of the kind that is wanted, on the colour that is wanted."""
    on_it = wanted.colour is None or (found.colour, found.card) == (wanted.colour, wanted.card)
    return found.animal == wanted.animal and on_it


def towards(one: Found, other: Found, relation: str) -> float:
    """How squarely `one` lies in the relation's direction from `other`, -1 to 1.

    GenEval's rule: of each way's offset a margin is taken off; the rest makes a direction.
    """
    margin = MARGIN * (one.side + other.side)
    offsets = [one.x - other.x, one.y - other.y]
    rest = [math.copysign(max(abs(d) - margin, 0.0), d) for d in offsets]
    length = math.hypot(*rest)
    across, down = RELATIONS[relation]
    return (across * rest[0] + down * rest[1]) / length if length > 1e-3 else 0.0


# ---- probabilities


def at_least(probabilities: Sequence[float], count: int) -> float:
    """Probability that so many of independent events or more happen."""
    ways = [1.0] + [0.0] * len(probabilities)
    for p in probabilities:
        ways = [w * (1 - p) + (ways[i - 1] * p if i else 0) for i, w in enumerate(ways)]
    return sum(ways[count:])


def _candidates(seen: Seen, n: int, wanted: Wanted) -> list[tuple[float, Found]]:
    """Places in picture `n` where the wanted animal may be, with the probability that it is."""
    animal = ANIMALS.index(wanted.animal)
    heat = torch.zeros_like(seen.animals[n : n + 1])
    heat[:, animal] = seen.animals[n, animal]
    here = slice(n, n + 1)
    alone = Seen(heat, seen.place[here], seen.colours[here], seen.card[here])
    found = objects(alone, _CANDIDATE)[0]
    return [(f.probability * _on_it(seen, n, f, wanted), f) for f in found]


def _on_it(seen: Seen, n: int, found: Found, wanted: Wanted) -> float:
    if wanted.colour is None:
        return 1.0
    place = seen.place[n, :2].flatten(1) - torch.tensor([[found.x], [found.y]])
    cell = int(place.abs().sum(0).argmin())
    card = float(seen.card[n].flatten()[cell])
    colour = float(seen.colours[n, list(COLOURS).index(wanted.colour)].flatten()[cell])
    return colour * (card if wanted.card else 1 - card)


def probability(seen: Seen, n: int, asked: Asked) -> float:
    """Probability that picture `n` is right for a caption."""
    groups = [_candidates(seen, n, wanted) for wanted in asked.wanted]
    if asked.relation:
        pairs = [
            p * q / (1 + math.exp(-10 * (towards(f, g, asked.relation) - 0.5)))
            for p, f in groups[0]
            for q, g in groups[1]
        ]
        return max(pairs, default=0.0)
    value = 1.0
    for group, wanted in zip(groups, asked.wanted, strict=True):
        value *= at_least([p for p, _ in group], wanted.count)
    if asked.kind == "counting":
        value -= at_least([p for p, _ in groups[0]], asked.wanted[0].count + 1)
    return value


# ---- scorers

Rule = Callable[[Seen, Sequence[Asked]], list[float]]


def hard(seen: Seen, asked: Sequence[Asked]) -> list[float]:
    """1 for each picture that is right, 0 for each other."""
    return [float(right(f, a)) for f, a in zip(objects(seen), asked, strict=True)]


def soft(seen: Seen, asked: Sequence[Asked]) -> list[float]:
    """Probability that each picture is right."""
    return [probability(seen, n, a) for n, a in enumerate(asked)]


class GenEval:
    """A judge's verdict on each picture; NaN where the caption is not one of version 2's."""

    def __init__(self, name: str, judge: Judge, rule: Rule, sources: Sequence[object]) -> None:
        """`sources`: the judge's files."""
        self.name, self.judge, self.rule, self.sources = name, judge, rule, tuple(sources)
        self.unit = "share right" if rule is hard else "probability"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8.

        Raises:
            UserError: they are smaller than what the judge has learned from.
        """
        if min(images.shape[-2:]) < render.SIZE:
            height, width = images.shape[-2:]
            raise UserError(
                f"{self.name} judges the pictures of tiny2, {render.SIZE} pixels wide and high, "
                f"and these have {width} x {height}. Give --model tiny2, or leave {self.name} out."
            )
        asked = [read(prompt) for prompt in prompts]
        known = [i for i, a in enumerate(asked) if a]
        scores = torch.full((len(prompts),), float("nan"))
        if known:
            seen = self.judge.see(images[known])
            scores[known] = torch.tensor(self.rule(seen, [a for a in asked if a]))
        return scores

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The score, and again for each kind of caption alone, each [N]."""
        scores = self(images, prompts)
        alone = {
            f"{self.name}_{kind}": scores.masked_fill(~here, float("nan"))
            for kind, here in _places(prompts).items()
        }
        return {self.name: scores} | alone


def _places(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Kind -> which captions are of it, [N]."""
    kinds = [a.kind if (a := read(prompt)) else "" for prompt in prompts]
    return {kind: torch.tensor([k == kind for k in kinds]) for kind in KINDS}


def by_kind(scores: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean score [N] of each kind of caption, and "mean": the mean of those."""
    places = _places(prompts)
    told = {kind: float(scores[here].mean()) for kind, here in places.items() if here.any()}
    return told | {"mean": sum(told.values()) / len(told)} if told else {}


def shipped(name: str, which: str, rule: Rule, device: torch.device) -> GenEval:
    """The scorer `name`: the verdicts of a judge that ships, `first` or `second`."""
    return GenEval(name, judge.load(which, device), rule, judge.paths(which, judge.HERE))
