"""The Stable Diffusion adapter against diffusers' own pipeline, and its options."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from d3po_bench.config import Execution, RunConfig
from d3po_bench.d3po import D3PO
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.errors import UserError
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import Source, commit, fingerprint, load, model_source
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.runs.store import RunStore
from tests.conftest import CPU, disturb, loaded
from tests.rounds import trainer_of

PROMPTS = ["cat", "a dog on a red background"]


def model_of(folder: Path, **training: Any) -> StableDiffusion:
    model = loaded(folder, **training)
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


def as_it_is(micro: Path, folder: Path) -> Path:
    return micro


def predicting_velocity(micro: Path, folder: Path) -> Path:
    shutil.copytree(micro, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert loaded(folder).prediction == "v_prediction"
    return folder


def with_autoencoder_kl(micro: Path, folder: Path) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    pipe.register_modules(vae=pipe.vae)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [as_it_is, predicting_velocity, with_autoencoder_kl])
def test_a_pipeline_draws_as_the_stock_one(
    kind: Callable[[Path, Path], Path], micro: Path, tmp_path: Path
) -> None:
    folder = kind(micro, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert difference(our_image(model_of(folder)), stock_image(pipe)) <= 1


@pytest.mark.parametrize(
    ("training", "moved"), [({}, 0.3), ({"lora_alpha": 8.0}, 0.3), ({"full": True}, 0.02)]
)
def test_what_was_trained_draws_the_same_in_the_stock_pipeline(
    training: dict[str, Any], moved: float, micro: Path, tmp_path: Path
) -> None:
    model = model_of(micro, **training)
    before = our_image(model)
    disturb(model, moved)
    model.save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    if model.training.full:
        pipe.unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    else:
        pipe.load_lora_weights(tmp_path)
    ours = our_image(model)
    assert difference(ours, stock_image(pipe)) <= 1
    assert difference(ours, before) > 1


def test_lora_is_drawn_from_its_stream_and_starts_at_zero(micro: Path) -> None:
    models = [loaded(micro) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.add_adapter(seed)
    one, same, other = (model.trainable() for model in models)
    down = [name for name in one if "lora_A" in name]
    assert down
    for name in one:
        assert torch.equal(one[name], same[name])
        if name in down:
            assert not torch.equal(one[name], other[name])
        else:
            assert one[name].abs().max() == 0
    values = torch.cat([one[name].flatten() for name in down])
    assert values.std().item() == pytest.approx(1 / 4, rel=0.1)  # N(0, 1 / rank^2)


def test_lora_targets_and_rank(micro: Path, micro_model: StableDiffusion) -> None:
    fewer = model_of(micro, lora_targets=("to_q", "to_k", "to_v"), lora_rank=2)
    assert any("to_out" in name for name in micro_model.trainable())
    assert not any("to_out" in name for name in fewer.trainable())
    assert all(w.shape[0] == 2 for n, w in fewer.trainable().items() if "lora_A" in n)
    with pytest.raises(UserError, match="lora_targets=nothing names no layer of the unet"):
        model_of(micro, lora_targets=("nothing",))


def one_update(
    model: StableDiffusion, scaler: torch.amp.GradScaler | None = None, units: int = 2
) -> dict[str, float]:
    """A round of two pairs."""
    policy, method = Policy(model, steps=4), D3PO()
    draws = Draws(seed=0, round=0)
    rollout = sample(policy, PROMPTS, draws, images_per_prompt=2, shared_noise=True)
    rollout = replace(rollout, scores=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    rollout = with_reference(policy, rollout, method, untrained=True, batch=8)
    optimizer = torch.optim.AdamW(list(model.trainable().values()), 1e-3)
    rows = method.rows(rollout, stream(0, "rows"))
    updates = Updates(units=units, step_gradients=True)
    return update(policy, method, rows, optimizer, updates, stream(0, "shuffle"), scaler)


def test_gradient_checkpointing_changes_nothing(micro: Path, micro_model: StableDiffusion) -> None:
    saved = model_of(micro, gradient_checkpointing=True)
    norm = one_update(micro_model)["grad_norm"]
    assert norm == pytest.approx(one_update(saved)["grad_norm"], rel=1e-4)
    for name, weight in micro_model.trainable().items():
        torch.testing.assert_close(weight, saved.trainable()[name])


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_keeps_the_adapter_and_the_steps_in_fp32(
    micro: Path, micro_model: StableDiffusion, dtype: str
) -> None:
    model = model_of(micro, dtype=dtype)
    assert {w.dtype for w in model.trainable().values()} == {torch.float32}
    scaler = torch.amp.GradScaler("cpu") if dtype == "fp16" else None
    norm = one_update(model, scaler)["grad_norm"]
    assert norm == pytest.approx(one_update(micro_model)["grad_norm"], rel=0.3)
    assert norm > 0


def test_a_step_whose_gradient_overflows_is_counted_and_is_not_in_the_mean(
    micro_model: StableDiffusion,
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-36)
    found = one_update(micro_model, scaler, units=1)
    assert (found["updates"], found["skipped"]) == (2, 1)
    assert 0 < found["grad_norm"] < math.inf
    assert all(map(math.isfinite, found.values()))

    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=0.9)
    found = one_update(micro_model, scaler, units=1)
    assert (found["updates"], found["skipped"]) == (2, 2)
    assert not any(name.startswith("grad_norm") for name in found)


def test_offline_hub_id_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"nobody/nothing is not on this .*hf download nobody"):
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
    with pytest.raises(UserError, match=r"without a _class_name, .* Known: .*StableDiffusion"):
        load(Source(path=str(tmp_path)), CPU, Training())
    index = json.loads((micro / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet3DConditionModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = "has UNet3DConditionModel as its unet; StableDiffusion needs UNet2DConditionModel"
    with pytest.raises(UserError, match=said):
        load(Source(path=str(tmp_path)), CPU, Training())


def test_decoding_in_slices_is_decoding_at_once(micro: Path) -> None:
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    at_once, sliced = (loaded(micro, decode_batch=n).decode(latents) for n in (8, 2))
    assert difference(at_once, sliced) <= 1
    assert at_once.dtype == torch.uint8


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


# ---- only what was looked at is loaded


def flipped(path: Path) -> None:
    """Change the last bit of the last weight."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", ["none", "unet", "vae", "text_encoder", "added", "gone", "unpinned"]
)
def test_an_embedded_model_that_is_not_as_it_ships_is_refused(damage: str, tmp_path: Path) -> None:
    source = model_source("tiny")
    assert source.pin is not None
    copy = shutil.copytree(source.path, tmp_path / "tiny")
    pin = Path(shutil.copy(source.pin, tmp_path))
    changed = replace(source, path=str(copy), pin=pin)
    if damage == "none":
        assert load(changed, CPU, Training())
        return
    if damage == "added":
        (copy / "tokenizer" / "added_tokens.json").write_text("{}")
    elif damage == "gone":
        (copy / "tokenizer" / "tokenizer.json").unlink()
    elif damage == "unpinned":
        pin.unlink()
    else:
        flipped(next((copy / damage).glob("*.safetensors")))
    with pytest.raises(UserError, match=r"damaged or was exchanged: its sha256 .* Install the pac"):
        load(changed, CPU, Training())


def as_pickle(folder: Path) -> None:
    """Weights of a part as diffusers and transformers once wrote them."""
    (path,) = folder.glob("*.safetensors")
    name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
    torch.save(load_file(path), folder / name)
    path.unlink()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_not_loaded(part: str, micro: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(micro, tmp_path / "copy")
    as_pickle(copy / part)
    with pytest.raises(UserError, match=rf"The {part} of .* does not load.* as \.safetensors: no"):
        load(Source(path=str(copy)), CPU, Training())


def test_a_pickle_beside_the_weights_changes_nothing(micro: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(micro, tmp_path / "copy")
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (copy / name).write_bytes(b"no weights")
    assert fingerprint(Source(path=str(copy))) == fingerprint(Source(path=str(micro)))
    latents = torch.zeros(1, 4, 4, 4)
    assert torch.equal(loaded(copy).decode(latents), loaded(micro).decode(latents))


@pytest.mark.parametrize("full", [True, False])
def test_a_pickled_adapter_is_not_loaded(full: bool, micro: Path, tmp_path: Path) -> None:
    model = model_of(micro, full=full)
    model.save(tmp_path)
    as_pickle(tmp_path / "unet" if full else tmp_path)
    words = r"The LoRA or unet in .* does not fit this model" if full else "no LoRA as .safetensors"
    with pytest.raises(UserError, match=words):
        loaded(micro).load_saved(tmp_path)


# ---- hub ids


@pytest.fixture
def hub(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the model owner/micro, as `hf download` leaves it; its folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--owner--micro"
    (folder / "refs").mkdir(parents=True)
    for commit_ in (OLD, NEW):
        shutil.copytree(micro, folder / "snapshots" / commit_)
    point(folder, OLD)
    return folder


OLD, NEW = "1" * 40, "2" * 40


def point(folder: Path, commit_: str) -> None:
    """Let main be that commit."""
    (folder / "refs" / "main").write_text(commit_)


def test_a_hub_id_is_named_by_the_commit_that_is_loaded(hub: Path) -> None:
    source = model_source("owner/micro")
    assert load(source, CPU, Training()).commit == OLD
    point(hub, NEW)
    assert commit(source) == NEW
    assert commit(replace(source, revision=OLD)) == OLD
    assert commit(model_source("nobody/nothing")) is None
    assert commit(Source(path=str(hub / "snapshots" / OLD))) is None


def test_all_parts_of_a_hub_id_come_from_one_commit(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else fetches a newer main while a run loads."""
    shutil.rmtree(hub / "snapshots" / NEW / "unet")

    def moving(source: Source) -> str | None:
        found = commit(source)
        point(hub, NEW)
        return found

    monkeypatch.setattr("d3po_bench.models.sources.commit", moving)
    assert load(model_source("owner/micro"), CPU, Training()).commit == OLD


def test_a_run_keeps_the_commit_and_resumes_with_it_alone(hub: Path, tmp_path: Path) -> None:
    config = RunConfig(
        method="d3po", objective="incompress", model="owner/micro", rounds=1, eval_every=0,
        prompts_per_round=1, sampling_steps=2,
    )  # fmt: skip
    trainer = trainer_of(config, Execution(device="cpu"))
    assert trainer.inputs["model"] == "owner/micro@main"
    assert trainer.inputs["model_commit"] == OLD
    run = RunStore(tmp_path / "run")
    run.start(config, {"model": "owner/micro@main"})  # of a version that kept no commit
    run.start(config, trainer.inputs)
    assert run.provenance()["inputs"]["model_commit"] == OLD
    with pytest.raises(UserError, match=rf"other inputs: model_commit {OLD}, not {NEW}"):
        run.start(config, {**trainer.inputs, "model_commit": NEW}, after=1)
