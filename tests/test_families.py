"""Every model family against diffusers' own pipeline of its class, at small random sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d3po_bench.cli import main
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.process import VariancePreserving
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import UserError
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.sources import Source, load
from tests import pipelines
from tests.conftest import CPU, disturb

PROMPTS = ["cat", "a dog on a red background"]
STEPS, GUIDANCE = 5, 3.0
NAMES = ("sd1", "sdxl", "sdxl_v", "sd3", "sd35_without_t5")
VARIANTS = ("sdxl_v", "sd35_without_t5")
"""Families that differ from another in what is predicted or encoded alone."""


def families(names: Iterable[str], slow: Collection[str]) -> pytest.MarkDecorator:
    """A test for each of the families, of which some are slow."""
    marked = [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names]
    return pytest.mark.parametrize("family", marked, indirect=True)


class Family(NamedTuple):
    """A pipeline's folder, our untrained model, and diffusers' pipeline with our levels."""

    name: str
    folder: Path
    model: DiffusersModel
    pipe: Any


@pytest.fixture(scope="module", params=NAMES)
def family(
    request: pytest.FixtureRequest, micro: Path, tmp_path_factory: pytest.TempPathFactory
) -> Family:
    return family_of(request.param, micro, tmp_path_factory.mktemp("families"))


def family_of(name: str, micro: Path, root: Path) -> Family:
    makers: dict[str, Callable[[Path], Path]] = {
        "sd1": lambda folder: micro,
        "sdxl": pipelines.sdxl,
        "sdxl_v": lambda folder: pipelines.sdxl(folder, v=True),
        "sd3": pipelines.sd3,
        "sd35_without_t5": lambda folder: pipelines.sd3(folder, v35=True),
    }
    folder = makers[name](root / name)
    return Family(name, folder, model_of(folder), stock_pipe(folder))


def stock_pipe(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {n: None for n, v in index.items() if v == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    if hasattr(pipe, "unet"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_of(folder: Path, **training: Any) -> DiffusersModel:
    model = load(Source(path=str(folder)), CPU, Training(**training))
    assert isinstance(model, DiffusersModel)
    model.add_adapter(seed=0)
    return model


def our_latents(model: DiffusersModel) -> tuple[Tensor, Tensor]:
    """Noise, and what our ODE sampler makes of it."""
    policy = Policy(model, steps=STEPS, eta=0.0, guidance=GUIDANCE, sampler="ddim")
    latents = sample(policy, PROMPTS, Draws(seed=0, round=0)).latents[:, 0]
    return latents[:, 0], latents[:, -1]


def stock(pipe: Any, noise: Tensor, output_type: str = "latent") -> Any:
    return pipe(
        PROMPTS, latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        output_type=output_type,
    ).images  # fmt: skip


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def test_the_ode_and_the_pictures_are_the_pipelines(family: Family) -> None:
    model = family.model
    noise, ours = our_latents(model)
    assert gap(ours, stock(family.pipe, noise)) <= 1e-4
    pictures = torch.from_numpy(stock(family.pipe, noise, "np")).permute(0, 3, 1, 2)
    assert pictures.std() > 0.05
    assert gap(model.decode(ours) / 255, pictures) <= 1 / 255


@families(NAMES, slow=VARIANTS)
def test_pictures_become_the_latents_that_the_decoder_takes(family: Family) -> None:
    model = model_of(family.folder)
    pictures = model.decode(torch.randn(3, *model.latent_shape))
    found = model.vae.encode(pictures.float() / 127.5 - 1)
    expected = found.latents if hasattr(found, "latents") else found.latent_dist.mean
    torch.testing.assert_close(model._latents(model.encode_pictures(pictures)), expected)


def test_encode_is_the_pipelines_also_of_a_prompt_that_is_cut(family: Family) -> None:
    model, pipe = model_of(family.folder, long_prompts="cut"), family.pipe
    prompts = [*PROMPTS, "cat dog " * 200]
    shared = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    others = {"prompt_2": None, "prompt_3": None} if "sd3" in family.name else {}
    with torch.no_grad():
        text, negative, *pooled = pipe.encode_prompt(prompts, **others, **shared)
    ours, empty = model.encode(prompts), model.unconditional()
    assert set(ours.tensors) == ({"text", "pooled"} if pooled else {"text"})
    assert gap(ours["text"], text) <= 1e-5
    assert gap(empty["text"], negative[:1]) <= 1e-5
    if pooled:
        assert gap(ours["pooled"], pooled[0]) <= 1e-5
        assert gap(empty["pooled"], pooled[1][:1]) <= 1e-5
    assert (gap(empty["text"], torch.zeros_like(empty["text"])) == 0) == (family.name == "sdxl")


@families(NAMES, slow=VARIANTS)
def test_one_at_a_time_is_eight_at_once(family: Family) -> None:
    model = family.model
    prompts = ["cat", "dog", "red", "a", "on a", "a cat", "a dog", "background"]
    together = model.encode(prompts)
    alone = model_of(family.folder)
    x = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    s = Policy(model, steps=8).levels[:8]
    with torch.no_grad():
        at_once = model.output(x, s, together)
        for i, prompt in enumerate(prompts):
            one = alone.encode([prompt])
            for name, tensor in one.tensors.items():
                assert gap(tensor, together[name][i : i + 1]) <= 1e-5
            assert gap(alone.output(x[i : i + 1], s[i : i + 1], one), at_once[i : i + 1]) <= 1e-5


@families(NAMES, slow=VARIANTS)
def test_a_lora_draws_the_same_in_the_pipeline(family: Family, tmp_path: Path) -> None:
    model = model_of(family.folder, lora_alpha=8.0)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    s, conditions = Policy(model, steps=8).levels[2:4], model.encode(PROMPTS)
    with torch.no_grad():
        before = model.output(x, s, conditions)
        disturb(model, 0.1)
        assert gap(model.output(x, s, conditions), before) > 0.1
        assert torch.equal(model.output(x, s, conditions, weights="base"), before)
    model.save(tmp_path)
    noise, ours = our_latents(model)
    again = load(Source(path=str(family.folder)), CPU, Training())
    assert isinstance(again, DiffusersModel)
    again.load_saved(tmp_path)
    assert gap(our_latents(again)[1], ours) <= 1e-4
    base = stock(family.pipe, noise)
    family.pipe.load_lora_weights(tmp_path)
    drawn = stock(family.pipe, noise)
    family.pipe.unload_lora_weights()
    assert gap(drawn, ours) <= 1e-4
    assert gap(drawn, base) > 0.1


def test_a_lora_of_other_trainers_for_sdxl(tmp_path: Path) -> None:
    """Kohya's names are those of the original code, with scales beside the tensors."""
    folder = pipelines.sdxl(tmp_path / "sdxl")
    model = model_of(folder)
    disturb(model, 0.1)
    model.save(tmp_path / "ours")
    blocks = {
        "down_blocks.1.attentions.0": "input_blocks_3_1",
        "mid_block.attentions.0": "middle_block_1",
        "up_blocks.0.attentions.0": "output_blocks_0_1",
        "up_blocks.0.attentions.1": "output_blocks_1_1",
    }
    theirs = {}
    for name, weight in load_file(tmp_path / "ours" / "pytorch_lora_weights.safetensors").items():
        layer, _, part = name.removeprefix("unet.").partition(".lora_")
        for block, other in blocks.items():
            layer = layer.replace(block, other)
        stem = "lora_unet_" + layer.replace(".", "_")
        theirs[f"{stem}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = weight * 2**0.5
        theirs[f"{stem}.alpha"] = torch.tensor(2.0)  # of rank 4
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    again = load(Source(path=str(folder)), CPU, Training())
    assert isinstance(again, DiffusersModel)
    again.load_saved(tmp_path / "theirs")
    assert gap(our_latents(again)[1], our_latents(model)[1]) <= 1e-4


@families(NAMES, slow=VARIANTS)
def test_a_fully_trained_network_is_read_again(family: Family, tmp_path: Path) -> None:
    model = model_of(family.folder, full=True)
    disturb(model, 0.02)
    model.save(tmp_path)
    again = load(Source(path=str(family.folder)), CPU, Training())
    assert isinstance(again, DiffusersModel)
    again.load_saved(tmp_path)
    assert gap(our_latents(again)[1], our_latents(model)[1]) <= 1e-5


@families(NAMES, slow=VARIANTS)
def test_half_precision_is_near(family: Family) -> None:
    full, half = family.model, model_of(family.folder, dtype="bf16")
    x = torch.randn(2, *full.latent_shape, generator=torch.Generator().manual_seed(0))
    s = Policy(full, steps=8).levels[2:4]
    with torch.no_grad():
        exact, rounded = (m.output(x, s, m.encode(PROMPTS)) for m in (full, half))
    assert torch.equal(half.decode(x), full.decode(x))  # the VAE stays in float32
    assert rounded.dtype == torch.float32
    assert gap(rounded, exact) < 0.1 * float(exact.std())


# numpy's and torch's, in the Euler scheduler
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize("config", [pipelines.SD15_SCHEDULER, pipelines.SDXL_SCHEDULER])
@pytest.mark.parametrize("steps", [5, 7, 20, 50])
def test_our_levels_are_those_of_published_configs(config: dict[str, Any], steps: int) -> None:
    ddim = diffusers.DDIMScheduler.from_config(config)
    process = VariancePreserving(ddim.alphas_cumprod)
    levels = process.levels(steps)
    ddim.set_timesteps(steps)
    assert torch.equal(levels[:-1], ddim.timesteps)
    assert process.squares(levels[-1:])[0] == ddim.final_alpha_cumprod
    euler = diffusers.EulerDiscreteScheduler.from_config(
        pipelines.SDXL_SCHEDULER | config, timestep_spacing="leading"
    )
    euler.set_timesteps(steps)
    assert torch.equal(levels[:-1], euler.timesteps.long())


# ---- the command line


SETTINGS = {
    "dtype": "fp32", "prompts_per_round": 4, "sampling_steps": 4, "units_per_update": 4,
    "learning_rate": 1e-3, "eval_every": 3, "eval_prompts": 2, "eval_images": 1, "threads": 1,
}  # fmt: skip


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status of a command, and what it says on stderr."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


def run_of(folder: Path, out: Path, method: str, **settings: Any) -> list[str]:
    sets = [f"--set={name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    return [
        "run", "--method", method, "--objective", "incompress", "--model", str(folder), "--preset",
        "official_code", "--rounds", "3", "--device", "cpu", "--out", str(out), *sets,
    ]  # fmt: skip


def check_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three rounds of finite numbers in a run folder that evaluates."""
    (config,) = out.rglob("config.json")
    lines = (config.parent / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["round"] for row in rows] == [1, 2, 3]
    values = torch.tensor([v for row in rows for v in row.values() if isinstance(v, int | float)])
    assert values.isfinite().all()
    # Pictures of random networks can be of one size, and then a round teaches nothing.
    assert any(row["grad_norm"] > 0 for row in rows)
    asked = ["evaluate", str(config.parent), "--scorers", "jpeg_size", "--count", "2"]
    code, said = command(capsys, *asked, "--steps", "4", "--device", "cpu")
    assert code == 0, said
    assert len((config.parent / "evaluation" / "rows.csv").read_text().splitlines()) == 1 + 2 * 2


@families([n for n in NAMES if n != "sdxl_v"], slow=("sd1", "sd3", "sd35_without_t5"))
@pytest.mark.parametrize("method", ["d3po", pytest.param("ddpo", marks=pytest.mark.slow)])
def test_three_rounds(
    family: Family, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = command(capsys, *run_of(family.folder, tmp_path, method))
    assert code == 0, said
    check_run(tmp_path, capsys)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd3(tmp_path_factory.mktemp("sd3") / "sd3")


@pytest.mark.parametrize("sampler", ["cps", pytest.param("ddim", marks=pytest.mark.slow)])
def test_a_flow_without_noise_in_the_last_step(
    sampler: str, sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"sampler": sampler, "eta": 0.7, "gradient_checkpointing": "true"}
    code, said = command(capsys, *run_of(sd3, tmp_path / "all", "d3po", **given))
    assert code == 2
    assert "Step 4 of 4 adds no noise" in said
    assert "--set skip_steps=1." in said
    code, said = command(capsys, *run_of(sd3, tmp_path / "skip", "d3po", **given, skip_steps=1))
    assert code == 0, said
    check_run(tmp_path / "skip", capsys)


# ---- what is refused


def changed(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a pipeline with other values in one of its JSON files."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return copy


INDEX, LEVELS = "model_index.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("name", "file", "values", "words"),
    [
        ("sdxl", INDEX, {"text_encoder_2": [None, None]}, "nothing as its text_encoder_2; .*CLIP"),
        ("sdxl", INDEX, {"scheduler": [None, None]}, "nothing as its scheduler; .* needs one"),
        ("sdxl", INDEX, {"_class_name": "FluxPipeline"}, "FluxPipeline, which no .*StableDiff"),
        ("sdxl", LEVELS, {"prediction_type": "sample"}, "predicts 'sample' .*only epsilon and v_"),
        ("sdxl", INDEX, {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "for a EDMEulerSched"),
        ("sdxl", INDEX, {"_class_name": "StableDiffusionPipeline"}, "does not use: text_encoder_2"),
        ("sd3", INDEX, {"text_encoder": [None, None]}, "nothing as its text_encoder; "),
        ("sd3", INDEX, {"scheduler": ["diffusers", "DDIMScheduler"]}, "DDIMScheduler .* FlowMatch"),
        ("sd3", LEVELS, {"use_karras_sigmas": True}, "sets use_karras_sigmas"),
    ],
)
def test_other_shapes_are_refused(
    name: str, file: str, values: dict[str, Any], words: str, sd3: Path, tmp_path: Path
) -> None:
    folder = sd3 if name == "sd3" else pipelines.sdxl(tmp_path / "sdxl")
    with pytest.raises(UserError, match=words) as refusal:
        load(Source(path=str(changed(folder, tmp_path / "other", file, **values))), CPU, Training())
    assert "\n" not in str(refusal.value)


def test_too_long_prompts_are_refused(sd3: Path) -> None:
    model = model_of(sd3)
    with pytest.raises(UserError) as refusal:
        model.encode(["cat " * 17, "cat", *(f"{n} " + "dog " * 14 for n in range(70))])
    said = str(refusal.value)
    assert said.startswith("71 of 72 prompts have more tokens than the text encoder reads: 'cat ")
    assert "'cat cat cat cat cat cat cat cat cat cat ' has 17 of 14, '0 dog" in said
    assert said.count(" of 14") == 5
    assert ", and 66 more. Shorten them, or have them cut: --set long_prompts=cut" in said


def test_each_tokenizer_counts(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(sd3)
    monkeypatch.setattr(type(model), "TOKENS", {"tokenizer_3": 8})
    with pytest.raises(UserError, match=r"1 of 1 prompts .*: 'background' has 11 of 7\. "):
        model.encode(["background", ""])
