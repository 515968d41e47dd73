"""Stable Diffusion 1.x and 2.x: a UNet on the text of one CLIP encoder.

Any scheduler config with a discrete noise schedule will do. The embedded model goes through this
same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from d3po_bench.diffusion.process import VariancePreserving
from d3po_bench.errors import UserError
from d3po_bench.models.adapters import DiffusersModel, Training, token_ids
from d3po_bench.types import Conditions


class StableDiffusion(DiffusersModel):
    """A Stable Diffusion 1.x or 2.x model with a trainable adapter."""

    PIPELINES = ("StableDiffusionPipeline",)
    NETWORK = "unet"
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL", "AutoencoderTiny"),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer",),
        "scheduler": ("DDIMScheduler",),
    }

    def __init__(self, parts: Mapping[str, Any], device: torch.device, training: Training) -> None:
        """Read the noise schedule.

        Raises:
            UserError: the network predicts something that is neither noise nor velocity.
        """
        super().__init__(parts, device, training)
        scheduler = parts["scheduler"]
        self.process = VariancePreserving(scheduler.alphas_cumprod)
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(
                f"This model predicts {self.prediction!r}; only epsilon and v_prediction are "
                "supported. Use another model."
            )

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        tokens = token_ids(self.parts["tokenizer"], prompts)
        return {"text": self.parts["text_encoder"](tokens.to(self.device))[0]}

    def _call(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        output: Tensor = self._called(x, time, conditions["text"], return_dict=False)[0]
        return output

    def _latents(self, latents: Tensor) -> Tensor:
        return latents / float(self.vae.config.scaling_factor)


FAMILY = StableDiffusion
