"""The Vendi score: how many different pictures those of a prompt amount to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3po_bench.types import Scorer
from eval.scorers import _features


class Vendi:
    """The effective number of different pictures among the n of a prompt, 1 to n.

    1 where all are equal, n where none has anything in common with another. It depends on n, so
    only compare what has the same number of pictures of each prompt. Every picture of a prompt has
    its prompt's number, so that a mean over pictures is one over prompts. NaN where the pictures
    that are scored together hold a single one of that prompt.
    """

    unit = "pictures"
    compares = True
    """A picture alone has no number."""

    def __init__(self, device: torch.device, weights: str) -> None:
        """Load the classifier that ships with the embedded model (tiny), or CLIP.

        Raises:
            UserError: CLIP's weights are not there.
        """
        self.features, self.sources = _features.load(device, weights)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Effective numbers [N]."""
        features, found = self.features(images), torch.full((len(images),), float("nan"))
        for group in _features.groups(list(prompts)):
            if len(group) > 1:
                found[group] = effective_number(features[group])
        return found


def effective_number(features: Tensor) -> Tensor:
    """exp(-sum of l log l), l the eigenvalues of K / n and K the cosines of n `features` [n, F].

    Friedman and Dieng 2023 (arXiv:2210.02410), Eq. 2, with order 1.
    """
    shares = torch.linalg.eigvalsh(features.double() @ features.double().T / len(features))
    # Rounding leaves eigenvalues that are 0 on either side of it; 0 log 0 counts as 0.
    entropy: Tensor = torch.special.entr(shares.clamp(min=0)).sum()
    return entropy.exp().float()


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The measure over the classifier's features ("tiny"), or CLIP's ("official", or a folder)."""
    return Vendi(device, weights)
