"""Shared fixtures: no network, one thread, and a pipeline folder so small that tests are fast."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench.models.adapters import Training
from d3po_bench.models.embedded import recipe
from d3po_bench.models.sources import Source, load
from d3po_bench.models.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_numbers() -> dict[str, Any]:
    """Numbers recorded from the published code (yk7333/d3po 40d3175, ddpo-pytorch 1958463)."""
    path = Path(__file__).parent / "reference_numbers.json"
    numbers: dict[str, Any] = json.loads(path.read_text())
    return numbers


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock StableDiffusionPipeline folder with random weights: 16 px images, 4x4 latents."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = recipe.new_tokenizer(["cat", "a dog on a red background"], Path())
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=recipe.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "micro"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def micro_model(micro: Path) -> StableDiffusion:
    """The micro pipeline with a fresh adapter of seed 0."""
    model = load(Source(path=str(micro)), CPU, Training())
    model.add_adapter(seed=0)
    return model


def disturb(model: StableDiffusion, scale: float = 0.05, seed: int = 1) -> None:
    """Move every trainable weight, so that policy and pretrained model differ."""
    rng = torch.Generator().manual_seed(seed)
    for weight in model.trainable().values():
        weight.data += scale * torch.randn(weight.shape, generator=rng)
