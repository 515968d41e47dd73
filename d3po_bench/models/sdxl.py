"""Stable Diffusion XL: a UNet on the text of two CLIP encoders and on the picture's size.

Any scheduler config with discrete noise levels will do, as for Stable Diffusion 1.x. The size that
the UNet is told is that of the pictures drawn, uncropped, as the pipeline does by default.

What guidance steers away from is zeros where the pipeline's config says so
(`force_zeros_for_empty_prompt`, as in SDXL base), else the empty prompt.

The VAE decodes in float32 whatever the run's dtype: SDXL's overflows to black in fp16. In half
precision the weights of SDXL base take about 7 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from d3po_bench.models.adapters import Training
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.models.text_encoders import clip_text
from d3po_bench.types import Conditions


class StableDiffusionXL(StableDiffusion):
    """A Stable Diffusion XL model with a trainable adapter."""

    PIPELINES = ("StableDiffusionXLPipeline",)
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **StableDiffusion.PARTS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer",),
    }
    NOT_FOLLOWED: ClassVar[Mapping[str, Mapping[str, str]]] = {
        **StableDiffusion.NOT_FOLLOWED,
        "unet": {
            field: need
            for field, need in StableDiffusion.NOT_FOLLOWED["unet"].items()
            if field != "addition_embed_type"
        },
    }

    def __init__(
        self, parts: Mapping[str, Any], index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> None:  # fmt: skip
        """As for Stable Diffusion 1.x; the sizes that the UNet is told are fixed here."""
        super().__init__(parts, index, device, training)
        self._empty_is_zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        size = [float(self.pipeline.vae_scale_factor * side) for side in self.latent_shape[1:]]
        # Height and width of the original, top and left of the crop, height and width wanted.
        self._time_ids = torch.tensor([[*size, 0, 0, *size]], device=device)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        parts = self.parts
        first, _ = clip_text(parts["tokenizer"], parts["text_encoder"], prompts)
        second, pooled = clip_text(parts["tokenizer_2"], parts["text_encoder_2"], prompts)
        return {"text": torch.cat([first, second], -1), "pooled": pooled}

    def unconditional(self) -> Conditions:
        """Zeros, or the empty prompt: what the pipeline takes where no negative one is given."""
        empty = self.encode([""])
        if not self._empty_is_zeros:
            return empty
        return Conditions({name: torch.zeros_like(t) for name, t in empty.tensors.items()})

    def _call(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        added = {
            "text_embeds": conditions["pooled"],
            "time_ids": self._time_ids.expand(len(x), -1),
        }
        output: Tensor = self._called(
            x, time, conditions["text"], added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def _latents(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._latents(latents)
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        return latents * std / float(config.scaling_factor) + mean


FAMILY = StableDiffusionXL
