"""How much the images of a prompt differ from each other, so that collapse shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3po_bench.types import Scorer
from eval.scorers import _clip


class Diversity:
    """Mean cosine distance of an image to the others of its prompt, 0 to 2.

    Over the features of the embedded model's classifier, those before its last layer, or over
    CLIP's embeddings. NaN where the images that are scored together hold no other one of that
    prompt.
    """

    unit = "cosine distance"

    def __init__(self, device: torch.device, weights: str) -> None:
        """Load the classifier that ships with the embedded model (tiny), or CLIP.

        Raises:
            UserError: CLIP's weights are not there.
        """
        if weights == "tiny":
            from d3po_bench.models.embedded import classifier
            from d3po_bench.models.embedded.render import GLYPHS

            network = classifier.load(len(GLYPHS), device)

            @torch.no_grad()
            def features(images: Tensor) -> Tensor:
                parts = classifier.pictures(images, device).split(64)
                found = torch.cat([network.features(part) for part in parts])
                return torch.nn.functional.normalize(found, dim=1).cpu()

            self.features, self.sources = features, (classifier.WEIGHTS,)
        else:
            folder = _clip.folder("clip", weights)
            self.features = _clip.opened(folder, device).images
            self.sources = (folder / "model.safetensors",)

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


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The measure over the classifier's features ("tiny"), or CLIP's ("official", or a folder)."""
    return Diversity(device, weights)
