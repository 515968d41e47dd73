"""Shared fixtures: no network, one thread, and a pipeline folder so small that tests are fast."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench.cli import main
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.embedded import recipe
from d3po_bench.models.sources import Source, load
from d3po_bench.models.stable_diffusion import StableDiffusion
from tests.commands import Command, Outcome, run_of, seed_folder

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
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=recipe.new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "micro"
    pipe.save_pretrained(folder)
    return folder


def loaded(folder: Path | str, **training: Any) -> StableDiffusion:
    """The pipeline in a folder, without an adapter."""
    model = load(Source(path=str(folder)), CPU, Training(**training))
    assert isinstance(model, StableDiffusion)
    return model


@pytest.fixture(scope="session")
def _adapted(micro: Path) -> tuple[StableDiffusion, dict[str, Tensor]]:
    model = loaded(micro)
    model.add_adapter(seed=0)
    return model, {name: weight.detach().clone() for name, weight in model.trainable().items()}


@pytest.fixture
def micro_model(_adapted: tuple[StableDiffusion, dict[str, Tensor]]) -> StableDiffusion:
    """The micro pipeline with a fresh adapter of seed 0: loaded once, and reset for each test.

    A test may train it and count its forwards; one that changes anything else loads its own.
    """
    model, fresh = _adapted
    model.load_trainable(fresh)
    for weight in model.trainable().values():
        weight.grad = None
    model.forwards = model.backwards = 0
    return model


def disturb(model: DiffusersModel, scale: float = 0.05, seed: int = 1) -> None:
    """Move every trainable weight, so that policy and pretrained model differ."""
    rng = torch.Generator().manual_seed(seed)
    for weight in model.trainable().values():
        weight.data += scale * torch.randn(weight.shape, generator=rng)


# ---- the command line


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def finished(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run, for reading and comparing only."""
    out = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    main(run_of(micro, "--out", out))
    return seed_folder(out, micro)


@pytest.fixture
def half(finished: Path, micro: Path, tmp_path: Path) -> Path:
    """An --out with a copy of the finished run that lacks the mark of its end."""
    folder = seed_folder(tmp_path / "runs", micro)
    shutil.copytree(finished, folder)
    facts = json.loads((folder / "provenance.json").read_text())
    del facts["ended"]
    (folder / "provenance.json").write_text(json.dumps(facts))
    return tmp_path / "runs"


@pytest.fixture
def home(made: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a module's own fixture `made`, in which commands are called."""
    home = shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(home)
    return home
