"""Stable Diffusion 3 and 3.5: a transformer that is a rectified flow, on two or three encoders.

Its sampler is Flow-GRPO's SDE unless `--set sampler=cps` or `ddim` says otherwise. The last step of
these two adds no noise, so that it cannot be trained: add `--set skip_steps=1`.

T5 (`text_encoder_3`) is optional: without it the network sees zeros in place of its 256 tokens, as
in diffusers. That saves 9.5 GB in half precision; long prompts and lettering suffer. With T5 or
without, a prompt must fit CLIP's 75 tokens.

`to_q,to_k,to_v,to_out.0`, the default LoRA targets, are the picture's half of the attention. The
text's is `add_q_proj,add_k_proj,add_v_proj,to_add_out`: published work trains both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from d3po_bench.diffusion.process import RectifiedFlow
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.text_encoders import clip_text, token_ids
from d3po_bench.types import Conditions

T5_TOKENS = 256
"""The pipeline's `max_sequence_length`."""


class StableDiffusion3(DiffusersModel):
    """A Stable Diffusion 3 or 3.5 model with a trainable adapter."""

    PIPELINES = ("StableDiffusion3Pipeline",)
    NETWORK = "transformer"
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL", "AutoencoderTiny"),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": ("T5TokenizerFast", "T5Tokenizer"),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    }
    OPTIONAL = ("text_encoder_3", "tokenizer_3")
    TOKENS: ClassVar[Mapping[str, int]] = {"tokenizer_3": T5_TOKENS}

    def __init__(
        self, parts: Mapping[str, Any], index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> None:  # fmt: skip
        """Read the noise levels, whose shift can depend on the picture's size.

        Raises:
            UserError: the scheduler's levels cannot be reproduced.
        """
        super().__init__(parts, index, device, training)
        config = parts["scheduler"].config
        _, height, width = self.latent_shape
        tokens = height * width // self.network.config.patch_size**2
        least, most = config.base_image_seq_len, config.max_image_seq_len
        share = (tokens - least) / (most - least)
        mu = config.base_shift + share * (config.max_shift - config.base_shift)
        self.process = RectifiedFlow.from_config(config, mu)
        self.prediction = "flow"

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        parts = self.parts
        pairs = [
            clip_text(parts[f"tokenizer{n}"], parts[f"text_encoder{n}"], prompts)
            for n in ("", "_2")
        ]
        clip, pooled = (torch.cat(tensors, -1) for tensors in zip(*pairs, strict=True))
        t5 = clip.new_zeros(len(prompts), T5_TOKENS, self.network.config.joint_attention_dim)
        if "text_encoder_3" in parts:
            ids = token_ids(parts["tokenizer_3"], prompts, T5_TOKENS)
            t5 = parts["text_encoder_3"](ids.to(self.device))[0]
        # CLIP's features are narrower than T5's; the two follow each other as one text.
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"text": torch.cat([clip, t5], 1), "pooled": pooled}

    def _call(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        output: Tensor = self._called(
            hidden_states=x, timestep=time, encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"], return_dict=False,
        )[0]  # fmt: skip
        return output

    def _latents(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return latents / float(config.scaling_factor) + float(config.shift_factor or 0)


FAMILY = StableDiffusion3
