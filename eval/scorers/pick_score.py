"""PickScore v1: which picture people would choose for a prompt (arXiv:2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _clip

# Nobody has published checksums: the revision fixes the files, the first fetch their sha256.
WEIGHTS = {
    "pick_score": {
        "summary": "PickScore v1 on CLIP ViT-H/14 (scorer pick_score)",
        "licence": "MIT",
        "address": "https://huggingface.co/yuvalkirstain/PickScore_v1/resolve/a4e4367c6dfa7288a00c550414478f865b875800/",
        "files": {"config.json": ("", 0), "model.safetensors": ("", 3_940_000_000)},
    },
}


class PickScore:
    """exp(logit_scale) x cosine of picture and prompt, about 18 to 24.

    CLIP ViT-H/14 of LAION, trained on the choices of Pick-a-Pic v1. The difference of two
    pictures' scores is the log of the odds that people choose the first. As in the code of
    yuvalkirstain/PickScore: bicubic to 224 pixels and the middle, prompts cut at 77 tokens. Others
    divide by 26 or 100; scale in an objective instead, as in pick_score:0.04+clip:0.01.
    """

    unit = "logit"

    def __init__(self, folder: Path, words: Path, device: torch.device) -> None:
        """Load it.

        Args:
            folder: with config.json and model.safetensors.
            words: folder of CLIP's tokenizer, which is OpenAI's.
            device: where to score.

        Raises:
            UserError: it does not load.
        """
        self.clip = _clip.opened(folder, device, "gelu", words)
        self.scale = float(self.clip.model.logit_scale.exp())
        self.sources = (folder / "model.safetensors",)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8."""
        return self.scale * self.clip.cosines(images, prompts)


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The score on `device`.

    Args:
        device: where to score.
        weights: "official", or a folder of transformers' layout with a tokenizer.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        files = downloads.find("pick_score", "clip-words")
        return PickScore(files[0].parent, files[-1].parent, device)
    folder = _clip.folder("pick_score", weights)
    return PickScore(folder, folder, device)
