"""A family of models in one file outside the package: points in the plane instead of pictures.

Each prompt is a cloud of points, N(centre, VARIANCE I), so the network that predicts the noise
is known exactly; what trains is a shift added to it. `--model tests/points.py` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d3po_bench.diffusion.process import VariancePreserving
from d3po_bench.models.adapters import Training
from d3po_bench.types import Conditions, Prediction, Process, Weights

VARIANCE = 0.05
SIDE = 16
"""Pixels of a picture; it shows the square from -1 to 1."""


class Points:
    """Implements `types.Model`."""

    latent_shape: tuple[int, ...] = (2,)
    prediction: Prediction = "epsilon"
    commit: str | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        betas = torch.linspace(1e-4, 0.02, 1000)
        self.process: Process = VariancePreserving((1 - betas).cumprod(0))
        self.shift = torch.zeros(2, device=device)
        self.forwards = self.backwards = 0

    @classmethod
    def load(
        cls, path: str, revision: str | None, index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> Self:  # fmt: skip
        return cls(device)

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """A centre for each prompt, on a circle by its length."""
        angle = torch.tensor([float(len(prompt)) for prompt in prompts])
        return Conditions({"centre": 0.5 * torch.stack([angle.cos(), angle.sin()], 1)})

    def unconditional(self) -> Conditions:
        return Conditions({"centre": torch.zeros(1, 2)})

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        self.forwards += len(x)
        self.backwards += len(x) * torch.is_grad_enabled()
        alpha, sigma = (
            part(s).float().unsqueeze(1) for part in (self.process.alpha, self.process.sigma)
        )
        noise = sigma * (x - alpha * conditions["centre"]) / (alpha**2 * VARIANCE + sigma**2)
        return noise + self.shift if weights == "current" else noise

    def decode(self, latents: Tensor) -> Tensor:
        """A white disc at each point, softer with the distance, on black."""
        places = torch.linspace(-1, 1, SIDE)
        y, x = torch.meshgrid(places, places, indexing="ij")
        apart = (x - latents[:, 0, None, None]) ** 2 + (y - latents[:, 1, None, None]) ** 2
        grey = (255 * (-4 * apart).exp()).round().to(torch.uint8)
        return grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()

    def add_adapter(self, seed: int) -> None:
        self.shift.requires_grad_()

    def trainable(self) -> dict[str, Tensor]:
        return {"shift": self.shift}

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        self.shift.data.copy_(state["shift"])

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file({"shift": self.shift.detach()}, folder / "shift.safetensors")

    def load_saved(self, folder: Path) -> None:
        self.shift.data.copy_(load_file(folder / "shift.safetensors")["shift"])


FAMILY = Points
