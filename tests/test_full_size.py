"""A Stable Diffusion 1.5 of full size, with random weights, goes through `run` on the CPU."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from d3po_bench.cli import cli
from d3po_bench.models.embedded import recipe


def save_random_sd15(folder: Path) -> int:
    """The published architecture's shapes in half precision; returns the UNet's parameters."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.set_default_dtype(torch.float16)  # random weights: build them small at once
    try:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            sample_size=512, scaling_factor=0.18215,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12, projection_dim=768)
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer = recipe.new_tokenizer(["cat"], folder)
    tokenizer.model_max_length = 77
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=recipe.new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return sum(p.numel() for p in unet.parameters())


@pytest.mark.slow
def test_one_round_of_a_full_size_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameters = save_random_sd15(tmp_path / "sd15")
    assert 855e6 < parameters < 865e6
    settings = ["sampling_steps=2", "prompts_per_round=2", "eval_every=0", "dtype=fp32",
                "micro_batch=1", "sample_batch=2", "decode_batch=1", "reference_batch=2",
                "gradient_checkpointing=true", "units_per_update=2"]  # fmt: skip
    command = ["run", "--method", "d3po", "--objective", "incompress", "--rounds", "1",
               "--model", str(tmp_path / "sd15"), "--preset", "official_code", "--device", "cpu",
               "--out", str(tmp_path / "runs")]  # fmt: skip
    command += [part for s in settings for part in ("--set", s)]
    cli(command, standalone_mode=False)
    lines = list((tmp_path / "runs").rglob("metrics.jsonl"))
    metrics = json.loads(lines[0].read_text())
    assert (metrics["pairs"], metrics["images"], metrics["updates"]) == (2, 4, 1)
    assert metrics["grad_norm"] > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{parameters / 1e6:.0f}M parameters, peak memory {peak:.1f} GB")
    assert peak < 20
