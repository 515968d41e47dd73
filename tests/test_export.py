"""A run's LoRA as other programs look it up, and the card beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.exchange import Form, facts_of, file_bytes, renamed
from d3po_bench.models.lora import NAME
from d3po_bench.models.sources import Source, load
from tests import pipelines
from tests.commands import Command, contents, refused
from tests.conftest import CPU, disturb

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
    pytest.mark.filterwarnings("ignore:The configuration file of:FutureWarning"),
]

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd1": pipelines.sd,
    "sd2": lambda folder: pipelines.sd(folder, two=True),
    "sdxl": pipelines.sdxl,
    "sd3": pipelines.sd3,
}

# ---- what the loaders of other programs look up, restated from their sources

ATTENTION = ("norm.weight", "proj_in.weight", "proj_out.weight")
TRANSFORMER = (
    "norm1.weight", "norm2.weight", "norm3.weight", "attn1.to_q.weight", "attn1.to_k.weight",
    "attn1.to_v.weight", "attn1.to_out.0.weight", "attn2.to_q.weight", "attn2.to_k.weight",
    "attn2.to_v.weight", "attn2.to_out.0.weight", "ff.net.0.proj.weight", "ff.net.2.weight",
)  # fmt: skip
"""ComfyUI, comfy/utils.py: UNET_MAP_ATTENTIONS and TRANSFORMER_BLOCKS, the weights of them."""


def unet_to_diffusers(depths: list[int], middle: int, per_block: int = 2) -> dict[str, str]:
    """ComfyUI, comfy/utils.py, its attentions: name in diffusers -> name in the first release.

    Args:
        depths: transformer blocks in each attention of a block, from the first down block.
        middle: the same of the middle block.
        per_block: attentions of a down block; an up block has one more.
    """
    found: dict[str, str] = {}

    def attention(ours: str, theirs: str, depth: int) -> None:
        for name in ATTENTION if depth else ():
            found[f"{ours}.{name}"] = f"{theirs}.{name}"
        for t in range(depth):
            for name in TRANSFORMER:
                inner = f"transformer_blocks.{t}.{name}"
                found[f"{ours}.{inner}"] = f"{theirs}.{inner}"

    for x, depth in enumerate(depths):
        n = 1 + (per_block + 1) * x
        for i in range(per_block):
            attention(f"down_blocks.{x}.attentions.{i}", f"input_blocks.{n + i}.1", depth)
    attention("mid_block.attentions.0", "middle_block.1", middle)
    for x, depth in enumerate(reversed(depths)):
        n = (per_block + 1) * x
        for i in range(per_block + 1):
            attention(f"up_blocks.{x}.attentions.{i}", f"output_blocks.{n + i}.1", depth)
    return found


def underscored(name: str) -> str:
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


def comfyui(names: dict[str, str]) -> set[str]:
    """ComfyUI, comfy/lora.py, model_lora_keys_unet: what the keys of a UNet begin with."""
    found = {underscored(n) for n in names.values()} | {underscored(n) for n in names}
    for name in names:
        stem = name.removesuffix(".weight").replace(".to_", ".processor.to_")
        stem = stem.removesuffix(".0") if stem.endswith(".to_out.0") else stem
        found |= {stem, f"unet.{stem}"}
    return found


def kohya(names: dict[str, str], *, xl: bool) -> set[str]:
    """sd-scripts, networks/lora.py: its UNet has diffusers' names, that of SDXL the first's."""
    return {underscored(n) for n in (names.values() if xl else names)}


COMFYUI_SD3 = {
    f"transformer.transformer_blocks.{block}.attn.{layer}"
    for block in range(2)
    for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                  "to_add_out")
}  # fmt: skip
"""ComfyUI, comfy/utils.py, mmdit_to_diffusers, with the prefix of comfy/lora.py."""

SUFFIXES = {
    "kohya": {"lora_up.weight", "lora_down.weight", "alpha"},
    "comfyui": {"lora_up.weight", "lora_down.weight", "alpha", "lora_A.weight", "lora_B.weight"},
}
"""networks/lora.py; comfy/lora.py, load_lora."""


def split(name: str) -> tuple[str, str]:
    """What a program looks up, and which tensor of it this is."""
    suffix = next(s for s in sorted(SUFFIXES["comfyui"]) if name.endswith(f".{s}"))
    return name.removesuffix(f".{suffix}"), suffix


# ---- real shapes


def published(folder: Path, *, xl: bool) -> Path:
    """A pipeline with the blocks of SDXL base or Stable Diffusion 1.5, as narrow as can be."""
    pipelines.sdxl(folder) if xl else pipelines.sd(folder)
    kind = diffusers.UNet2DConditionModel
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    shape: dict[str, Any] = {"transformer_layers_per_block": 1}
    if xl:
        down = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
        shape = {"transformer_layers_per_block": [1, 2, 10]}
    up = [name.replace("Down", "Up") for name in reversed(down)]
    settings = kind.load_config(folder / "unet") | {
        "down_block_types": down, "up_block_types": up, "block_out_channels": [8] * len(down),
        "layers_per_block": 2, "attention_head_dim": 2, **shape,
    }  # fmt: skip
    kind.from_config(settings).save_pretrained(folder / "unet")
    return folder


def lora_on(folder: Path, **training: Any) -> dict[str, Tensor]:
    """What a run on a pipeline saves."""
    model = load(Source(path=str(folder)), CPU, Training(**training))
    assert isinstance(model, DiffusersModel)
    model.add_adapter(0)
    disturb(model, 0.3)
    model.save(folder / "lora")
    return load_file(folder / "lora" / NAME)


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_name_is_one_that_comfyui_and_kohyas_tools_look_up(xl: bool, tmp_path: Path) -> None:
    folder = published(tmp_path / "model", xl=xl)
    layers = lora_on(folder, lora_rank=1)
    names = unet_to_diffusers([0, 2, 10] if xl else [1, 1, 1, 0], 10 if xl else 1)
    known = {"comfyui": comfyui(names), "kohya": kohya(names, xl=xl)}
    forms: tuple[Form, ...] = ("comfyui", "kohya")
    for form in forms:
        found = renamed(layers, form, Source(path=str(folder)))
        assert len(found) == len(layers) / 2 * 3
        assert {split(name)[0] for name in found} <= known[form]
        assert {split(name)[1] for name in found} == SUFFIXES["kohya"]
        for name, tensor in layers.items():  # and it is the layer of that name
            path = name.removeprefix("unet.").removesuffix(".lora_A.weight")
            if name.endswith("lora_A.weight"):
                own = names[f"{path}.weight"] if xl and form == "kohya" else path
                assert torch.equal(found[f"{underscored(own)}.lora_down.weight"], tensor)


def test_comfyui_looks_up_the_names_of_sd3(tmp_path: Path) -> None:
    folder = pipelines.sd3(tmp_path / "model")
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    layers = lora_on(folder, lora_targets=targets)
    found = renamed(layers, "comfyui", Source(path=str(folder)))
    assert {split(name)[0] for name in found} <= COMFYUI_SD3
    with pytest.raises(UserError, match=r"no names .* StableDiffusion3.* --format comfyui or diff"):
        renamed(layers, "kohya", Source(path=str(folder)))


def test_layers_that_kohyas_tools_do_not_train_are_refused(tmp_path: Path) -> None:
    folder = pipelines.sdxl(tmp_path / "model")
    layers = lora_on(folder, lora_targets=("conv1",))
    with pytest.raises(UserError, match="no layer lora_unet_down_blocks_0_resnets_0_conv1 of SDXL"):
        renamed(layers, "kohya", Source(path=str(folder)))
    assert renamed(layers, "comfyui", Source(path=str(folder)))


# ---- what is drawn


def drawn(folder: Path, lora: Path | None) -> Tensor:
    """[2, 3, h, w] in 0 to 255, by diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    rng = torch.Generator().manual_seed(0)
    images = pipe(
        ["cat", "a dog on a red background"], num_inference_steps=3, output_type="pt",
        generator=rng,
    ).images  # fmt: skip
    return Tensor(images * 255)


@pytest.mark.parametrize(
    ("family", "forms", "shown"),
    [
        ("sd1", ("diffusers", "kohya"), ("sd_v1", "stable-diffusion-v1/lora")),
        # its text is narrower than that of a real one: see below
        pytest.param(
            "sd2",
            ("diffusers", "kohya"),
            ("sd_v1_v", "stable-diffusion-v1/lora"),
            marks=pytest.mark.slow,
        ),
        ("sdxl", ("kohya", "comfyui"), ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")),
        ("sd3", ("comfyui",), (None, "stable-diffusion-3/lora")),
    ],
)
def test_an_exported_lora_draws_as_the_runs_own(
    family: str, forms: tuple[Form, ...], shown: tuple[str | None, str], tmp_path: Path
) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    layers, source = lora_on(folder, lora_rank=2, lora_alpha=6), Source(path=str(folder))
    own = drawn(folder, folder / "lora" / NAME)
    assert (own - drawn(folder, None)).abs().max() > 5
    facts = facts_of(layers, source)
    assert (facts.get("ss_base_model_version"), facts["modelspec.architecture"]) == shown
    assert facts["ss_network_dim"] == facts["ss_network_alpha"] == "2"
    for form in forms:
        file = tmp_path / f"{form}.safetensors"
        file.write_bytes(file_bytes(renamed(layers, form, source), facts))
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == facts
        assert (drawn(folder, file) - own).abs().max() <= 1


def test_the_same_content_is_the_same_bytes() -> None:
    tensors = {"b": torch.ones(2, 3), "a": torch.zeros(1)}
    facts = {f"fact {n}": str(n) for n in range(9)}
    one, *others = (file_bytes(tensors, dict(sorted(facts.items(), key=lambda f: hash(f) * n)))
                    for n in (1, -1, 1))  # fmt: skip
    assert all(other == one for other in others)


def test_stable_diffusion_2_is_told_by_the_width_of_its_text(tmp_path: Path) -> None:
    folder = pipelines.sd(tmp_path / "model", two=True)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 1024}))
    facts = facts_of({"unet.x.lora_A.weight": torch.ones(4, 2)}, Source(path=str(folder)))
    assert facts["ss_base_model_version"] == "sd_v2_v"
    assert facts["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


# ---- the command


def test_export_writes_the_lora_a_card_and_pictures(
    finished: Path, micro: Path, command: Command, tmp_path: Path
) -> None:
    before = contents(finished)
    out = tmp_path / "loras" / "my style.safetensors"
    arguments = ("export", finished, "--format", "kohya", "--out", out)
    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    beside = [out, out.with_name("README.md"), out.with_suffix(".png")]
    assert done.out.splitlines() == [str(path) for path in beside]
    assert sorted(out.parent.iterdir()) == sorted(beside)
    with safe_open(out, framework="pt") as opened:
        facts = opened.metadata()
    run = json.loads((finished / "config.json").read_text())
    assert {name.partition(".")[2]: value for name, value in facts.items() if "d3po" in name} == {
        "base_model": str(micro), "method": "d3po", "objective": "incompress", "seed": "0",
        "run_id": run["run_id"], "version": "0.1.0",
    }  # fmt: skip
    card = beside[1].read_text()
    assert "larger is better" in card
    assert "over 2 prompts" in card
    code = card.split("```python\n")[1].split("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        exec(code, made := dict[str, Any]())
    assert any("lora_A" in name for name, _ in made["pipeline"].unet.named_parameters())
    was = contents(out.parent)
    refused(command(*arguments), "my style.safetensors is there already", "--force")
    assert contents(out.parent) == was
    assert command(*arguments, "--force").code == 0
    assert contents(out.parent) == was
    assert contents(finished) == before


def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def unfinished(run: Path) -> None:
    facts = json.loads((run / "provenance.json").read_text())
    del facts["ended"]
    (run / "provenance.json").write_text(json.dumps(facts))


def changed(run: Path) -> None:
    file = run / "lora" / NAME
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def whole(run: Path) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"full": True}))


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (shutil.rmtree, {}, "is not a run. Give the folder of one"),
        (unfinished, {}, "is not finished. Run its command again"),
        (changed, {}, "was changed after the run had ended"),
        (whole, {}, "trained the whole network, so there is no LoRA"),
        (None, {"--out": "x.ckpt"}, "has to end in .safetensors"),
        (None, {"--card": "x.safetensors"}, "--card x.safetensors would replace another file"),
        (None, {"--card": "notes.md"}, "notes.md is there already. Give another --card"),
        (None, {"--out": "run/lora/x.safetensors"}, "lies in the run's own folder"),
        (None, {"--out": "folder.safetensors"}, "folder.safetensors is there already"),
        (None, {"--format": "a1111"}, "'a1111' is not one of"),
        (None, {"--card": ""}, "it is empty"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    change: Callable[[Path], object] | None, more: dict[str, str], words: str, finished: Path,
    command: Command, tmp_path: Path,
) -> None:  # fmt: skip
    run = copied(finished, tmp_path)
    if change:
        change(run)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = contents(tmp_path)
    given = {"--format": "kohya", "--out": "x.safetensors"} | more
    refused(command("export", "run", *(part for pair in given.items() for part in pair)), words)
    assert contents(tmp_path) == before
