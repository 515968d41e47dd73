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
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.text_encoders import token_ids
from d3po_bench.types import Conditions

KNOWN = ("epsilon", "v_prediction")
"""What a network may predict."""


class StableDiffusion(DiffusersModel):
    """A Stable Diffusion 1.x or 2.x model with a trainable adapter."""

    PIPELINES = ("StableDiffusionPipeline",)
    NETWORK = "unet"
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL", "AutoencoderTiny"),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer",),
        "scheduler": (),
    }

    def __init__(
        self, parts: Mapping[str, Any], index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> None:  # fmt: skip
        """Read the noise schedule.

        Raises:
            UserError: it has no discrete levels, or the network predicts neither noise nor
                velocity.
        """
        super().__init__(parts, index, device, training)
        scheduler = parts["scheduler"]
        self.prediction = scheduler.config.get("prediction_type")
        # Those of EDM and of flows have no alphas: their networks expect other latents.
        if not hasattr(scheduler, "alphas_cumprod") or self.prediction not in KNOWN:
            raise UserError(
                f"This model predicts {self.prediction!r} for a {type(scheduler).__name__}; only "
                f"{' and '.join(KNOWN)} at discrete noise levels are supported. Use another model."
            )
        self.process = VariancePreserving(scheduler.alphas_cumprod)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        tokens = token_ids(self.parts["tokenizer"], prompts)
        return {"text": self.parts["text_encoder"](tokens.to(self.device))[0]}

    def _call(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        output: Tensor = self._called(x, time, conditions["text"], return_dict=False)[0]
        return output

    def _latents(self, latents: Tensor) -> Tensor:
        return latents / float(self.vae.config.scaling_factor)


FAMILY = StableDiffusion
