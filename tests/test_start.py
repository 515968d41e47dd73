"""Runs that begin where a LoRA ended."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from d3po_bench.config import RunConfig, make
from d3po_bench.errors import UserError
from d3po_bench.models import start
from d3po_bench.models.lora import NAME
from d3po_bench.runs.run import RunFolder
from d3po_bench.training.run import Job, on_policy
from d3po_bench.training.trainer import Trainer
from eval.tools import TOOLS
from tests.commands import Command, contents, files, refused, run_of, seed_folder
from tests.conftest import CPU, loaded
from tests.points import Points


def trained(folder: Path, to: Path, part: str = "unet", **settings: Any) -> Path:
    """A random LoRA in the file that diffusers writes."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    network = getattr(pipe, part)
    given = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_out.0"]}
    network.add_adapter(LoraConfig(**given | settings))
    rng = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=rng) * 0.3
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(network)}
    metadata = {f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict()}
    pipe.save_lora_weights(to, **layers, **metadata)
    return to / NAME


def answer(model: Any) -> Tensor:
    """What the network says [2, 4, 4, 4] of fixed latents."""
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model.output(x, torch.full((2,), 500), model.encode(["cat", "a dog"]))
    return found


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param({"lora_alpha": 2}, {}, marks=pytest.mark.slow),
        ({"lora_alpha": 12}, {"lora_alpha": 2.0}),
        pytest.param({"r": 2}, {"lora_rank": 8}, marks=pytest.mark.slow),
        ({"rank_pattern": {"attn1.to_q": 1}}, {}),
        ({"target_modules": ["conv1", "to_q"]}, {"lora_targets": ("conv1", "to_q", "to_k")}),
    ],
    ids=["as it is", "scaled", "another scale", "narrower", "of several ranks", "convolutions"],
)
def test_the_network_says_what_it_says_with_the_lora(
    settings: dict[str, Any], training: dict[str, Any], micro: Path, tmp_path: Path
) -> None:
    file = trained(micro, tmp_path, **settings)
    stock, ours = loaded(micro), loaded(micro, **training)
    untouched = answer(stock)
    stock.load_saved(file)
    start.begin(ours, 0, str(file))
    torch.testing.assert_close(answer(ours), answer(stock), rtol=0, atol=1e-5)
    assert (answer(ours) - untouched).abs().max() > 0.1
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # drift is from the base model
        base = ours.output(x, torch.full((2,), 500), ours.encode(["cat", "a dog"]), weights="base")
    assert torch.equal(base, untouched)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_kept_to_the_bit(dtype: str, micro: Path, tmp_path: Path) -> None:
    first, again = (loaded(micro, dtype=dtype) for _ in range(2))
    first.add_adapter(0)
    for name, weight in first.trainable().items():
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    first.save(tmp_path)
    start.begin(again, 1, str(tmp_path))
    assert again.trainable().keys() == first.trainable().keys()
    for name, weight in again.trainable().items():
        assert weight.requires_grad
        assert torch.equal(weight, first.trainable()[name])


def text_encoder(micro: Path, to: Path) -> None:
    trained(micro, to, "text_encoder", target_modules=["q_proj"])


def dora(micro: Path, to: Path) -> None:
    trained(micro, to, use_dora=True)


def of_another_model(micro: Path, to: Path) -> None:
    to.mkdir()
    save_file({"unet.down_blocks.7.x.lora_A.weight": torch.ones(4, 2)}, to / NAME)


def damaged(micro: Path, to: Path) -> None:
    file = trained(micro, to)
    file.write_bytes(file.read_bytes()[:100])


def several(micro: Path, to: Path) -> None:
    to.mkdir()
    for name in "ab":
        save_file({"x": torch.ones(1)}, to / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("make_", "more", "words"),
    [
        (text_encoder, (), "it has layers of the text_encoder, which does not train here"),
        (dora, (), "it is a DoRA"),
        (of_another_model, (), "cannot be trained on: .* Give --lora one of the unet of --model"),
        (damaged, (), "cannot be trained on"),
        (several, (), "holds 2 files, of which any can be the LoRA"),
        (lambda micro, to: to.mkdir(), (), "holds no LoRA as .safetensors"),
        (lambda micro, to: None, (), "is not there. Give the folder or the file"),
        (trained, ("--set=lora_rank=2",), "--set lora_rank=4 --set lora_targets=to_k,to_out.0,"),
        (
            trained,
            ("--set=lora_targets=to_v",),
            "lora_rank=4 --set lora_targets=to_out.0,to_q,to_v",
        ),
        (trained, ("--set=full=true",), "cannot begin with a LoRA. Leave out --lora or full=true"),
        (trained, ("--set=lora=x",), "Use --lora"),
    ],
)
def test_a_lora_that_cannot_be_trained_on_is_refused_and_nothing_is_written(
    make_: Callable[[Path, Path], object], more: tuple[str, ...], words: str, micro: Path,
    command: Command, tmp_path: Path,
) -> None:  # fmt: skip
    make_(micro, tmp_path / "lora")
    before = files(tmp_path)
    said = refused(command(*run_of(micro, "--lora", tmp_path / "lora", *more)))
    assert re.search(words, said), said
    assert files(tmp_path) == before


def test_a_family_of_ones_own_cannot_begin_with_a_lora() -> None:
    with pytest.raises(UserError, match="A model family of your own cannot begin with a LoRA"):
        start.begin(Points(CPU), 0, "lora")


# ---- runs


def weights_of(finished: Path) -> dict[str, Tensor]:
    """The trained weights of a run, from its checkpoint."""
    tensors = load_file(finished / "checkpoints" / "last.safetensors")
    return {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}


def test_a_run_begins_where_the_lora_of_another_ended(
    finished: Path, micro: Path, command: Command, tmp_path: Path
) -> None:
    own = shutil.copytree(finished / "lora", tmp_path / "own")
    arguments = run_of(micro, "--lora", own, "--out", tmp_path / "on", rounds=1, eval_every=1)
    assert command(*arguments).code == 0
    run, before = RunFolder(seed_folder(tmp_path / "on", micro)), RunFolder(finished)
    last = [row for row in before.table if row["round"] == "2"]
    first = [row | {"round": "2"} for row in run.table if row["round"] == "0"]
    assert first == last  # scores and drift, to the digit
    assert run.metrics[0]["kl"] > 0
    assert run.recorded["lora"] == str(own)
    assert run.config.run_id != before.config.run_id
    assert run.facts["inputs"]["lora"]
    was = contents(run.folder)
    assert command(*arguments).code == 0
    refused(command(*(a for a in arguments if a not in ("--lora", str(own)))), "lora is", "''")
    trained(micro, own)
    refused(command(*arguments), "began with other inputs: lora")
    assert contents(run.folder) == was


def test_the_first_round_is_that_of_these_weights(finished: Path, micro: Path) -> None:
    """As if the weights were put into the run in another way: votes go on from a checkpoint."""
    changes = {"prompts_per_round": "2", "sampling_steps": "3", "dtype": "fp32"}
    made = make("d3po", "incompress", "official_code", changes, model=str(micro))
    config, execution = made

    def round_of(config: RunConfig, initial: dict[str, Tensor] | None) -> dict[str, Any]:
        job = Job(config=config, execution=execution, folder=Path("unused"), tools=TOOLS)
        experience = replace(on_policy(job, CPU, "tiny"), initial=initial)
        return Trainer(config, execution, experience, CPU).train_round(lambda share: None)[0]

    weights = weights_of(finished)
    with_lora = round_of(replace(config, lora=str(finished / "lora")), None)
    assert with_lora == round_of(config, weights)
    assert with_lora["kl"] > 0 == round_of(config, None)["kl"]
