"""A run that is there goes on to more rounds, and ends as one that had them from the start."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from d3po_bench.runs.run import LAST, LORA, SAMPLES, RunFolder
from d3po_bench.runs.store import RunStore
from d3po_bench.training import trainer
from tests.commands import Command, Stop, contents, refused, run_of, seed_folder
from tests.damage import flipped

TIMES = {"timing.jsonl", "provenance.json", "checkpoints/last.safetensors",
         "checkpoints/previous.safetensors"}  # fmt: skip
"""Files that hold seconds, or a digest of them."""


@pytest.fixture(scope="module")
def whole(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four rounds from the start."""
    from d3po_bench.cli import main

    out = tmp_path_factory.mktemp("whole")
    main(run_of(micro, "--out", out, rounds=4))
    return seed_folder(out, micro)


@pytest.fixture
def two(finished: Path, micro: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of two rounds, where the command looks for it."""
    folder = seed_folder(tmp_path / "runs", micro)
    shutil.copytree(finished, folder)
    return folder


def differing(folder: Path, other: Path) -> set[str]:
    """Files that are not in both, or not with the same bytes."""
    ours, theirs = contents(folder), contents(other)
    names = (ours.keys() | theirs.keys()) - TIMES
    return {name for name in names if ours.get(name) != theirs.get(name)}


def test_a_finished_run_goes_on_to_the_bytes_of_a_longer_one(
    command: Command, micro: Path, two: Path, whole: Path
) -> None:
    assert command(*run_of(micro, rounds=4)).code == 0
    assert differing(two, whole) == set()
    facts = RunFolder(two).facts
    assert [(s["after_round"], s["rounds"]) for s in facts["sessions"]] == [(0, 2), (2, 4)]
    RunFolder(two).require_content(LORA, LAST, SAMPLES)
    assert "rounds 2 -> 4" in command("show", two).out
    before = contents(two)
    assert command(*run_of(micro, rounds=4)).code == 0
    assert contents(two) == before


@pytest.mark.slow
def test_a_run_under_way_goes_on_too(
    command: Command, micro: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop = Stop(trainer.Trainer.train_round, lambda t, *_: t.round == 1, KeyboardInterrupt())
        patch.setattr(trainer.Trainer, "train_round", stop)
        assert command(*run_of(micro, rounds=3)).code == 1
    assert command(*run_of(micro, rounds=4)).code == 0
    assert differing(seed_folder(Path("runs"), micro), whole) == set()


def test_an_end_that_the_longer_run_would_not_evaluate_stays_in_its_rows(
    command: Command, micro: Path, whole: Path
) -> None:
    folder = seed_folder(Path("runs"), micro)
    for rounds in (3, 4):
        assert command(*run_of(micro, rounds=rounds)).code == 0
    rows = (folder / "eval.csv").read_text().splitlines()
    extra = [row for row in rows if row.startswith("3,")]
    assert len(extra) == 4
    assert [row for row in rows if row not in extra] == (whole / "eval.csv").read_text().split()
    for name in ("metrics.jsonl", "config.json", "lora/pytorch_lora_weights.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def writes(name: str) -> Callable[..., bool]:
    return lambda store, written, *_: written == name


OTHERS = "provenance.json", "config.json", "metrics.jsonl", "eval.csv"


@pytest.mark.parametrize(
    "cut",
    ["checkpoints/last.safetensors", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)],
)
def test_a_kill_on_the_way_changes_nothing(
    cut: str, command: Command, micro: Path, two: Path, whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "_write", Stop(RunStore._write, writes(cut), KeyboardInterrupt()))
        assert command(*run_of(micro, rounds=4)).code == 1
    assert command(*run_of(micro, rounds=4)).code == 0
    assert differing(two, whole) == set()


def test_one_that_is_under_way_again_is_no_finished_run(
    command: Command, micro: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(trainer.Trainer.train_round, lambda t, *_: t.round == 2, KeyboardInterrupt())
    monkeypatch.setattr(trainer.Trainer, "train_round", stop)
    assert command(*run_of(micro, rounds=4)).code == 1
    assert not RunFolder(two).finished
    assert RunFolder(two).config.rounds == 4
    request = ("evaluate", two, "--scorers", "jpeg_size")
    refused(command(*request), f"The run in {two} is not finished")
    assert not (two / "lora").exists()


def test_what_cannot_go_on_is_refused_and_left_alone(
    command: Command, micro: Path, two: Path
) -> None:
    before = contents(two)
    fewer = refused(command(*run_of(micro, rounds=1)), "a run of 2 rounds, and 1 are fewer")
    assert "--rounds 2 or more" in fewer
    both = run_of(micro, rounds=4, learning_rate=1e-2)
    refused(command(*both), "learning_rate is 0.003 there, not 0.01")
    refused(command(*run_of(micro, "--no-resume", rounds=4)), "--resume")
    assert contents(two) == before
    last = two / "checkpoints" / "last.safetensors"
    last.write_bytes(flipped(last.read_bytes(), random.Random(0)))
    refused(command(*run_of(micro, rounds=4)), "last.safetensors is missing or was changed")
    last.unlink()
    refused(command(*run_of(micro, rounds=4)), "last.safetensors is missing or was changed")
    assert json.loads((two / "config.json").read_text())["rounds"] == 2
