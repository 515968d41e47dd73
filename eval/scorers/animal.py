"""Probability of the prompted animal under a network that no method is rewarded by."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from d3po_bench.models.embedded.v2 import judge
from d3po_bench.models.embedded.v2.captions import ANIMALS, read
from d3po_bench.types import Scorer


class Animal:
    """How recognisable a sample is, 0 to 1; NaN where the prompt names no animal.

    Made for the embedded model's 32 px pictures; others are resized to that.
    """

    unit = "probability"

    def __init__(self, device: torch.device) -> None:
        """Load the classifier that ships with the embedded model."""
        from d3po_bench.models.embedded import classifier
        from d3po_bench.models.embedded.render import GLYPHS

        self.names = list(GLYPHS)
        self.device = device
        self.sources = (classifier.WEIGHTS,)
        self.network = classifier.load(len(self.names), device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[N, 45] for images [N, 3, h, w] uint8."""
        from d3po_bench.models.embedded.classifier import pictures

        x = pictures(images, self.device)
        return torch.cat([self.network(part) for part in x.split(64)]).cpu()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probability [N] of the first animal that each prompt names."""
        probability = self.logits(images).softmax(1)
        index = [self._animal(p) for p in prompts]
        rows = [
            p[i] if i is not None else torch.tensor(float("nan"))
            for p, i in zip(probability, index, strict=True)
        ]
        return torch.stack(rows)

    def _animal(self, prompt: str) -> int | None:
        words = re.findall(r"[a-z]+", prompt.lower())
        return next((self.names.index(w) for w in words if w in self.names), None)


class Shown:
    """How sure version 2's second judge is of the prompted animals, 0 to 1; NaN for other captions.

    Of an animal it is the probability where it is most likely; of several animals, the least.
    """

    unit = "probability"

    def __init__(self, device: torch.device) -> None:
        """Load the judge that ships with version 2."""
        self.judge = judge.load("second", device)
        self.sources = judge.paths("second", judge.HERE)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probabilities [N] for images [N, 3, h, w] uint8."""
        sure = self.judge.see(images).animals.flatten(2).amax(2)
        asked = [read(prompt) for prompt in prompts]
        wanted = [{ANIMALS.index(w.animal) for w in a.wanted} if a else set() for a in asked]
        return torch.stack(
            [p[list(w)].min() if w else p.new_tensor(float("nan"))
             for p, w in zip(sure, wanted, strict=True)]
        )  # fmt: skip


def load(device: torch.device, weights: str = "tiny") -> Scorer:
    """For pictures of `tiny2` the judge, for all others the classifier of version 1."""
    return Shown(device) if weights == "tiny2" else Animal(device)
