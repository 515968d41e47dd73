"""CLIP score: 100 x the cosine between picture and prompt, as torchmetrics' clip_score has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3po_bench.types import Scorer
from eval.scorers import _clip


class ClipScore:
    """100 x cosine of CLIP ViT-L/14's embeddings; prompts are cut at 77 tokens.

    torchmetrics clips the mean over pictures at 0, so here no single score is clipped.
    """

    unit = "100 x cosine"

    def __init__(self, device: torch.device, weights: str) -> None:
        """Load the weights `weights`: official, tiny, or a folder."""
        folder = _clip.folder("clip", weights)
        self.clip = _clip.opened(folder, device)
        self.sources = (folder / "model.safetensors",)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8."""
        return 100 * self.clip.cosines(images, prompts)


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The score with these weights on `device`."""
    return ClipScore(device, weights)
