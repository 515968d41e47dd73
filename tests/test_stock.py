"""Pipelines and LoRAs as people have them: drawn as diffusers draws them, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import RunError, UserError
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.sources import Source, load, model_source
from eval.evaluate.plan import EvaluateRequest, planned
from tests import pipelines
from tests.conftest import CPU

# numpy's and torch's in some schedulers, and diffusers' own of outdated configs
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
    pytest.mark.filterwarnings("ignore:The configuration file of:FutureWarning"),
]

PROMPTS = ["cat", "a dog on a red background"]
GUIDANCE, STEPS = 3.0, 3
"""Three steps do not divide 1000: schedules round in their own ways."""

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LEVELS = "scheduler/scheduler_config.json"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one pipeline of each family."""
    root = tmp_path_factory.mktemp("originals")
    pipelines.sd(root / "sd1")
    pipelines.sd(root / "sd2", two=True)
    pipelines.sdxl(root / "sdxl")
    return root


def ours(folder: Path, lora: Path | None = None) -> Tensor:
    """[2, 3, h, w] uint8 without noise in the steps."""
    model = load(model_source(str(folder)), CPU, Training())
    assert isinstance(model, DiffusersModel)
    if lora:
        model.load_saved(lora)
    policy = Policy(model, steps=STEPS, eta=0.0, guidance=GUIDANCE)
    return model.decode(sample(policy, PROMPTS, Draws(seed=0, round=0)).latents[:, 0, -1])


def stock(folder: Path, lora: Path | None = None, variant: str | None = None) -> Tensor:
    """The same by diffusers alone: DDIM with the levels and timesteps of the folder's scheduler."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, variant=variant, dtype=torch.float32)
    ddim = diffusers.DDIMScheduler.from_config({"clip_sample": False, **pipe.scheduler.config})
    pipe = type(pipe)(**pipe.components | {"scheduler": ddim})
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    size = pipe.unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else size
    draws = Draws(seed=0, round=0)
    images = pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
        latents=draws.start(range(2), 1, False, (4, *sides))[:, 0],
    ).images  # fmt: skip
    found: Tensor = images.mul(255).round().to(torch.uint8)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Whether pictures that are not all of one colour are equal to 1/255."""
    assert b.float().std() > 2
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


# ---- what is changed in a pipeline's folder


Change = Callable[[Path], object]


def config(file: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def scheduler(kind: str, **values: Any) -> Change:
    """Another scheduler, saved by diffusers with its own defaults."""

    def change(folder: Path) -> None:
        getattr(diffusers, kind)(**BETAS, **values).save_pretrained(folder / "scheduler")
        config("model_index.json", scheduler=["diffusers", kind])(folder)

    return change


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def renamed(file: str, rename: Callable[[str], str], **more: Tensor) -> Change:
    """Other names for the tensors of a file, and more of them."""

    def change(folder: Path) -> None:
        tensors = {rename(name): tensor for name, tensor in load_file(folder / file).items()}
        save_file({**tensors, **more}, folder / file, metadata={"format": "pt"})

    return change


def without(file: str, start: str) -> Change:
    def change(folder: Path) -> None:
        kept = {n: t for n, t in load_file(folder / file).items() if not n.startswith(start)}
        save_file(kept, folder / file, metadata={"format": "pt"})

    return change


def old_attention(name: str) -> str:
    """The names of a VAE's attention before diffusers 0.18."""
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                      ("to_out.0", "proj_attn")):  # fmt: skip
        name = name.replace(f"attentions.0.{now}", f"attentions.0.{then}")
    return name


def sharded(folder: Path) -> None:
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        network = kind.from_pretrained(folder / part)
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
        network.save_pretrained(folder / part, max_shard_size="20KB")
        assert len(list((folder / part).glob("*.safetensors"))) > 1


def shard_lacks_a_tensor(folder: Path) -> None:
    sharded(folder)
    file = sorted((folder / "unet").glob("*.safetensors"))[0]
    without(f"unet/{file.name}", next(iter(load_file(file))))(folder)


def half(folder: Path, **given: Any) -> None:
    """What is left where only the half-precision files were fetched."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, variant="fp16", **given)


def half_in_shards(folder: Path) -> None:
    half(folder, max_shard_size="20KB")


def with_an_adapter(folder: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.unet.save_pretrained(folder / "unet")


def unet(**values: Any) -> Change:
    """A UNet of another shape, of random weights."""

    def change(folder: Path) -> None:
        kind = diffusers.UNet2DConditionModel
        settings = kind.load_config(folder / "unet")
        kind.from_config(settings | values).save_pretrained(folder / "unet")

    return change


PREFIXED = renamed(
    TEXT, lambda name: f"text_model.{name.removeprefix('text_model.')}",
    **{"text_model.embeddings.position_ids": torch.arange(16).unsqueeze(0)},
)  # fmt: skip

DRAWN: dict[str, tuple[str, Change]] = {
    "sd1": ("sd1", lambda folder: None),
    "sd2": ("sd2", lambda folder: None),
    "sdxl": ("sdxl", lambda folder: None),
    "offset 0": ("sd1", config(LEVELS, steps_offset=0)),
    "offset 0 in sdxl": ("sdxl", config(LEVELS, steps_offset=0)),
    "clipping by default": ("sd1", config(LEVELS, clip_sample=True)),
    "ends without noise": ("sd1", config(LEVELS, set_alpha_to_one=True)),
    "zero terminal snr": (
        "sd2", scheduler("DDIMScheduler", prediction_type="v_prediction", **ZERO_SNR)
    ),
    "zero terminal snr, euler": (
        "sdxl", scheduler("EulerDiscreteScheduler", prediction_type="v_prediction", **ZERO_SNR)
    ),
    "trailing": ("sd1", scheduler("EulerDiscreteScheduler", timestep_spacing="trailing")),
    "linspace": ("sd1", scheduler("EulerAncestralDiscreteScheduler")),
    "dpm++": ("sd1", scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)),
    "unipc": ("sdxl", scheduler("UniPCMultistepScheduler")),
    "ddpm": ("sd1", scheduler("DDPMScheduler", clip_sample=False)),
    "500 timesteps": ("sd1", scheduler("DDIMScheduler", num_train_timesteps=500)),
    "shards": ("sd1", sharded),
    "fp16 alone": ("sd1", half),
    "fp16 alone, shards": ("sdxl", half_in_shards),
    "old names": ("sd1", renamed(VAE, old_attention)),
    "text_model": ("sd1", PREFIXED),
    "a wide picture": ("sd1", config("unet/config.json", sample_size=[4, 8])),
}  # fmt: skip


SLOW = (
    "offset 0 in sdxl", "zero terminal snr, euler", "unipc", "dpm++", "ddpm", "500 timesteps",
    "shards", "fp16 alone", "text_model",
)  # fmt: skip
"""Near another of those above."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in DRAWN]
)
def test_a_pipeline_is_drawn_as_by_diffusers(name: str, originals: Path, tmp_path: Path) -> None:
    family, change = DRAWN[name]
    folder = shutil.copytree(originals / family, tmp_path / "model")
    change(folder)
    variant = "fp16" if "fp16" in name else None
    assert same(ours(folder), stock(folder, variant=variant))


REFUSED: dict[str, tuple[str, Change, str]] = {
    "inpainting": ("sd1", unet(in_channels=9), "takes 9 channels and gives 4.*picture or a mask"),
    "editing": ("sd1", unet(in_channels=8), "takes 8 channels and gives 4.*picture or a mask"),
    "no size": ("sd1", config("unet/config.json", sample_size=None), 'Set "sample_size" there'),
    "no block": (
        "sd1", without(UNET, "up_blocks.1"),
        "unet of .* files lack up_blocks.1.attentions.0.norm.bias, .* and 73 more tensors"
    ),
    "no norm": ("sd1", without(TEXT, "final_layer_norm"), "text_encoder .*files lack"),
    "no bias": ("sd1", without(VAE, "post_quant_conv.b"), "vae .*lack post_quant_conv.bias"),
    "no tensor in a shard": ("sd1", shard_lacks_a_tensor, "unet of .* files lack "),
    "one tensor more": (
        "sd1", renamed(UNET, str, extra=torch.zeros(1)), "have extra, for which it has no place"
    ),
    "an adapter on": ("sd1", with_an_adapter, r"saved with a LoRA on it. Call fuse_lora\(\)"),
    "sample": ("sd1", config(LEVELS, prediction_type="sample"), "predicts 'sample'"),
    "lcm": ("sd1", unet(time_cond_proj_dim=8), r"guidance as an embedding.*time_cond_proj_dim 8"),
    "labels": ("sd1", unet(num_class_embeds=3), r"class labels \(num_class_embeds 3\)"),
    "thresholding": ("sd1", config(LEVELS, thresholding=True), "thresholding True"),
    "clipping in sdxl": ("sdxl", config(LEVELS, clip_sample=True), "clip_sample True"),
    "a mask": ("sd1", config("text_encoder/config.json", use_attention_mask=True), "padded tokens"),
    "noise at zero snr": ("sd1", scheduler("DDIMScheduler", **ZERO_SNR), "predicts noise, and"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_cannot_be_followed_is_refused(
    name: str, originals: Path, tmp_path: Path
) -> None:
    family, change, words = REFUSED[name]
    folder = shutil.copytree(originals / family, tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=words) as refusal:
        ours(folder)
    assert "\n" not in str(refusal.value)


def test_an_outdated_size_is_corrected_as_by_diffusers(originals: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(originals / "sd1", tmp_path / "model")
    config("unet/config.json", _diffusers_version="0.6.0", sample_size=32)(folder)
    assert load(Source(path=str(folder)), CPU, Training()).latent_shape == (4, 64, 64)


def test_a_vae_that_overflows_stops_the_run(originals: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(originals / "sd1", tmp_path / "model")
    tensors = load_file(folder / VAE)
    tensors["decoder.conv_out.bias"].fill_(torch.inf)
    save_file(tensors, folder / VAE, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"The VAE of this model \(AutoencoderKL\) overflows"):
        ours(folder)


# ---- LoRAs


Layers = dict[str, Tensor]


def adapted(folder: Path, **settings: Any) -> tuple[Any, Layers]:
    """A pipeline with a random LoRA on its UNet, and the LoRA's tensors in peft's names."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    given = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "to_out.0"]}
    pipe.unet.add_adapter(LoraConfig(**given | settings))
    return pipe, stirred(pipe.unet)


def stirred(network: nn.Module) -> Layers:
    rng = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=rng) * 0.3
    found: Layers = get_peft_model_state_dict(network)
    return found


def diffusers_names(folder: Path, to: Path) -> None:
    pipe, layers = adapted(folder)
    pipe.save_lora_weights(to, unet_lora_layers=layers)


def alpha_in_the_metadata(folder: Path, to: Path) -> None:
    pipe, layers = adapted(folder, lora_alpha=2)
    metadata = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(to, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)


def saved(layers: Layers, to: Path, name: str = "my_style_v1.safetensors") -> None:
    to.mkdir()
    save_file(layers, to / name, metadata={"format": "pt"})


def kohya(layers: Layers) -> Layers:
    found = {}
    for name, weight in layers.items():
        stem, part, _ = name.rsplit(".", 2)
        stem = "lora_unet_" + stem.replace(".", "_")
        found[f"{stem}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = weight
        found[f"{stem}.alpha"] = torch.tensor(2.0)
    return found


def kohya_names(folder: Path, to: Path) -> None:
    saved(kohya(adapted(folder)[1]), to)


def kohya_conv(folder: Path, to: Path) -> None:
    saved(kohya(adapted(folder, target_modules=["to_k", "conv1", "proj_in"])[1]), to)


def processor_names(folder: Path, to: Path) -> None:
    found = {}
    for name, weight in adapted(folder)[1].items():
        stem, part, _ = name.rsplit(".", 2)
        block, layer = stem.removesuffix(".0").rsplit(".", 1)
        side = "down" if part == "lora_A" else "up"
        found[f"unet.{block}.processor.{layer}_lora.{side}.weight"] = weight
    saved(found, to, "pytorch_lora_weights.safetensors")


def dora(folder: Path, to: Path) -> None:
    pipe, layers = adapted(folder, use_dora=True)
    pipe.save_lora_weights(to, unet_lora_layers=layers)


def text_encoder_too(folder: Path, to: Path) -> None:
    pipe, layers = adapted(folder)
    pipe.text_encoder.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "fc1"]))
    text = stirred(pipe.text_encoder)
    pipe.save_lora_weights(to, unet_lora_layers=layers, text_encoder_lora_layers=text)


FORMATS: list[Callable[[Path, Path], None]] = [
    diffusers_names, alpha_in_the_metadata, kohya_conv, processor_names, text_encoder_too,
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (kohya_names, "sd1"),
        (dora, "sd1"),
        (text_encoder_too, "sdxl"),
        *(pytest.param(make, "sd1", marks=pytest.mark.slow) for make in FORMATS),
    ],
)
def test_a_lora_is_drawn_as_by_diffusers(
    make: Callable[[Path, Path], None], family: str, originals: Path, tmp_path: Path
) -> None:
    folder, lora = originals / family, tmp_path / "lora"
    make(folder, lora)
    (file,) = lora.iterdir()
    expected = stock(folder, file)
    assert same(ours(folder, lora if family == "sd1" else file), expected)
    assert not same(ours(folder), expected)


def test_evaluate_takes_a_lora_by_its_folder_or_its_file(originals: Path, tmp_path: Path) -> None:
    saved(kohya(adapted(originals / "sd1")[1]), tmp_path / "lora")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    content = set()
    for target in (tmp_path / "lora", tmp_path / "lora" / "my_style_v1.safetensors"):
        request = EvaluateRequest(
            target=target, scorers=("jpeg_size",), model=str(originals / "sd1"), images=1,
            prompts=str(tmp_path / "two.txt"), count=None, steps=4, guidance=None, device="cpu",
            jobs=1, out=None,
        )  # fmt: skip
        plan = planned(request)
        assert (plan.model, plan.adapter) == (str(originals / "sd1"), str(target))
        content.add(plan.content)
    assert len(content) == 2
    assert all(len(name) == len("0123456789ab + 0123456789ab") for name in content)


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_the_drift_of_a_lora_on_text_encoders_is_from_the_untouched_ones(
    family: str, originals: Path, tmp_path: Path
) -> None:
    folder, lora = originals / family, tmp_path / "lora"
    text_encoder_too(folder, lora)
    plain, other = (load(Source(path=str(folder)), CPU, Training()) for _ in range(2))
    other.load_saved(lora)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    s = torch.full((2,), 500)
    with torch.no_grad():
        base = Policy(plain).output(x, s, plain.encode(PROMPTS))
        tuned = Policy(other).output(x, s, other.encode(PROMPTS))
        without = Policy(other).output(x, s, other.encode(PROMPTS), weights="base")
    assert torch.equal(without, base)
    assert (tuned - base).abs().max() > 0.1


def of_another_model(layers: Layers) -> Layers:
    return {
        f"unet.{name.replace('down_blocks.0', 'down_blocks.7')}": layers[name] for name in layers
    }


def without_a_tensor(layers: Layers) -> Layers:
    return {f"unet.{name}": layers[name] for name in list(layers)[1:]}


def without_a_part(layers: Layers) -> Layers:
    return dict(layers)


def with_a_dora_scale(layers: Layers) -> Layers:
    found = kohya(layers)
    stems = {name.split(".")[0] for name in found}
    return found | {f"{stem}.dora_scale": torch.ones(1) for stem in stems}


def lokr(layers: Layers) -> Layers:
    return {"unet.mid_block.attentions.0.proj_in.lokr_w1": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_another_model, "takes .* of its .* tensors.* does not fit|does not fit.* tensors"),
        (without_a_tensor, "does not fit this model"),
        (without_a_part, "takes 0 of its"),
        (with_a_dora_scale, "leaves out the dora_scale"),
        (lokr, "does not fit this model"),
    ],
)
def test_a_lora_of_which_something_would_be_left_out_is_refused(
    change: Callable[[Layers], Layers], words: str, originals: Path, tmp_path: Path
) -> None:
    saved(change(adapted(originals / "sd1")[1]), tmp_path / "lora")
    with pytest.raises(UserError, match=words) as refusal:
        ours(originals / "sd1", tmp_path / "lora")
    assert "\n" not in str(refusal.value)


def test_one_of_several_files_has_to_be_named(originals: Path, tmp_path: Path) -> None:
    layers = kohya(adapted(originals / "sd1")[1])
    saved(layers, tmp_path / "lora", "a.safetensors")
    save_file(layers, tmp_path / "lora" / "b.safetensors")
    with pytest.raises(UserError, match=r"can be the LoRA: a.safetensors, b.safetensors\. G"):
        ours(originals / "sd1", tmp_path / "lora")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(UNET, "conv_in.bias"), "its files lack conv_in.bias"),
        (config("unet/config.json", attention_head_dim=4), "config.json differs in attention_head"),
    ],
)
def test_a_trained_network_that_is_not_of_the_model_is_refused(
    change: Change, words: str, originals: Path, tmp_path: Path
) -> None:
    shutil.copytree(originals / "sd1" / "unet", tmp_path / "trained" / "unet")
    change(tmp_path / "trained")
    with pytest.raises(UserError, match=rf"The LoRA or unet in .* does not fit.*{words}"):
        ours(originals / "sd1", tmp_path / "trained")


# ---- a model in one file


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("anime-v5.safetensors", "model.diffusion_model.out.0.bias", "StableDiffusionPipeline"),
        ("xl.safetensors", "conditioner.embedders.1.model.ln_final.bias", "StableDiffusionXLP"),
        ("three.safetensors", "model.diffusion_model.joint_blocks.0.x", "StableDiffusion3Pipe"),
        ("old.ckpt", "model.diffusion_model.out.0.bias", "StableDiffusionPipeline"),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_a_model_in_one_file_is_told_how_to_become_a_folder(
    name: str, tensor: str, kind: str, within: bool, tmp_path: Path
) -> None:
    file = tmp_path / name
    write = torch.save if file.suffix == ".ckpt" else save_file
    write({tensor: torch.zeros(1)}, file)
    words = (
        rf"import {kind}.* as P; P.from_single_file\(\'{file}\'\)\.save_pretrained.* --model FOLD"
    )
    with pytest.raises(UserError, match=words):
        ours(tmp_path if within else file)
