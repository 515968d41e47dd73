"""Stable Diffusion 1.x and 2.x: a UNet on the text of one CLIP encoder.

Any scheduler config with a discrete noise schedule will do: its noise levels and timesteps are
followed as diffusers' DDIM scheduler reads them, whatever the solver. The embedded model goes
through this same file.
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
    NOT_FOLLOWED: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "unet": {
            "time_cond_proj_dim": "the guidance as an embedding, as distilled networks (LCM) do",
            "class_embed_type": "class labels",
            "num_class_embeds": "class labels",
            "encoder_hid_dim_type": "conditions that are no CLIP text",
            "addition_embed_type": "conditions beside the prompt, such as SDXL's picture size",
        },
        "text_encoder": {"use_attention_mask": "a mask of the padded tokens"},
        "scheduler": {
            "thresholding": "dynamic thresholding in each step",
            "clip_sample": "the clean latent clipped in each step",
            "use_flow_sigmas": "the noise levels of a flow",
        },
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
        from diffusers import DDIMScheduler

        scheduler = parts["scheduler"]
        self.prediction = scheduler.config.get("prediction_type")
        # Those of EDM and of flows have no alphas: their networks expect other latents.
        if not hasattr(scheduler, "alphas_cumprod") or self.prediction not in KNOWN:
            raise UserError(
                f"This model predicts {self.prediction!r} for a {type(scheduler).__name__}; only "
                f"{' and '.join(KNOWN)} at discrete noise levels are supported. Use another model."
            )
        # Of the solvers, DDIM alone clips if it is not told.
        config = {"clip_sample": False, **scheduler.config}
        ddim = DDIMScheduler.from_config(config)
        super().__init__({**parts, "scheduler": ddim}, index, device, training)

        def timesteps(steps: int) -> Tensor:
            ddim.set_timesteps(steps)
            # Trailing spacing gives one more for some numbers of steps, such as 61.
            found: Tensor = ddim.timesteps[:steps]
            return found

        self.process = VariancePreserving(
            ddim.alphas_cumprod, timesteps=timesteps, last=ddim.final_alpha_cumprod
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
