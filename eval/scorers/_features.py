"""What measures of a set of pictures see of each: unit vectors of a classifier, or of CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eval.scorers import _clip

Features = Callable[[Tensor], Tensor]
"""Pictures [N, 3, h, w] uint8 -> [N, F] of unit length, on the CPU."""


SHIP_WITH_CLIP = ("diversity", "vendi")
"""Scorers over these features: whatever ships a CLIP has theirs."""


def load(device: torch.device, weights: str) -> tuple[Features, tuple[Path, ...]]:
    """Those of the embedded model's classifier before its last layer (tiny), or CLIP's embeddings.

    Returns:
        The features, and the files that they come from.

    Raises:
        UserError: CLIP's weights are not there.
    """
    if weights != "tiny":
        folder = _clip.folder("clip", weights)
        return _clip.opened(folder, device).images, (folder / "model.safetensors",)
    from d3po_bench.models.embedded import classifier
    from d3po_bench.models.embedded.render import GLYPHS

    network = classifier.load(len(GLYPHS), device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        parts = classifier.pictures(images, device).split(64)
        found = torch.cat([network.features(part) for part in parts])
        return torch.nn.functional.normalize(found, dim=1).cpu()

    return features, (classifier.WEIGHTS,)


def groups(prompts: list[str]) -> list[Tensor]:
    """Of each prompt, the numbers of its pictures."""
    return [
        torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
        for prompt in dict.fromkeys(prompts)
    ]
