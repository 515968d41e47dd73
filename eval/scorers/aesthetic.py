"""LAION aesthetic score: how much people would like the picture, about 1 to 10."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from d3po_bench.errors import UserError
from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _clip

WEIGHTS = {
    "laion_aesthetic": {
        "summary": "LAION's aesthetic head on CLIP ViT-L/14 (scorer aesthetic)",
        "licence": "Apache-2.0",
        "address": "https://raw.githubusercontent.com/yk7333/d3po/40d3175/d3po_pytorch/assets/",
        "files": {
            "sac+logos+ava1-l14-linearMSE.pth": (
                "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                3_714_759,
            ),
        },
    },
}


class Head(nn.Module):
    """A stack of linear layers without activations, so one affine map of the embedding."""

    def __init__(self, widths: Sequence[int]) -> None:
        """`widths`: of the embedding, of every layer in between, and 1."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, embedding: Tensor) -> Tensor:
        """[N, D] -> [N]."""
        for layer in self.layers:
            embedding = layer(embedding)
        return embedding.squeeze(1)


class Aesthetic:
    """The head on CLIP's image embedding scaled to length 1."""

    unit = "points"

    def __init__(self, device: torch.device, weights: str) -> None:
        """Load the weights `weights`: official, tiny, or a folder with a head and clip/.

        Raises:
            UserError: they are absent or broken.
        """
        if weights == "official":
            *clips, head = downloads.find("clip", "laion_aesthetic")
            clip = clips[0].parent
        else:
            folder = _clip.folder("aesthetic", weights)
            head = folder / "head.safetensors"
            clip = _clip.folder("clip", weights) if weights in _clip.SHIPPED else folder / "clip"
        self.clip = _clip.opened(clip, device)
        self.head = load_head(head)
        self.sources = (head, clip / "model.safetensors")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8; the prompts are not looked at."""
        score: Tensor = self.head(self.clip.images(images))
        return score


def load_head(path: Path) -> Head:
    """The head of a .pth state dict, loaded as weights only, or of a .safetensors file.

    Raises:
        UserError: it holds anything else.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        numbers = sorted({int(name.split(".")[1]) for name in state})
        kept = [(state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]) for n in numbers]
        head = Head([kept[0][0].shape[1], *(len(bias) for _, bias in kept)])
        with torch.no_grad():
            for layer, (weight, bias) in zip(head.layers, kept, strict=True):
                layer.weight.copy_(weight)  # type: ignore[operator]
                layer.bias.copy_(bias)  # type: ignore[operator]
    except (OSError, pickle.UnpicklingError, SafetensorError, RuntimeError, LookupError,
            ValueError, TypeError, AttributeError) as problem:  # fmt: skip
        raise UserError(
            f"{path} holds no aesthetic head of linear layers ({problem!r}). Fetch it again: "
            "`d3po-bench weights fetch laion_aesthetic`."
        ) from problem
    return head.eval().requires_grad_(False)


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The score with these weights on `device`."""
    return Aesthetic(device, weights)
