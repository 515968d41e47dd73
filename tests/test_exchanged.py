"""What belongs to something else is refused, by its content and not by its name."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench.cli import main
from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError
from d3po_bench.models import sources
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import Source
from d3po_bench.runs import provenance
from d3po_bench.runs.files import read_csv
from d3po_bench.runs.run import RunFolder
from d3po_bench.runs.store import RunStore
from d3po_bench.types import Model
from eval import golden
from tests.commands import Command, contents, edit_json, refused, run_of
from tests.damage import truncated
from tests.feedback_round import new_round
from tests.gallery import gallery

LORA = Path("lora", "pytorch_lora_weights.safetensors")
LAST = Path("checkpoints", "last.safetensors")
CELL = Path("runs", "model", "incompress", "d3po")


@pytest.fixture(scope="module")
def made(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and two finished runs, one of them of another rate, too."""
    home = tmp_path_factory.mktemp("made")
    shutil.copytree(micro, home / "model")
    (home / "list.txt").write_text("cat\ndog\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        settings: dict[str, Any] = {"prompts": "list.txt", "rounds": 1}
        main(run_of("model", "--seeds", "2", "--jobs", "1", **settings))
        main(run_of("model", "--out", "other", **settings | {"learning_rate": 1e-3}))
    return home


def flip(path: Path) -> None:
    """Change the last byte of a file: weights load all the same."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# ---- weights of a run on something else


def another_model(home: Path) -> None:
    flip(home / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def another_model_of_that_name(home: Path) -> None:
    (home / "model").rename(home / "moved")
    shutil.copytree(home / "moved", home / "model")
    another_model(home)


def another_list(home: Path) -> None:
    (home / "list.txt").write_text("cat\nfox\n")


def the_lora_of_another_seed(home: Path) -> None:
    shutil.copy(home / CELL / "seed-1" / LORA, home / CELL / "seed-0" / LORA)


def a_file_beside_the_lora(home: Path) -> None:
    shutil.copy(home / CELL / "seed-0" / LORA, home / CELL / "seed-0" / "lora" / "x.safetensors")


def no_record(home: Path) -> None:
    edit_json(home / CELL / "seed-0" / "provenance.json", lambda facts: facts.pop("content"))


def no_record_of_the_lora(home: Path) -> None:
    path = home / CELL / "seed-0" / "provenance.json"
    edit_json(path, lambda facts: facts["content"].pop(str(LORA)))


def no_record_of_the_model(home: Path) -> None:
    path = home / CELL / "seed-0" / "provenance.json"
    edit_json(path, lambda facts: facts.pop("inputs"))


EXCHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "files of the model": (another_model, "began with other inputs: model "),
    "a model of that name": (another_model_of_that_name, "began with other inputs: model "),
    "prompts": (another_list, "began with other inputs: prompts "),
    "the LoRA": (the_lora_of_another_seed, f"{LORA} is missing or was changed after"),
    "a LoRA beside it": (a_file_beside_the_lora, "x.safetensors is missing or was changed after"),
    "no record": (no_record, "provenance.json does not say what "),
    "no record of the model": (no_record_of_the_model, "does not say which model the run was"),
    "no record of the LoRA": (no_record_of_the_lora, "provenance.json does not say what lora was"),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_lora_is_put_on_what_it_was_trained_on(name: str, home: Path, command: Command) -> None:
    exchange, said = EXCHANGES[name]
    exchange(home)
    before = contents(home)
    run = CELL / "seed-0"
    for words in (
        ["evaluate", run, "--scorers", "jpeg_size"],
        ["table1", "runs", "--model", "model", "--objective", "incompress", "--scorers",
         "jpeg_size", "--out", "table"],
        ["report", "runs", "--measure"],
    ):  # fmt: skip
        refused(command(*words), said)
    assert contents(home) == before


@pytest.mark.parametrize("words", [["plot", "runs"], ["report", "runs"], ["show", CELL / "seed-0"]])
def test_a_run_that_lost_its_record_is_not_taken_for_one_without(
    words: list[str], home: Path, command: Command
) -> None:
    no_record(home)
    edit = home / CELL / "seed-0" / "metrics.jsonl"
    edit.write_text(edit.read_text().replace("0.", "1.", 1))
    if words[0] == "show":
        assert "not on record" in command(*words).out
    else:
        refused(command(*words), "provenance.json does not say what config.json was")


# ---- a run that resumes


def test_a_run_does_not_go_on_from_another_seed(home: Path, command: Command) -> None:
    run, other = home / CELL / "seed-0", home / CELL / "seed-1"
    for name in ("metrics.jsonl", "timing.jsonl", "eval.csv", str(LAST)):
        shutil.copy(other / name, run / name)
    edit_json(run / "provenance.json", lambda facts: facts.pop("ended"))
    before = contents(run)
    done = command(*run_of("model", prompts="list.txt", rounds=1))
    refused(done, "The checkpoint in", "is of another run, seed or version")
    assert contents(run) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_what_was_changed_during_a_run_is_not_put_on_record(name: str, tmp_path: Path) -> None:
    config = RunConfig(method="d3po", objective="incompress")
    with RunStore.open(tmp_path / "run", config, resume=True) as store:
        store.start(config, inputs={})
        store.log({"round": 1, "loss": 0.5}, {"round": 1})
        path = tmp_path / "run" / name
        whole = path.read_text()
        path.write_text(whole.replace("0", "1"))
        with pytest.raises(RunError, match=f"{name} was changed while the run was going"):
            store.finish()
        assert "ended" not in store.provenance()
        path.write_text(whole)
        store.finish()
    RunFolder(tmp_path / "run").require_content()


# ---- table1


TABLE = ["--model", "model", "--objective", "incompress", "--out", "table"]


def test_a_table_is_of_what_was_asked(home: Path, command: Command) -> None:
    (home / "more.txt").write_text("cat\nowl\n")
    asked = ["table1", CELL, *TABLE, "--scorers", "jpeg_size"]
    table = command(*asked)
    assert table.code == 0, table.err
    assert "| d3po | 2 |" in table.out
    pieces = {p: p.stat().st_mtime_ns for p in home.glob("table/scoring/*/pieces/*")}
    assert command(*asked).out == table.out
    assert {p: p.stat().st_mtime_ns for p in pieces} == pieces, "nothing was scored again"
    before = contents(home)
    refused(command(*asked, "--count", "1"), "holds another evaluation: prompts differs")
    refused(command(*asked, "--prompts", "more.txt"), "another evaluation: prompts differs")
    refused(command(*asked[:-1], "animal"), "holds another evaluation: scorers differs")
    others = ["table1", "other", CELL / "seed-1", *asked[2:]]
    refused(command(*others), "do not share the setting learning_rate")
    refused(command("table1", "other", *asked[2:]), "d3po-0 holds another evaluation: adapter")
    one = ["table1", CELL / "seed-0", *asked[2:]]
    refused(command(*one), "d3po-1.csv is of a model that this command does not ask for")
    assert contents(home) == before


# ---- pieces of an evaluation


def truncate(path: Path) -> None:
    path.write_bytes(truncated(path.read_bytes(), random.Random(0)))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_to_whole_rows(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def edit_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace("0.", "9.", 1))


HARMS: list[tuple[str, Callable[[Path], None]]] = [
    ("pieces/*.csv", truncate), ("pieces/*.csv", empty), ("pieces/*.csv", cut_to_whole_rows),
    ("pieces/*.csv", edit_a_number), ("pieces/*.json", truncate), ("pictures/*/*-0.png", flip),
    ("pictures/*/*-0.png", empty),
]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation with pictures, to read only."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        main([*EVALUATE, "--out", str(out)])
    return out


EVALUATE = ["evaluate", "model", "--prompts", "list.txt", "--scorers", "jpeg_size", "--steps", "2",
            "--save"]  # fmt: skip


def bytes_of(out: Path) -> dict[str, bytes]:
    return {n: data for n, data in contents(out).items() if n != "provenance.json"}


@pytest.mark.parametrize(("pattern", "harm"), HARMS)
def test_a_piece_that_is_not_as_it_was_written_is_made_again(
    pattern: str, harm: Callable[[Path], None], evaluated: Path, home: Path, command: Command
) -> None:
    shutil.copytree(evaluated, home / "out")
    harmed = sorted((home / "out").glob(pattern))[0]
    whole = harmed.read_bytes()
    harm(harmed)
    assert harmed.read_bytes() != whole
    assert command(*EVALUATE, "--out", "out").code == 0
    assert bytes_of(home / "out") == bytes_of(evaluated)


def test_pieces_of_other_packages_weights_or_plans_are_not_mixed(
    evaluated: Path, home: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(evaluated, home / "out"))
    before = contents(out)
    with monkeypatch.context() as patch:
        version = provenance._version
        patch.setattr(provenance, "_version", lambda n: "1.0" if n == "torch" else version(n))
        refused(command(*EVALUATE, "--out", "out"), "another evaluation: packages.torch differs")
    with monkeypatch.context() as patch:
        patch.setattr(golden, "fingerprint", lambda scorer: "another")
        refused(command(*EVALUATE, "--out", "out"), "scorer_weights.jpeg_size differs")
    assert contents(out) == before
    (out / "plan.json").unlink()
    other = [*EVALUATE, "--guidance", "2"]
    assert command(*other, "--out", "out").code == 0
    assert command(*other, "--out", "fresh").code == 0
    assert bytes_of(out) == bytes_of(home / "fresh") != bytes_of(evaluated)


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_run_is_evaluated_in_its_own_precision(
    dtype: str, home: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"prompts": "list.txt", "dtype": dtype, "learning_rate": 0.05}
    assert command(*run_of("model", "--out", dtype, rounds=1, **settings)).code == 0
    (run,) = (path.parent for path in Path(dtype).rglob("config.json"))
    load, seen = sources.load, []

    def spy(source: Source, device: torch.device, training: Training) -> Model:
        seen.append(training.dtype)
        return load(source, device, training)

    monkeypatch.setattr(sources, "load", spy)
    assert command("evaluate", run).code == 0
    assert seen == [dtype]
    trained = [row for row in RunFolder(run).table if row["round"] == "1"]
    # In half precision the LoRA is rounded when it is read.
    most = {"fp32": 0.0, "bf16": 0.004}[dtype]
    for again, then in zip(read_csv(run / "evaluation" / "rows.csv"), trained, strict=True):
        assert abs(float(again["jpeg_size"]) - float(then["score"])) <= most


# ---- votes, and the rounds they are of


SMALL = ["--kind", "pairs", "--model", "model", "--preset", "official_code", "--device", "cpu",
         "--set=sampling_steps=2", "--set=dtype=fp32", "--set=sample_batch=4"]  # fmt: skip
TRAIN = ["--preset", "official_code", "--device", "cpu"]


@pytest.fixture(scope="module")
def voted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of the same prompts, one of them voted on and trained from."""
    home = tmp_path_factory.mktemp("voted")
    shutil.copytree(made / "model", home / "model")
    (home / "list.txt").write_text("cat\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, seed in (("one", "0"), ("two", "1")):
            more = [*SMALL, "--seed", seed, "--question", "deformed"]
            main(["feedback", "new", name, "--prompts", "list.txt", *more])
        main(["feedback", "simulate", "one"])
        main(["feedback", "train", "one", "--passes", "2", *TRAIN])
    return home


@pytest.fixture
def rounds(voted: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, in which commands are called."""
    home = Path(shutil.copytree(voted, tmp_path / "rounds"))
    monkeypatch.chdir(home)
    return home


def test_votes_stay_with_their_round(rounds: Path, command: Command) -> None:
    url = f"sqlite:///{rounds / 'one' / 'labels.sqlite'}"
    said = "are not of this round: they were given to other pictures"
    shutil.copy("one/labels.sqlite", "two/labels.sqlite")
    for name in ("status", "export", "train", "simulate"):
        refused(command("feedback", name, "two"), said)
        refused(command("feedback", name, "two", "--labels", url), said)
    assert not Path("two", "trained").exists()
    assert not Path("two", "labels.csv").exists()
    assert command("feedback", "export", "one").code == 0


def test_votes_of_an_earlier_version_are_of_the_round_that_asks_first(
    rounds: Path, command: Command
) -> None:
    with closing(sqlite3.connect("one/labels.sqlite")) as labels, labels:
        labels.execute("delete from facts where name = 'round'")
    assert command("feedback", "export", "one").code == 0
    shutil.copy("one/labels.sqlite", "two/labels.sqlite")
    refused(command("feedback", "export", "two"), "are not of this round")


def test_the_same_votes_on_another_round_are_another_training(
    rounds: Path, command: Command
) -> None:
    Path("labels").mkdir()
    Path("labels", "ann.json").write_text("[[0, -1]]")
    train = ["feedback", "train", "--label-files", "labels", "--out", "out", *TRAIN]
    assert command(*train[:2], "one", *train[2:]).code == 0
    before = contents(Path("out"))
    edit = json.loads(Path("two", "sampling.json").read_text()) | {"seed": 0}
    Path("two", "sampling.json").write_text(json.dumps(edit))
    edit_json(Path("two", "files.json"), lambda known: known.pop("sampling.json"))
    refused(command(*train[:2], "two", *train[2:]), "began with other votes")
    assert contents(Path("out")) == before


@pytest.mark.parametrize("name", ["sampling.json", "round.json", "sources.json"])
def test_what_a_round_says_of_itself_is_in_its_checksums(
    name: str, rounds: Path, command: Command
) -> None:
    folder = rounds / "one"
    if name == "sources.json":
        folder = rounds / "duel"
        sources = [a for n in range(2) for a in ("--pictures", gallery(rounds / f"g{n}", 1))]
        assert command("feedback", "new", folder, "--kind", "pairs", *sources).code == 0
        assert command("feedback", "simulate", folder).code == 0
        (folder / name).write_text((folder / name).read_text().replace("g1", "g2"))
    else:
        (folder / name).write_text((folder / name).read_text().replace("cat", "cow"))
    for words in ("status", "export", "train", "simulate", "choices", "serve"):
        refused(command("feedback", words, folder), f"{name} was changed")


def test_a_round_put_together_by_hand_has_no_checksums(tmp_path: Path, command: Command) -> None:
    new_round(tmp_path / "own", "pairs", 2)
    assert "0 of 2 items complete" in command("feedback", "status", tmp_path / "own").out


def test_the_base_model_of_a_round_stays(rounds: Path, command: Command) -> None:
    another_model(rounds)
    said = "began with other inputs: model "
    refused(command("feedback", "train", "one", "--out", "new", *TRAIN), "The round in", said)
    following = ["feedback", "new", "three", "--prompts", "list.txt", "--kind", "pairs"]
    refused(command(*following, "--from", "one/trained/d3po"), "The run in", said)
    Path("two", "round.json").unlink()  # as if it had been interrupted
    more = [*SMALL, "--seed", "1", "--question", "deformed"]
    again = command("feedback", "new", "two", "--prompts", "list.txt", *more)
    refused(again, "holds another round: its inputs differ")
    assert not Path("new").exists()
    assert not Path("three").exists()


def test_a_round_of_an_earlier_version_is_trained_on(rounds: Path, command: Command) -> None:
    """It names neither its model nor the checksums of its JSON files."""
    edit_json(Path("one", "sampling.json"), lambda sampling: sampling.pop("inputs"))
    edit_json(Path("one", "files.json"), lambda known: known.pop("sampling.json"))
    edit_json(Path("one", "files.json"), lambda known: known.pop("round.json"))
    assert command("feedback", "train", "one", "--passes", "2", "--out", "again", *TRAIN).code == 0
    assert Path("again", LORA).read_bytes() == Path("one", "trained", "d3po", LORA).read_bytes()


@pytest.mark.parametrize("harm", [truncate, flip, empty, None])
def test_the_next_round_needs_the_last_checkpoint(
    harm: Callable[[Path], None] | None, rounds: Path, command: Command
) -> None:
    """Not the one before it, and not one of another training."""
    last = Path("one", "trained", "d3po", LAST)
    if harm:
        harm(last)
    else:
        shutil.copy(last.with_name("previous.safetensors"), last)
    following = ["feedback", "new", "three", "--prompts", "list.txt", "--kind", "pairs"]
    done = command(*following, "--from", "one/trained/d3po")
    refused(done, f"{LAST} is missing or was changed after the run had ended")
    assert not Path("three").exists()
