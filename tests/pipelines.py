"""Pipelines of diffusers' own classes with random weights, so small that they draw in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d3po_bench.models.embedded import recipe

SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading",
    "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
"""SDXL base's scheduler_config.json."""

SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
"""Stable Diffusion 1.5's."""


def lively(part: nn.Module, seed: int) -> nn.Module:
    """Random weights of which the output depends visibly on every input."""
    rng = torch.Generator().manual_seed(seed)
    for name, weight in part.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            weight.data = torch.randn(weight.shape, generator=rng) * fan_in**-0.5
        elif name.endswith("bias"):
            weight.data = torch.randn(weight.shape, generator=rng) * 0.1
    return part


def clip(tokenizer: Any, width: int, kind: str) -> Any:
    """A CLIP text encoder of three layers."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return lively(getattr(transformers, kind)(config), width)


def tokenizers() -> tuple[Any, Any]:
    """CLIP's two tokenizers, of which the second pads with another token."""
    first = recipe.new_tokenizer(["cat", "a dog on a red background"], Path())
    second = recipe.new_tokenizer(["cat", "a dog on a red background"], Path())
    second.pad_token = "!"
    return first, second


def vae(channels: int, **settings: Any) -> Any:
    """A VAE that makes 16 x 16 pixels of 4 x 4 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=channels, norm_num_groups=4, sample_size=16,
        **settings,
    )  # fmt: skip


def sdxl(folder: Path, *, v: bool = False) -> Path:
    """Save Stable Diffusion XL as it is, or one with everything that can differ (`v`)."""
    import diffusers

    one, two = tokenizers()
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.5, 0.8, 1.2]}
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32),
        attention_head_dim=(2, 4), use_linear_projection=True, cross_attention_dim=16 + 24,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025, **(statistics if v else {})),
        text_encoder=clip(one, 16, "CLIPTextModel"), tokenizer=one,
        text_encoder_2=clip(two, 24, "CLIPTextModelWithProjection"), tokenizer_2=two,
        unet=lively(unet, 0), scheduler=diffusers.EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=not v,
    ).save_pretrained(folder)  # fmt: skip
    changed = {"prediction_type": "v_prediction"} if v else {}
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(SDXL_SCHEDULER | changed))
    return folder


def t5(width: int) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer, which reads letter by letter."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters += [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    return tokenizer, T5EncoderModel(config)


def sd3(folder: Path, *, v35: bool = False) -> Path:
    """Save Stable Diffusion 3, or 3.5 without T5 and with levels that depend on the size."""
    import diffusers

    one, two = tokenizers()
    three, encoder = (None, None) if v35 else t5(48)
    blocks = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if v35 else {}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16,
        pooled_projection_dim=16 + 24, out_channels=16, pos_embed_max_size=6, **blocks,
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False),
        text_encoder=clip(one, 16, "CLIPTextModelWithProjection"), tokenizer=one,
        text_encoder_2=clip(two, 24, "CLIPTextModelWithProjection"), tokenizer_2=two,
        text_encoder_3=encoder, tokenizer_3=three, transformer=lively(transformer, 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=v35, base_shift=0.4, max_shift=1.1
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sd(folder: Path, *, two: bool = False) -> Path:
    """Save Stable Diffusion 1, or 2 with its wider text, linear projections and velocity."""
    import diffusers

    width = 24 if two else 16
    tokenizer, _ = tokenizers()
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32),
        attention_head_dim=(2, 4) if two else 2, use_linear_projection=two,
        cross_attention_dim=width,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae(4, scaling_factor=0.18215), text_encoder=clip(tokenizer, width, "CLIPTextModel"),
        tokenizer=tokenizer, unet=lively(unet, 0), safety_checker=None,
        scheduler=diffusers.PNDMScheduler(steps_offset=1), feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    levels = SD15_SCHEDULER | ({"prediction_type": "v_prediction"} if two else {})
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(levels))
    return folder
