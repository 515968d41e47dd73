"""Batches that fit a card: what a model takes is counted, and what is chosen by it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from d3po_bench.config import BATCHES, Execution, RunConfig
from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.sampling import sample
from d3po_bench.diffusion.update import update
from d3po_bench.errors import TooLarge
from d3po_bench.feedback import sampling
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.memory import ROOM, SHARE, Needs, alive, forward, shadow
from d3po_bench.models.sources import load, model_source
from d3po_bench.runs.files import read_csv
from d3po_bench.runs.run import RunFolder
from d3po_bench.training import sizes, trainer
from d3po_bench.training.tools import EvaluationSet
from eval import measure
from eval.measure import evaluate
from results import memory
from tests import pipelines
from tests.commands import Command, Stop, refused, run_of, seed_folder, written
from tests.conftest import CPU

PAPER: dict[str, Any] = {"method": "d3po", "objective": "incompress", "prompts_per_round": 80,
         "images_per_prompt": 2, "dtype": "fp16"}  # fmt: skip


def model_of(folder: Path, **training: Any) -> DiffusersModel:
    """A pipeline as a run has it, with its LoRA."""
    found = load(model_source(str(folder)), CPU, Training(**training))
    assert isinstance(found, DiffusersModel)
    found.add_adapter(0)
    return found


def saved(model: DiffusersModel, count: int) -> int:
    """Bytes that autograd keeps of a forward pass, by the hooks that it has for that."""
    weights = {t.untyped_storage()._cdata for t in model.network.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, model.encode([""]), count)
    return sum(storage.nbytes() for storage in kept.values())


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": pipelines.sd,
    "sdxl": pipelines.sdxl,
    "sd3": pipelines.sd3,
}


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "sd3"])
def test_what_is_counted_without_weights_is_what_autograd_keeps_of_real_ones(
    family: str, tmp_path: Path
) -> None:
    model = model_of(FAMILIES[family](tmp_path))
    empty, text = shadow(model), model.encode([""])
    real, counted = saved(model, 2), alive(lambda: forward(empty, text, 2), empty)[0]
    # Beside what autograd keeps, the output is left; and a card's fused attention rounds up.
    output = 2 * 4 * torch.Size(model.latent_shape).numel()
    assert counted - output == pytest.approx(real, rel=0.04)
    six = alive(lambda: forward(empty, text, 6), empty)[0]
    assert six == pytest.approx(3 * counted, rel=0.02)


def test_gradient_checkpointing_and_half_precision_take_less(tmp_path: Path) -> None:
    place = pipelines.sd(tmp_path)
    model = model_of(place)
    needs, half = Needs(model, model.encode([""])), model_of(place, dtype="fp16")
    text = half.encode([""])
    assert needs.sampling < needs.checkpointed < needs.update
    assert Needs(half, text).update < needs.update
    parts = (model.network, model.vae)
    lie = sum(t.numel() * t.element_size() for part in parts for t in part.state_dict().values())
    assert needs.weights == lie
    # What trains is in float32 whatever the rest is in: gradients, moments, and a step's work.
    trained = sum(w.numel() for w in half.trainable().values())
    assert Needs(half, text).optimizer == 5 * 4 * trained
    full = load(model_source(str(place)), CPU, Training(full=True, dtype="fp16"))
    assert isinstance(full, DiffusersModel)
    network = sum(4 * p.numel() for p in full.network.parameters())
    assert Needs(full, text).optimizer == 5 * network
    assert Needs(full, text).weights > 2 * network


class Given:
    """Stands in for what is counted of a model."""

    weights, optimizer, latent = 2 * 10**9, 10**8, 65536
    update, checkpointed, sampling, decoding = 10**9, 2 * 10**8, 7 * 10**7, 8 * 10**8
    prompt = 3 * 10**5


@pytest.mark.parametrize(
    ("gigabytes", "guidance", "expected"),
    [
        (60, 5.0, (128, 8, 128, 16, False)),
        (60, 1.0, (128, 16, 128, 16, False)),
        (22, 5.0, (128, 4, 128, 16, False)),
        (8, 5.0, (32, 1, 32, 8, False)),
        (5, 5.0, (32, 1, 32, 4, False)),
        # 0.12 GB are the optimizer's and the prompts'. An image takes 0.145: two passes and its
        # chain; a pair 0.80 with checkpointing, and 4.0 without; a picture 0.8.
        (4, 5.0, (16, 4, 16, 4, True)),
        (1, 5.0, (4, 1, 4, 1, True)),
    ],
)
def test_the_largest_power_of_two_that_fits_is_chosen(
    gigabytes: float, guidance: float, expected: tuple[Any, ...]
) -> None:
    config, needs = RunConfig(**PAPER, guidance=guidance), cast(Needs, Given())
    found = sizes.chosen(Execution(), config, needs, int(gigabytes * 1e9))
    assert tuple(getattr(found, name) for name in sizes.KEPT) == expected
    assert sizes.peak(found, config, needs) <= gigabytes * 1e9


def test_what_is_asked_for_is_not_changed() -> None:
    asked = Execution(micro_batch=7, sample_batch=500)
    found = sizes.chosen(asked, RunConfig(**PAPER), cast(Needs, Given()), 10**9)
    assert (found.micro_batch, found.sample_batch, found.decode_batch) == (7, 500, 1)
    assert not found.gradient_checkpointing


# ---- in runs


def batches(folder: Path, session: int = 0) -> dict[str, Any]:
    """Those that provenance has."""
    known = RunFolder(folder).facts["sessions"][session]["execution"]
    return {name: known[name] for name in sizes.KEPT}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd(tmp_path_factory.mktemp("sd"))


def test_a_run_computes_as_usual_on_a_cpu_and_by_its_memory_where_that_is_given(
    command: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*run_of(small, "--out", "usual")).code == 0
    assert batches(seed_folder(Path("usual"), small)) == BATCHES | {"gradient_checkpointing": False}
    monkeypatch.setattr(sizes, "ROOM", 0)
    assert command(*run_of(small, "--out", "little", memory=0.003)).code == 0
    found = batches(seed_folder(Path("little"), small))
    assert 1 <= found["micro_batch"] < 32
    assert "memory" not in RunFolder(seed_folder(Path("little"), small)).facts["execution"]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_batches_and_says_where_they_do_not_fit(
    command: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seed_folder(Path("runs"), small)
    with monkeypatch.context() as patch:
        stop = Stop(trainer.Trainer.train_round, lambda t, *_: t.round == 1, KeyboardInterrupt())
        patch.setattr(trainer.Trainer, "train_round", stop)
        assert command(*run_of(small, micro_batch=3, sample_batch=5)).code == 1
    done = command(*run_of(small, memory=0.0001))
    assert done.code == 0
    assert "The batches that this run began with need" in done.err
    assert batches(folder, 1) == batches(folder)
    assert batches(folder)["micro_batch"] == 3
    assert command(*run_of(small, "--out", "whole", micro_batch=3, sample_batch=5)).code == 0
    assert written(folder) == written(seed_folder(Path("whole"), small))


class Full:
    """Stands in for a stage of a round that finds no memory, so many times."""

    def __init__(self, work: Any, times: int) -> None:
        self.work, self.times, self.given = work, times, list[int]()

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.given.append(args[4].micro_batch)
        if len(self.given) <= self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.work(*args, **given)


def test_a_batch_that_was_chosen_too_large_is_halved_once(
    command: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(update, 1)
    monkeypatch.setattr(trainer, "update", full)
    done = command(*run_of(small))
    assert done.code == 0
    assert done.err.count("out of memory with micro_batch=32: trying 16") == 1
    assert full.given == [32, 16, 16]
    assert batches(seed_folder(Path("runs"), small), -1)["micro_batch"] == 16


@pytest.mark.parametrize(
    ("settings", "times", "said"),
    [
        pytest.param(
            {},
            2,
            "Out of memory with micro_batch=16. Try --set micro_batch=8.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"micro_batch": 12},
            1,
            "Out of memory with micro_batch=12. Try --set micro_batch=6.",
            marks=pytest.mark.slow,
        ),
        ({"micro_batch": 1}, 1, "Try --set gradient_checkpointing=true."),
    ],
)
def test_what_does_not_fit_after_that_names_the_setting(
    settings: dict[str, int], times: int, said: str, command: Command, small: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(trainer, "update", Full(update, times))
    refused(command(*run_of(small, **settings)), said, code=1)


def test_after_the_first_round_nothing_is_halved(
    command: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = MemoryError()
    stop = Stop(trainer.Trainer._learn, lambda t, *_: t.round == 1, problem)
    monkeypatch.setattr(trainer.Trainer, "_learn", stop)
    refused(command(*run_of(small)), "Out of memory with micro_batch=32.", code=1)


def test_the_stage_that_found_no_memory_decides_the_setting() -> None:
    for stage, name in sizes.STAGES.items():
        with pytest.raises(TooLarge, match=name), sizes.watched(stage, Execution().usual()):
            raise MemoryError


# ---- on a card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_published_models_stay_under_their_card(name: str) -> None:
    published = [row for row in read_csv(memory.HERE / "memory.csv") if row["model"] == name]
    rows = list(memory.rows(name))
    assert [{k: str(v) for k, v in row.items()} for row in rows] == published
    for row, card in zip(rows, (24, 40, 80), strict=True):
        assert row["peak"] + ROOM <= card * 1e9
        latent = row["checkpointed" if row["gradient_checkpointing"] else "update"]
        twice = row["weights"] + 2 * row["micro_batch"] * 4 * latent
        assert twice > (card * 1e9 - ROOM) * SHARE or row["micro_batch"] == BATCHES["micro_batch"]
    by_hand = {"sd15": 860e6 * 2 + 84e6 * 4, "sdxl": 2.57e9 * 2 + 84e6 * 4, "sd3": 4.5e9}
    assert rows[0]["weights"] == pytest.approx(by_hand[name], rel=0.02)


def test_free_memory_is_what_nobody_holds_without_what_is_left_for_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 10**9)
    device, needs = torch.device("cuda"), cast(Needs, Given())
    assert sizes.free(0, needs, device) == int((23 * 10**9 - ROOM) * SHARE)
    # Of memory that is given, the weights are a part.
    assert sizes.free(12, needs, device) == int((12 * 10**9 - ROOM) * SHARE) - needs.weights


def test_ranks_take_what_fits_the_smallest_card(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = RunConfig(**PAPER | {"model": str(small), "dtype": "fp32"}), model_of(small)
    asked, notes = Execution(memory=8), list[str]()
    alone = sizes.settled(asked, config, model, {}, notes.append)
    monkeypatch.setattr(parallel, "gather", lambda limit: [limit, 3 * 10**6])
    beside = sizes.settled(asked, config, model, {}, notes.append)
    assert alone.micro_batch == BATCHES["micro_batch"] > beside.micro_batch


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_optimizer_is_fused_on_cuda_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, **more: given.update(more))
    of = SimpleNamespace(
        config=RunConfig(**PAPER), device=torch.device(device),
        model=SimpleNamespace(trainable=dict),
    )  # fmt: skip
    trainer.Trainer._optimizer(of)  # type: ignore[arg-type]
    assert given.get("fused", False) == (device == "cuda")


def test_text_encoders_are_on_the_device_only_while_they_encode(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, moves = model_of(small), list[str]()
    monkeypatch.setattr(model.parts["text_encoder"], "to", lambda place: moves.append(str(place)))
    model.device = torch.device("cpu:0")
    model.encode(["a cat"])
    model.encode(["a cat"])
    assert moves == ["cpu:0", "cpu"]


def test_on_a_card_sizes_follow_its_free_memory_and_convolutions_are_channels_last(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(small)
    text = model.encode([""])
    config = RunConfig(**PAPER | {"model": str(small), "dtype": "fp32"})
    assert not sizes.settled(Execution(), config, model, {}, print).channels_last
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    monkeypatch.setattr(model, "encode", lambda prompts: text)
    monkeypatch.setattr(sizes, "free", lambda *_: 4 * 10**6)
    notes = list[str]()
    found = sizes.settled(Execution(), config, model, {}, notes.append)
    assert not found.channels_last  # fp32 does without tensor cores
    half = replace(config, dtype="bf16")
    assert sizes.settled(Execution(), half, model, {}, print).channels_last
    assert 1 <= found.micro_batch < BATCHES["micro_batch"]
    assert not notes
    monkeypatch.setattr(sizes, "free", lambda *_: 10**5)
    sizes.settled(Execution(), config, model, {}, notes.append)
    # 3 GB are left to libraries.
    assert notes[0].endswith("take a larger card: 3 GB are enough for these.")


def test_a_round_of_feedback_is_drawn_in_batches_that_fit(
    command: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "ROOM", 0)
    drawn = list[int]()

    def draw(*args: Any, batch: int, **given: Any) -> Any:
        drawn.append(batch)
        return sample(*args, batch=batch, **given)

    monkeypatch.setattr(sampling, "sample", draw)
    asked = ("feedback", "new", "--model", str(small), "--prompts", str(small / "prompts.txt"),
             "--preset", "official_code")  # fmt: skip
    (small / "prompts.txt").write_text("cat\n" * 8)
    drawing = ("--images", "2", "--device", "cpu", "--set", "sampling_steps=2",
               "--set", "dtype=fp32")  # fmt: skip
    assert command(*asked, "usual", *drawing).code == 0
    assert command(*asked, "little", *drawing, "--set", "memory=0.003").code == 0
    usual, little = drawn
    assert usual == BATCHES["sample_batch"] > little


def test_an_evaluation_is_drawn_in_batches_that_fit(
    command: Command, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, asked = list[EvaluationSet](), list[RunConfig]()

    def fitting(execution: Execution, config: RunConfig, *rest: Any) -> Execution:
        asked.append(config)
        return replace(execution.usual(), sample_batch=3, decode_batch=2)

    def measured(model: Any, what: EvaluationSet, *rest: Any) -> Any:
        given.append(what)
        return evaluate(model, what, *rest)

    monkeypatch.setattr(sizes, "settled", fitting)
    monkeypatch.setattr(measure, "evaluate", measured)
    (small / "prompts.txt").write_text("cat\n")
    done = command(
        "evaluate", str(small), "--scorers", "jpeg_size", "--prompts", str(small / "prompts.txt"),
        "--steps", "2", "--images", "4", "--device", "cpu", "--out", "evaluation",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {(what.batch, what.decode_batch) for what in given} == {(3, 2)}
    (config,) = asked  # of both samplers
    assert (config.sampling_steps, config.images_per_prompt) == (2, 4)
