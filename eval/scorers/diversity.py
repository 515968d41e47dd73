"""How much the images of a prompt differ from each other, so that collapse shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3po_bench.types import Scorer
from eval.scorers import _features


class Diversity:
    """Mean cosine distance of an image to the others of its prompt, 0 to 2.

    Over the features of the embedded model's classifier, those before its last layer, or over
    CLIP's embeddings. NaN where the images that are scored together hold no other one of that
    prompt.
    """

    unit = "cosine distance"
    compares = True
    """A picture alone has no number."""

    def __init__(self, device: torch.device, weights: str) -> None:
        """Load the classifier that ships with the embedded model (tiny), or CLIP.

        Raises:
            UserError: CLIP's weights are not there.
        """
        self.features, self.sources = _features.load(device, weights)

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


def coverage(base: Tensor, tuned: Tensor, neighbours: int = 5) -> float:
    """Share of the base model's pictures that have one of the tuned model's near them.

    Near is within the distance to their own k-th nearest neighbour among the base model's: what
    falls out is a kind of picture that tuning has lost. Naeem et al. 2020 (arXiv:2002.09797),
    Eq. 11, with the base model's pictures in place of real ones.

    Args:
        base: [N, F] of unit length, N > `neighbours`.
        tuned: [M, F].
        neighbours: k.
    """
    radius = torch.cdist(base, base).kthvalue(neighbours + 1).values  # the nearest is itself
    return float((torch.cdist(base, tuned).amin(1) <= radius).double().mean())


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The measure over the classifier's features ("tiny"), or CLIP's ("official", or a folder)."""
    return Diversity(device, weights)
