"""How much the images of a prompt differ from each other, so that collapse shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3po_bench.types import Scorer


class Diversity:
    """Mean cosine distance of an image to the others of its prompt, 0 to 2.

    Over the features of the embedded model's classifier, those before its last layer. NaN where
    the images that are scored together hold no other one of that prompt.
    """

    unit = "cosine distance"

    def __init__(self, device: torch.device) -> None:
        """Load the classifier that ships with the embedded model."""
        from d3po_bench.models.embedded import classifier
        from d3po_bench.models.embedded.render import GLYPHS

        self.device = device
        self.sources = (classifier.WEIGHTS,)
        self.network = classifier.load(len(GLYPHS), device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[N, F] of unit length, for images [N, 3, h, w] uint8."""
        from d3po_bench.models.embedded.classifier import pictures

        x = pictures(images, self.device)
        found = torch.cat([self.network.features(part) for part in x.split(64)])
        return torch.nn.functional.normalize(found, dim=1).cpu()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Distances [N]."""
        return distances(self.features(images), prompts)


def distances(features: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of 1 - cosine between each of `features` [N, F], unit length, and its prompt's others.

    Returns:
        [N]; NaN for the only image of a prompt.
    """
    names = list(dict.fromkeys(prompts))
    group = torch.tensor([names.index(p) for p in prompts])
    others = (group.unsqueeze(0) == group.unsqueeze(1)).float()
    others.fill_diagonal_(0)
    distance = 1 - features @ features.T
    return (distance * others).sum(1) / others.sum(1)


def load(device: torch.device) -> Scorer:
    """The measure on `device`."""
    return Diversity(device)
