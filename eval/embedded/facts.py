"""Renders with everything that is true of them, for teaching and testing the embedded scorers.

The pictures are those that the embedded model's version 2 learned from. A caption is right for
every picture of which it holds by GenEval's rules, whichever picture it was written for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from d3po_bench.models.embedded.render import COLOURS, PATTERNS
from d3po_bench.models.embedded.v2 import captions, judge_recipe
from d3po_bench.models.embedded.v2.captions import ANIMALS, Asked, read
from d3po_bench.models.embedded.v2.judge import Found
from d3po_bench.models.embedded.v2.pictures import Pictures
from d3po_bench.models.embedded.v2.scenes import Scene, Thing
from eval.scorers._geneval import fits, right, towards

HELD_OUT = 2_000
"""Last pictures of a set, which nothing is trained on."""


@dataclass(frozen=True)
class Facts:
    """N pictures and what they show."""

    images: Callable[[Tensor], Tensor]
    """Pictures [M, 3, 64, 64] uint8 of these numbers [M]."""
    scenes: Sequence[Scene]

    def __len__(self) -> int:
        """N."""
        return len(self.scenes)

    def pictures(self) -> Tensor:
        """All of them, [N, 3, 64, 64] uint8."""
        return self.images(torch.arange(len(self)))

    def captions(self) -> list[str]:
        """The caption that each was drawn for."""
        return [scene.caption for scene in self.scenes]


def read_facts(folder: Path) -> tuple[Facts, Facts]:
    """Those in a folder of `v2.pictures` to train on, and the held-out ones."""
    pictures = Pictures(folder)
    scenes = [
        Scene(**(s | {"things": tuple(Thing(**t) for t in s["things"])})) for s in pictures.scenes()
    ]
    first = len(scenes) - HELD_OUT
    return (
        Facts(lambda index: pictures.batch(index)[:, :3], scenes[:first]),
        Facts(lambda index: pictures.batch(index + first)[:, :3], scenes[first:]),
    )


def held_out(count: int) -> Facts:
    """Fresh renders that nothing was trained on, as many of each kind of caption."""
    pictures, scenes = judge_recipe.held_out(count)
    return Facts(lambda index: pictures[index], scenes)


# ---- what is true

_read = lru_cache(maxsize=100_000)(read)


def truth(scene: Scene) -> list[Found]:
    """What a judge without error finds in a scene."""
    return [
        Found(
            animal=t.animal, probability=1.0, x=t.x, y=t.y, side=t.side,
            colour=t.card or scene.ground, card=t.card is not None,
        )
        for t in scene.things
    ]  # fmt: skip


def asked_by(caption: str) -> Asked:
    """What one of our captions asks for."""
    asked = _read(caption)
    if asked is None:
        raise ValueError(f"No caption of version 2: {caption!r}")
    return asked


def holds(scene: Scene, caption: str) -> bool:
    """Whether a caption is right for a scene: GenEval's rules, and the background's pattern."""
    if caption.endswith(" background"):
        word = caption.split()[-2]
        if scene.pattern != (word if word in PATTERNS else "plain"):
            return False
    return right(truth(scene), asked_by(caption))


def agree(scenes: Sequence[Scene], texts: Sequence[str]) -> Tensor:
    """Which captions are right for which scenes, [N, M] bool."""
    shown = [{t.animal for t in scene.things} for scene in scenes]
    named = [{w.animal for w in asked_by(text).wanted} for text in texts]
    found = torch.zeros(len(scenes), len(texts), dtype=torch.bool)
    for n, scene in enumerate(scenes):
        for m, text in enumerate(texts):
            found[n, m] = named[m] <= shown[n] and holds(scene, text)
    return found


def share_right(scene: Scene, caption: str) -> float:
    """Share of what a caption asks for, fact by fact, that is true of a scene."""
    found, asked = truth(scene), asked_by(caption)
    told = []
    for wanted in asked.wanted:
        of_it = [f for f in found if f.animal == wanted.animal]
        told.append(bool(of_it))
        told += [any(fits(f, wanted) for f in of_it)] if wanted.colour else []
        told += [len(of_it) == wanted.count] if asked.kind == "counting" else []
    if asked.relation:
        both = [[f for f in found if f.animal == w.animal] for w in asked.wanted]
        told.append(all(both) and towards(both[0][0], both[1][0], asked.relation) > 0.5)
    return sum(told) / len(told)


# ---- wrong captions

_KINDS = (
    ANIMALS, tuple(captions.plural(animal) for animal in ANIMALS), ("two", "three", "four"),
    tuple(COLOURS), PATTERNS[1:], ("left", "right"), ("above", "below"),
)  # fmt: skip
"""Words of which one may stand for another."""


def wrong(scene: Scene, rng: random.Random) -> str:
    """The scene's caption with a word changed, or two animals exchanged, so that it is wrong."""
    words = scene.caption.split()
    spots = [(i, kind) for i, word in enumerate(words) for kind in _KINDS if word in kind]
    animals = [i for i, word in enumerate(words) if word in ANIMALS]
    while True:
        changed = words.copy()
        if len(animals) == 2 and rng.random() < 0.25:
            one, other = animals
            changed[one], changed[other] = words[other], words[one]
        else:
            i, kind = rng.choice(spots)
            changed[i] = rng.choice([word for word in kind if word != words[i]])
        text = re.sub(r"\ban? (\w+)", lambda found: captions.a(found[1]), " ".join(changed))
        if _read(text) and not holds(scene, text):
            return text


# ---- damage


def damaged(images: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures [N, 3, s, s] uint8 with blur and noise of strength 0 to 1, [N]; uint8 again."""
    x = images.float()
    blurred = F.avg_pool2d(F.pad(x, (4, 4, 4, 4), mode="replicate"), 9, 1)
    s = strength.view(-1, 1, 1, 1)
    noise = torch.randn(x.shape, generator=rng)
    return (x + s * (blurred - x) + 60 * s * noise).clamp(0, 255).round().to(torch.uint8)
