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
from eval.scorers import _clip
from eval.weights import find_all


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
        """Load the weights `weights`: official, tiny, or a folder with a head and clip/."""
        head, clip = _places(weights)
        self.clip = _clip.Clip(clip, device)
        self.head = load_head(head)
        self.sources = (head, clip / "model.safetensors")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8; the prompts are not looked at."""
        score: Tensor = self.head(self.clip.images(images))
        return score


def _places(weights: str) -> tuple[Path, Path]:
    """The head's file and CLIP's folder."""
    if weights == "official":
        clip, head = find_all("clip", "laion_aesthetic")
        return head / "sac+logos+ava1-l14-linearMSE.pth", clip
    folder = _clip.folder("aesthetic", weights)
    own = _clip.folder("clip", weights) if weights == "tiny" else folder / "clip"
    return folder / "head.safetensors", own


def load_head(path: Path) -> Head:
    """The head of a .pth state dict, loaded as weights only, or of a .safetensors file.

    Raises:
        UserError: it holds anything else.
    """
    try:
        state = _state(path)
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
            f"Expected an aesthetic head of linear layers in {path}, got {problem!r}. Fetch it "
            "again: `d3po-bench weights fetch laion_aesthetic`."
        ) from problem
    return head.eval().requires_grad_(False)


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The score with these weights on `device`."""
    return Aesthetic(device, weights)
