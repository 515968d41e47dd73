"""Stable Diffusion 1.5 with random weights, made on the device: a `--model` for the GPU report.

No file is read, so it needs no network and no disk; its pictures are noise, its speed is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from d3po_bench.models.adapters import Training
from d3po_bench.models.embedded import recipe
from d3po_bench.models.stable_diffusion import StableDiffusion
from results.memory import SD15, VAE


class RandomSD15(StableDiffusion):
    """The published architecture."""

    UNET: ClassVar[Mapping[str, Any]] = SD15
    DECODER: ClassVar[Mapping[str, Any]] = VAE
    TEXT: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "projection_dim": 768,
    }  # fmt: skip

    @classmethod
    def load(
        cls, path: str, revision: str | None, index: Mapping[str, Any], device: torch.device,
        training: Training,
    ) -> Self:  # fmt: skip
        """The same weights each time on one kind of device."""
        import diffusers
        import transformers

        tokenizer = recipe.new_tokenizer(["cat"], Path())
        tokenizer.model_max_length = 77
        text = transformers.CLIPTextConfig(**cls.TEXT)
        torch.manual_seed(0)
        with device:
            parts = {
                "unet": diffusers.UNet2DConditionModel(**cls.UNET).to(training.stored_dtype),
                "vae": diffusers.AutoencoderKL(**cls.DECODER),
                "text_encoder": transformers.CLIPTextModel(text).to(training.stored_dtype),
            }
        given = {**parts, "tokenizer": tokenizer, "scheduler": recipe.new_scheduler()}
        return cls(given, index, device, training)


class RandomSmall(RandomSD15):
    """The same blocks, so narrow that a CPU gets through them: for the dry run."""

    UNET: ClassVar[Mapping[str, Any]] = {
        **SD15, "sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32,
        "attention_head_dim": 2, "layers_per_block": 1,
    }  # fmt: skip
    DECODER: ClassVar[Mapping[str, Any]] = {
        **VAE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1,
    }  # fmt: skip
    TEXT: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 32,
    }  # fmt: skip


FAMILY: type[RandomSD15] = RandomSD15
