"""The Stable Diffusion adapter against diffusers' own pipeline, and its options."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

from d3po_bench.d3po import D3PO
from d3po_bench.engine import Draws, Updates, sample, update, with_reference
from d3po_bench.errors import UserError
from d3po_bench.models.stable_diffusion import (
    Source,
    StableDiffusion,
    Training,
    fingerprint,
    load,
)
from d3po_bench.policy import Policy
from d3po_bench.seeding import stream
from d3po_bench.train import model_source
from tests.conftest import CPU, disturb

PROMPTS = ["cat", "a dog on a red background"]


def model_of(folder: Path, **training: Any) -> StableDiffusion:
    model = load(Source(path=str(folder)), CPU, Training(**training))
    model.add_adapter(seed=0)
    return model


def our_image(model: StableDiffusion, seed: int = 0, steps: int = 5) -> torch.Tensor:
    """Deployment sampler: eta 0, guidance 5, [2, 3, h, w] uint8."""
    policy = Policy(model, steps=steps, eta=0.0)
    rollout = sample(policy, PROMPTS, Draws(seed=seed, round=0))
    return model.decode(rollout.latents[:, 0, -1])


def stock_image(pipe: StableDiffusionPipeline, seed: int = 0, steps: int = 5) -> torch.Tensor:
    shape = (4, 4, 4)
    noise = [torch.randn(shape, generator=stream(seed, "noise", 0, i)) for i in range(2)]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=5.0, eta=0.0,
        latents=torch.stack(noise), output_type="pt",
    ).images  # fmt: skip
    return images.mul(255).round().to(torch.uint8)


def difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_loads_in_the_stock_pipeline_and_draws_the_same(
    micro: Path, tmp_path: Path, alpha: float | None
) -> None:
    model = model_of(micro, lora_alpha=alpha)
    disturb(model, 0.3)
    model.save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    base = stock_image(pipe)
    pipe.load_lora_weights(tmp_path)
    ours = our_image(model)
    assert difference(ours, stock_image(pipe)) <= 1
    assert difference(ours, base) > 1


def test_base_model_draws_as_the_stock_pipeline(micro: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    assert difference(our_image(model_of(micro)), stock_image(pipe)) <= 1


def test_fully_trained_unet_loads_with_from_pretrained(micro: Path, tmp_path: Path) -> None:
    model = model_of(micro, full=True)
    disturb(model, 0.02)
    model.save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    pipe.unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert difference(our_image(model), stock_image(pipe)) <= 1


def test_v_prediction_is_read_from_the_scheduler(micro: Path, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    shutil.copytree(micro, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    model = model_of(folder)
    assert model.prediction == "v_prediction"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert difference(our_image(model), stock_image(pipe)) <= 1


def test_autoencoder_kl_goes_through_the_same_file(micro: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    pipe.register_modules(vae=pipe.vae)
    pipe.save_pretrained(tmp_path / "kl")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "kl")
    assert difference(our_image(model_of(tmp_path / "kl")), stock_image(pipe)) <= 1


def test_lora_is_drawn_from_its_stream_and_starts_at_zero(micro: Path) -> None:
    one, same, other = (load(Source(path=str(micro)), CPU, Training()) for _ in range(3))
    one.add_adapter(0)
    same.add_adapter(0)
    other.add_adapter(1)
    down = [name for name in one.trainable() if "lora_A" in name]
    assert down
    for name in one.trainable():
        assert torch.equal(one.trainable()[name], same.trainable()[name])
        if name in down:
            assert not torch.equal(one.trainable()[name], other.trainable()[name])
        else:
            assert one.trainable()[name].abs().max() == 0
    values = torch.cat([one.trainable()[name].flatten() for name in down])
    assert values.std().item() == pytest.approx(1 / 4, rel=0.1)  # N(0, 1 / rank^2)


def test_lora_targets_and_rank(micro: Path) -> None:
    every = model_of(micro)
    fewer = model_of(micro, lora_targets=("to_q", "to_k", "to_v"), lora_rank=2)
    assert any("to_out" in name for name in every.trainable())
    assert not any("to_out" in name for name in fewer.trainable())
    assert all(w.shape[0] == 2 for n, w in fewer.trainable().items() if "lora_A" in n)


def one_update(model: StableDiffusion, scaler: torch.amp.GradScaler | None = None) -> float:
    policy, method = Policy(model, steps=4), D3PO()
    draws = Draws(seed=0, round=0)
    rollout = sample(policy, PROMPTS, draws, images_per_prompt=2, shared_noise=True)
    rollout = replace(rollout, scores=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    rollout = with_reference(policy, rollout, method, untrained=True, batch=8)
    optimizer = torch.optim.AdamW(list(model.trainable().values()), 1e-3)
    rows = method.rows(rollout, stream(0, "rows"))
    metrics = update(
        policy, method, rows, optimizer, Updates(units=2), stream(0, "shuffle"), scaler
    )
    return metrics["grad_norm"]


def test_gradient_checkpointing_changes_nothing(micro: Path) -> None:
    plain, saved = model_of(micro), model_of(micro, gradient_checkpointing=True)
    assert one_update(plain) == pytest.approx(one_update(saved), rel=1e-4)
    for name, weight in plain.trainable().items():
        torch.testing.assert_close(weight, saved.trainable()[name])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_adapter_and_the_steps_in_fp32(micro: Path, dtype: str) -> None:
    model = model_of(micro, dtype=dtype)
    full = model_of(micro)
    assert {w.dtype for w in model.trainable().values()} == {torch.float32}
    scaler = torch.amp.GradScaler("cpu") if dtype == "fp16" else None
    norm = one_update(model, scaler)
    assert norm == pytest.approx(one_update(full), rel=0.3)
    assert norm > 0


def test_offline_hub_id_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"Expected the model nobody/nothing .*hf download nobody"):
        load(model_source("nobody/nothing"), CPU, Training())


def test_sd15_is_pinned_and_absent_gives_its_size_and_command() -> None:
    source = model_source("sd15")
    assert source.path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert source.revision is not None
    assert len(source.revision) == 40
    with pytest.raises(UserError, match=rf"5.5 GB.*--revision {source.revision}"):
        load(source, CPU, Training())


def test_a_folder_of_another_kind_is_refused(micro: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        load(Source(path=str(tmp_path)), CPU, Training())
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"Stable-Diffusion-1\.x-shaped"):
        load(Source(path=str(tmp_path)), CPU, Training())
    index = json.loads((micro / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet3DConditionModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"Stable-Diffusion-1\.x-shaped"):
        load(Source(path=str(tmp_path)), CPU, Training())


def test_decoding_in_slices_is_decoding_at_once(micro: Path) -> None:
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    at_once, sliced = model_of(micro, decode_batch=8), model_of(micro, decode_batch=2)
    assert difference(at_once.decode(latents), sliced.decode(latents)) <= 1
    assert at_once.decode(latents).dtype == torch.uint8


def test_a_pipeline_folder_is_named_by_its_content(micro: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(micro, copy)
    name = fingerprint(Source(path=str(micro)))
    assert fingerprint(Source(path=str(copy))) == name
    weights = next((copy / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(Source(path=str(copy))) != name
    assert fingerprint(Source(path="owner/name", revision="abc")) == "owner/name@abc"
