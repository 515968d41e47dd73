"""Pictures with everything that is true of them, for teaching and testing the embedded scorers.

The renders are those of the embedded model's recipe, from another seed. A picture has an animal,
a pattern and a colour; a caption names the animal alone or all three, and is right for every
picture that agrees with what it names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d3po_bench.models.embedded import render

ANIMALS, PATTERNS, COLOURS = tuple(render.GLYPHS), render.PATTERNS, tuple(render.COLOURS)
SEED = 4242
"""Of the renders; the embedded model was trained on those of seed 0."""

HELD_OUT = 2_000
"""Last pictures of a set, which nothing is trained on."""


@dataclass(frozen=True)
class Facts:
    """N pictures. Facts are numbers in ANIMALS, PATTERNS and COLOURS."""

    images: Any
    """[N, 32, 32, 3] uint8, a numpy array."""
    truth: Tensor
    """[N, 3] int64: animal, pattern, colour."""

    def __len__(self) -> int:
        """N."""
        return len(self.truth)

    def pictures(self, index: Any) -> Tensor:
        """[M, 3, 32, 32] uint8."""
        return torch.from_numpy(np.array(self.images[index])).permute(0, 3, 1, 2)

    def part(self, where: slice) -> Facts:
        """Some of them."""
        return Facts(self.images[where], self.truth[where])


def _block(start: int, stop: int) -> tuple[Any, list[list[int]]]:
    images, truth = [], []
    for index in range(start, stop):
        rng = np.random.default_rng([SEED, index])
        facts = [int(rng.integers(len(kinds))) for kinds in (ANIMALS, PATTERNS, COLOURS)]
        picture = render.draw(ANIMALS[facts[0]], PATTERNS[facts[1]], COLOURS[facts[2]], rng)
        images.append(picture[..., :3])
        truth.append(facts)
    return np.stack(images), truth


def render_facts(count: int, work: Path, processes: int) -> None:
    """Write facts.npy [N, 32, 32, 3] and truth.json."""
    starts = range(0, count, 500)
    stops = [min(start + 500, count) for start in starts]
    with ProcessPoolExecutor(processes) as pool:
        blocks = list(pool.map(_block, starts, stops))
    np.save(work / "facts.npy", np.concatenate([images for images, _ in blocks]))
    (work / "truth.json").write_text(json.dumps([facts for _, part in blocks for facts in part]))


def read_facts(work: Path) -> tuple[Facts, Facts]:
    """Those to train on, and the held-out ones."""
    images = np.load(work / "facts.npy", mmap_mode="r")
    whole = Facts(images, torch.tensor(json.loads((work / "truth.json").read_text())))
    return whole.part(slice(0, len(whole) - HELD_OUT)), whole.part(slice(-HELD_OUT, None))


def held_out(count: int) -> Facts:
    """Fresh renders that no set of `render_facts` holds, for measuring."""
    images, truth = _block(10**7, 10**7 + count)
    return Facts(images, torch.tensor(truth))


# ---- captions


def caption(truth: Sequence[int], full: bool) -> str:
    """The animal alone, or with colour and pattern, as the embedded model's captions have it."""
    animal, pattern, colour = truth
    if full:
        return render.caption(ANIMALS[animal], PATTERNS[pattern], COLOURS[colour])
    return ANIMALS[animal]


def agree(pictures: Tensor, captions: Tensor, full: Tensor) -> Tensor:
    """Which captions are right for which pictures, [N, M] bool.

    Args:
        pictures: [N, 3] what is true of each picture.
        captions: [M, 3] what each caption is about.
        full: [M] bool, whether it names all three or the animal alone.
    """
    same = pictures[:, None, :] == captions[None, :, :]
    return same[..., 0] & (same.all(2) | ~full[None, :])


def wrong(truth: Tensor, full: Tensor, rng: torch.Generator) -> Tensor:
    """Facts [N, 3] with one changed that the caption names: the animal, or any of the three."""
    sizes = torch.tensor([len(ANIMALS), len(PATTERNS), len(COLOURS)])
    which = torch.randint(3, (len(truth),), generator=rng) * full
    step = 1 + (torch.rand(len(truth), generator=rng) * (sizes[which] - 1)).long()
    changed = truth.clone()
    row = torch.arange(len(truth))
    changed[row, which] = (truth[row, which] + step) % sizes[which]
    return changed


def texts(truth: Tensor, full: Tensor) -> list[str]:
    """Captions of facts [N, 3]."""
    return [caption(t, f) for t, f in zip(truth.tolist(), full.tolist(), strict=True)]


# ---- damage


def damaged(images: Tensor, strength: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures [N, 3, 32, 32] uint8 with blur and noise of strength 0 to 1, [N]; uint8 again."""
    x = images.float()
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    s = strength.view(-1, 1, 1, 1)
    noise = torch.randn(x.shape, generator=rng)
    return (x + s * (blurred - x) + 60 * s * noise).clamp(0, 255).round().to(torch.uint8)
