"""A run that was killed, stopped or damaged ends with the bytes of one that was not, or says why.

`python -m tests.kills --kills 50` is the long form of the first test.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError
from d3po_bench.models.sources import Source, fingerprint
from d3po_bench.runs import provenance
from d3po_bench.runs.run import RunFolder
from d3po_bench.runs.store import RunStore
from d3po_bench.training import trainer
from eval.verify import folder as verify
from tests import kills
from tests.commands import (
    ROOT,
    Command,
    Stop,
    contents,
    files,
    refused,
    run_of,
    seed_folder,
    written,
)
from tests.damage import Harm, flipped, truncated

# ---- killed


@pytest.mark.parametrize("number", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bytes(number: int, micro: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", str(number), "--model", str(micro)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith(f"{number} of {number} equal"), (
        done.stdout + done.stderr
    )
    assert done.returncode == 0


def test_the_harness_names_what_differs(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "lora").mkdir(parents=True)
        for name in ("metrics.jsonl", "eval.csv", "timing.jsonl", "lora/weights"):
            (folder / name).write_text("1.5\n")
    assert kills.different(one, other) == []
    (other / "timing.jsonl").write_text("2.5\n")
    assert kills.different(one, other) == []
    (other / "lora" / "weights").write_text("1.4\n")
    (other / "eval.csv").unlink()
    (other / "eval.csv.part").touch()
    assert kills.different(one, other) == ["eval.csv", "eval.csv.part", "lora/weights"]


def test_the_harness_counts_where_it_hit_and_what_was_equal() -> None:
    hits = [("ddpo", "learning", 0, []), ("d3po", "checkpoint", 1, ["eval.csv"])]
    done = [kills.Trial(method, "", hit, parts, other) for method, hit, parts, other in hits]
    head, first, second, last = (line.split() for line in kills.table(done))
    assert head[1:] == [*kills.STAGES, "half-written", "kills", "equal"]
    assert first == ["ddpo", "0", "1", "0", "0", "0", "0", "0", "1", "1"]
    assert second == ["d3po", "0", "0", "0", "0", "1", "0", "1", "1", "0"]
    assert last == ["all", "0", "1", "0", "0", "1", "0", "1", "2", "1"]


# ---- stopped

ENDS = SystemExit(1), RunError("told")


@pytest.mark.parametrize(
    "problem", [KeyboardInterrupt(), *(pytest.param(p, marks=pytest.mark.slow) for p in ENDS)]
)
def test_a_stopped_run_loses_no_finished_round(
    problem: BaseException, command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*run_of(micro, "--out", "whole", rounds=4)).code == 0
    rare = run_of(micro, rounds=4, checkpoint_every=3)
    folder = seed_folder(Path("runs"), micro)
    for done in (1, 2):  # before the first that is due after the base model's, and again
        with monkeypatch.context() as patch:
            stop = Stop(trainer.Trainer.train_round, lambda t, *_, n=done: t.round == n, problem)
            patch.setattr(trainer.Trainer, "train_round", stop)
            assert command(*rare).code == 1
        assert written_round(folder) == done
    assert command(*rare).code == 0
    assert written(folder) == written(seed_folder(Path("whole"), micro))


def written_round(folder: Path) -> int:
    found = RunStore(folder).load_checkpoint()
    assert found is not None
    return int(found[1]["round"])


def test_checkpoints_come_every_few_rounds_and_at_the_end(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    checkpoint = RunStore.checkpoint

    def spy(self: RunStore, tensors: dict[str, object], facts: dict[str, int]) -> None:
        seen.append(facts["round"])
        checkpoint(self, tensors, facts)  # type: ignore[arg-type]

    monkeypatch.setattr(RunStore, "checkpoint", spy)
    assert command(*run_of(micro, rounds=5, checkpoint_every=2)).code == 0
    assert seen == [0, 2, 4, 5]
    refused(command(*run_of(micro, checkpoint_every=0)), "checkpoint_every must be from 1")


# ---- damaged


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("harm", [truncated, flipped])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    harm: Harm, seed: int, command: Command, micro: Path, half: Path, finished: Path
) -> None:
    folder = seed_folder(half, micro)
    path = folder / "checkpoints" / "last.safetensors"
    path.write_bytes(harm(path.read_bytes(), random.Random(seed)))
    done = command(*run_of(micro))
    assert done.code == 0
    assert "the newest checkpoint is damaged: resuming from round 1" in done.err
    assert written(folder) == written(finished)
    assert files(folder) == files(finished)
    assert written_round(folder) == 2


@pytest.mark.parametrize("harm", [truncated, flipped])
def test_a_run_without_a_whole_checkpoint_is_refused(
    harm: Harm, command: Command, micro: Path, half: Path
) -> None:
    folder = seed_folder(half, micro)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(harm(path.read_bytes(), random.Random(0)))
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    refused(command(*run_of(micro)), "last.safetensors", "previous.safetensors", "start again")
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


# ---- resumed elsewhere, or with other inputs


def stopped(command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in its second round."""
    with monkeypatch.context() as patch:
        stop = Stop(trainer.Trainer.train_round, lambda t, *_: t.round == 1, KeyboardInterrupt())
        patch.setattr(trainer.Trainer, "train_round", stop)
        assert command(*run_of(micro)).code == 1
    return seed_folder(Path("runs"), micro)


def test_a_run_that_has_not_ended_says_how_it_is_computed(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = RunFolder(stopped(command, micro, monkeypatch)).facts
    assert facts["execution"]["micro_batch"] == 32
    assert facts["checkpointed"] is True
    (session,) = facts["sessions"]
    told = {"after_round", "execution", "device", "threads", "deterministic", "packages", "commit"}
    assert told <= session.keys()
    assert all(facts[name] == session[name] for name in session.keys() - {"after_round", "rounds"})


def test_resuming_with_other_packages_is_refused(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(command, micro, monkeypatch)
    version, before = provenance._version, contents(folder)
    monkeypatch.setattr(provenance, "_version", lambda n: "1.0" if n == "torch" else version(n))
    refused(command(*run_of(micro)), f"other packages: torch {torch.__version__}, not 1.0")
    assert contents(folder) == before


def test_resuming_with_a_smaller_batch_is_on_record(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(command, micro, monkeypatch)
    assert command(*run_of(micro, micro_batch=2)).code == 0
    facts = RunFolder(folder).facts
    assert [s["execution"]["micro_batch"] for s in facts["sessions"]] == [32, 2]
    assert [s["after_round"] for s in facts["sessions"]] == [0, 1]
    assert facts["execution"]["micro_batch"] == 32
    shown = command("show", folder).out
    assert "started again:\n  start 2, after round 1  execution.micro_batch" in shown
    said = "was made in several environments: from round 1 with other execution.micro_batch"
    assert said in list(verify.check_run(RunFolder(folder)))


@pytest.mark.slow
def test_resuming_in_the_same_environment_is_nothing_to_tell(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(command, micro, monkeypatch)
    assert command(*run_of(micro)).code == 0
    assert len(RunFolder(folder).facts["sessions"]) == 2
    assert "started again" not in command("show", folder).out
    assert not any(
        "several environments" in problem for problem in verify.check_run(RunFolder(folder))
    )


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"checkpoint_every": 2, "eval_every": 0}, marks=pytest.mark.slow)],
)
def test_a_run_killed_before_its_first_checkpoint_starts_again(
    settings: dict[str, int], command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = run_of(micro, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "checkpoint", Stop(None, lambda *_: True, KeyboardInterrupt()))
        assert command(*every).code == 1
    folder = seed_folder(Path("runs"), micro)
    rows = RunStore(folder)
    assert rows.metrics or rows.evaluation
    assert not (folder / "checkpoints").exists()
    assert command(*every).code == 0
    assert command(*run_of(micro, "--out", "whole", **settings)).code == 0
    assert written(folder, ("metrics.jsonl",)) == written(
        seed_folder(Path("whole"), micro), ("metrics.jsonl",)
    )


def test_a_run_whose_checkpoints_are_gone_is_refused(
    command: Command, micro: Path, half: Path
) -> None:
    folder = seed_folder(half, micro)
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    refused(
        command(*run_of(micro)), "has lost its checkpoints/last.safetensors", "Restore", "--out"
    )
    assert contents(folder) == before


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_whose_config_is_gone_is_refused(
    command: Command, micro: Path, half: Path, seed: int
) -> None:
    """It could be any run's, and would be resumed with other settings, or as another seed."""
    folder = seed_folder(half, micro)
    (folder / "config.json").unlink()
    folder = folder.rename(folder.with_name(f"seed-{seed}"))
    before = contents(folder)
    refused(
        command(*run_of(micro, "--seed-start", str(seed))), "holds metrics.jsonl but no config.json"
    )
    assert contents(folder) == before


def test_a_config_that_was_exchanged_is_refused(command: Command, micro: Path, half: Path) -> None:
    folder = seed_folder(half, micro)
    config = RunConfig.from_json(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(replace(config, learning_rate=0.9).to_json())
    refused(command(*run_of(micro, learning_rate=0.9)), "is of another run, seed or version")


@pytest.mark.parametrize(
    "name", ["eval.csv", pytest.param("metrics.jsonl", marks=pytest.mark.slow)]
)
def test_a_finished_run_with_other_rows_is_refused(
    command: Command, micro: Path, name: str
) -> None:
    assert command(*run_of(micro, rounds=1)).code == 0
    path = seed_folder(Path("runs"), micro) / name
    path.write_text(path.read_text().replace("0.", "1.", 1))
    said = f"{path} is missing or was changed after the run had ended"
    for line in (run_of(micro, rounds=1), ["plot", "runs"]):
        refused(command(*line), said, "Restore it")
    assert f"{name}" in command("show", path.parent).out
    assert "CHANGED SINCE" in command("show", path.parent).out


def test_a_finished_run_of_other_weights_is_refused(command: Command, micro: Path) -> None:
    model = Path("model").absolute()
    shutil.copytree(micro, model)
    assert command(*run_of("model", rounds=1)).code == 0
    assert "finished before" in command(*run_of("model", rounds=1)).err
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refused(command(*run_of("model", rounds=1)), "began with other inputs: model ")


def test_a_finished_run_of_other_prompts_is_refused(command: Command, micro: Path) -> None:
    Path("list.txt").write_text("cat\ndog\n")
    wanted = run_of(micro, rounds=1, prompts="list.txt")
    assert command(*wanted).code == 0
    Path("list.txt").write_text("cat\nfox\n")
    refused(command(*wanted), "began with other inputs: prompts ")


def test_a_finished_run_of_another_scorer_is_refused_where_that_can_be_told(
    command: Command, micro: Path, half: Path
) -> None:
    path = seed_folder(half, micro) / "provenance.json"
    facts = json.loads(path.read_text()) | {"ended": "2030-01-01T00:00:00+00:00"}
    facts["inputs"]["scorers"] = {"jpeg_size": "code", "image_reward": "of weights not here"}
    path.write_text(json.dumps(facts))
    assert command(*run_of(micro)).code == 0
    facts["inputs"]["scorers"] = {"jpeg_size": "another"}
    path.write_text(json.dumps(facts))
    refused(command(*run_of(micro)), "began with other inputs: scorers ")


def test_finished_runs_are_looked_at_without_reading_the_model_again(
    micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(path=str(micro))
    name = fingerprint(source)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert fingerprint(source) == name
