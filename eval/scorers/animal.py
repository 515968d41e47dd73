"""Probability of the prompted animal under the embedded model's independent classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

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


def load(device: torch.device) -> Scorer:
    """The classifier on `device`."""
    return Animal(device)
