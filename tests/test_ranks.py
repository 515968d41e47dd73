"""One run on several ranks: the bytes of one process, and an end in one line.

Ranks are forked here, from a process that has everything imported; the slow tests start them as
people do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.state  # noqa: F401  # once, for all forked ranks
import pytest
import torch

from d3po_bench import machine
from d3po_bench.cli import main
from d3po_bench.diffusion import parallel, sampling
from d3po_bench.diffusion import update as updating
from d3po_bench.errors import UserError
from d3po_bench.launch import local, ranks
from d3po_bench.launch.places import local as places_local
from d3po_bench.runs.files import taken
from d3po_bench.runs.run import RunFolder
from d3po_bench.runs.store import RunStore
from d3po_bench.scoring import Guarded
from d3po_bench.training.trainer import Trainer
from tests.commands import (
    ROOT,
    Command,
    Outcome,
    refused,
    run_of,
    seed_folder,
    written,
)

METHODS = (
    "d3po", "ddpo", "dpok", "preferred_images", "reward_weighted", "diffusion_dpo", "kto",
)  # fmt: skip
SPLIT = {
    "prompts_per_round": 5, "sample_batch": 4, "reference_batch": 7, "micro_batch": 3,
    "decode_batch": 4, "sampling_steps": 2, "units_per_update": 2, "eval_prompts": 3,
    "eval_images": 1, "eval_every": 2, "rounds": 2, "learning_rate": 3e-3, "threads": 1,
    "dtype": "fp32",
}  # fmt: skip
"""Pieces of work that no number of ranks divides."""

GRID = f"""
methods = {list(METHODS)}
objectives = ["incompress"]
seeds = 1
model = "MODEL"
preset = "official_code"
[set]
{chr(10).join(f"{key} = {value!r}" for key, value in SPLIT.items())}
[method.d3po]
update_every = "timestep"  # steps of one piece: the other ranks have none
[method.ddpo]
dtype = "fp16"  # with loss scaling
[method.preferred_images]
full = true
"""


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CONTEXT", multiprocessing.get_context("fork"))


def bytes_of(out: Path, model: Path) -> dict[str, bytes]:
    """What every run of the grid has written; not what they share, which is named by the ranks."""
    folder = seed_folder(out, model).parents[1]
    kinds = (".jsonl", ".csv", ".png", ".safetensors")
    paths = [p for p in folder.rglob("*") if p.suffix in kinds and "checkpoints" not in p.parts]
    own = [p for p in paths if p.name == "timing.jsonl"]  # the seconds that it took
    own += [p for p in paths if p.name.startswith("base-evaluation-")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths) if p not in own}


@pytest.fixture(scope="module")
def grid(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a grid of all methods, and in `alone` its runs by one process."""
    home = tmp_path_factory.mktemp("grid")
    (home / "grid.toml").write_text(GRID.replace("MODEL", str(micro)))
    torch.set_num_threads(1)
    given = ["--device", "cpu", "--jobs", "1", "--out", str(home / "alone")]
    main(["sweep", str(home / "grid.toml"), *given])
    return home


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 2])
def test_ranks_write_the_bytes_of_one_process(
    count: int, forked: None, micro: Path, grid: Path, command: Command
) -> None:
    given = ("--device", "cpu", "--ranks", str(count))
    done = command("sweep", grid / "grid.toml", *given, "--out", "several")
    assert done.code == 0, done.err
    alone, found = bytes_of(grid / "alone", micro), bytes_of(Path("several"), micro)
    assert sum(name.endswith(".safetensors") for name in alone) == len(METHODS)
    assert sum(name.endswith(("metrics.jsonl", "eval.csv")) for name in alone) == 2 * len(METHODS)
    assert found.keys() == alone.keys()
    assert [name for name in alone if found[name] != alone[name]] == []
    facts = RunFolder(seed_folder(Path("several"), micro)).facts
    assert [session["ranks"] for session in facts["sessions"]] == [count]


# ---- ranks that end


SMALL = {"sample_batch": 2, "micro_batch": 1}
"""Pieces for three ranks."""


@pytest.fixture(scope="module")
def alone(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --out of two seeds of one process."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    main(run_of(micro, "--out", out, "--seeds", "2", "--jobs", "1", **SMALL))
    return out


def dies(rank: int, round_: int) -> Callable[[], None]:
    """Kill this process as the kernel does, if it is that rank of three in that round."""

    def check() -> None:
        if (parallel.world(), parallel.rank(), NOW["round"]) == (3, rank, round_):
            os.kill(os.getpid(), signal.SIGKILL)

    return check


NOW = {"round": 0}
"""The round that this process is in."""


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """Have something done at a stage of a run."""
    begin = Trainer.train_round

    def counted(trainer: Trainer, *args: Any) -> Any:
        NOW["round"] = trainer.round + 1
        return begin(trainer, *args)

    monkeypatch.setattr(Trainer, "train_round", counted)
    places = {
        "sample": (sampling, "_walk"), "update": (updating, "_backward"),
        "score": (Guarded, "__call__"), "checkpoint": (RunStore, "checkpoint"),
    }  # fmt: skip

    def place(stage: str, act: Callable[[], None]) -> None:
        owner, name = places[stage]
        target = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            act()
            return target(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return place


At = Callable[[str, Callable[[], None]], None]


@pytest.mark.parametrize(
    ("stage", "rank", "kept"),
    [
        ("update", 2, 1),
        *(
            pytest.param(stage, rank, 1, marks=pytest.mark.slow)
            for stage, rank in (("sample", 1), ("update", 0), ("checkpoint", 0))
        ),
    ],
)
def test_a_killed_rank_ends_the_others_and_any_number_resumes(
    stage: str, rank: int, kept: int, forked: None, micro: Path, alone: Path, at: At,
    command: Command,
) -> None:  # fmt: skip
    at(stage, dies(rank, 2))
    began = time.monotonic()
    done = command(*run_of(micro, "--ranks", "3", **SMALL))
    assert time.monotonic() - began < 100
    folder = seed_folder(Path("runs"), micro)
    refused(done, f"Rank {rank} was killed (out of memory?). ", "it resumes", code=1)
    where = {"checkpoint": "the stage writing after round 2"}.get(stage, f"the stage {stage}")
    assert f"lost the others in {where}" in done.err
    checkpoint = RunStore(folder).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[1]["round"] == kept
    again = command(*run_of(micro, "--ranks", "2", **SMALL))
    assert again.code == 0, again.err
    assert written(folder) == written(seed_folder(alone, micro))
    assert [s.get("ranks") for s in RunFolder(folder).facts["sessions"]] == [3, 2]


@pytest.mark.slow
def test_a_rank_that_takes_too_long_is_told(
    forked: None, micro: Path, at: At, command: Command
) -> None:
    at("update", lambda: time.sleep(30 * (parallel.rank() == 1 and NOW["round"] == 2)))
    done = command(*run_of(micro, "--ranks", "2", micro_batch=1, rank_timeout=10))
    refused(done, "Round 2, seed 0: Rank 0 of 2 lost the others in the stage update: ",
            "or took more than 10 s (--set rank_timeout=...)", code=1)  # fmt: skip


def fails(rank: int, problem: BaseException) -> Callable[[], None]:
    def check() -> None:
        if parallel.rank() == rank and NOW["round"] == 2 and NOW.get("seed", 0) == 0:
            NOW["seed"] = 1  # the next seed has no problem
            raise problem

    return check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "rank", "problem", "said"),
    [
        (
            "update",
            1,
            torch.OutOfMemoryError("CUDA out of memory."),
            "Out of memory with micro_batch=1.",
        ),
        ("sample", 1, KeyError("mine"), "Failed with RuntimeError: Rank 1: KeyError: 'mine' (tr"),
        ("score", 0, SystemExit(3), "Failed with "),
        ("checkpoint", 0, OSError(28, "No space left on device", "x"), "x cannot be read or writ"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_the_next_seed_runs(
    stage: str, rank: int, problem: BaseException, said: str, forked: None, micro: Path, at: At,
    command: Command,
) -> None:  # fmt: skip
    at(stage, fails(rank, problem))
    more = ("--ranks", "2", "--seeds", "2")
    done = command(*run_of(micro, *more, micro_batch=1, sample_batch=2))
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert done.code != 0
    assert errors[0].startswith("error: seed 0: ")
    assert said in errors[0]
    assert ("Traceback" in done.err) == ("traceback above" in done.err)
    assert not RunFolder(seed_folder(Path("runs"), micro, 0)).finished
    assert RunFolder(seed_folder(Path("runs"), micro, 1)).finished


@pytest.mark.slow
def test_what_the_first_rank_refuses_all_refuse(
    forked: None, micro: Path, command: Command
) -> None:
    folder = seed_folder(Path("runs"), micro)
    with taken(folder):
        refused(command(*run_of(micro, "--ranks", "2")), f"Another process is running in {folder}")
    wrong = command(*run_of(micro, "--ranks", "2", lora_targets="nothing"))
    refused(wrong, "lora_targets=nothing names no layer")


@pytest.mark.slow
def test_different_weights_on_the_ranks_stop_the_run(
    forked: None, micro: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = updating._apply

    def otherwise(optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        apply(optimizer, scaler)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0] += 1e-6 * parallel.rank()

    monkeypatch.setattr(updating, "_apply", otherwise)
    done = command(*run_of(micro, "--ranks", "2"))
    refused(done, "Round 1, seed 0: The ranks have come to different weights", code=1)


@pytest.mark.parametrize(
    ("more", "launched", "said"),
    [
        (("--ranks", "2", "--jobs", "2"), "1", "With several ranks, runs are made one after the"),
        (("--ranks", "2"), "4", "A launcher has started 4 ranks, so --ranks 2 cannot start more"),
        (("--jobs", "2"), "4", "so --jobs 2 is not possible"),
        (("--ranks", "2", "--device", "cuda:1"), "1", "--device cuda:1 is one device, and each"),
    ],
)
def test_ranks_that_contradict_the_rest_are_refused(
    more: tuple[str, ...], launched: str, said: str, micro: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", launched)
    refused(command(*run_of(micro, *more)), said)
    assert not Path("runs").exists()


def test_of_ranks_only_the_first_tells_what_all_refuse(
    micro: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        told.append(command(*run_of(micro, "--jobs", "2")))
    assert [done.code for done in told] == [2, 2]
    assert [bool(done.err) for done in told] == [True, False]


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "device_of", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match="4 ranks need 4 GPUs, and this machine has 1"):
        ranks.require(4, None, "auto")
    monkeypatch.setattr(ranks, "device_of", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="on CUDA GPUs or on CPUs, not on mps"):
        ranks.require(2, None, "auto")


@pytest.mark.slow
def test_machines_of_several_kinds_are_refused(
    forked: None, micro: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "processors", lambda: {"cpu": f"kind {parallel.rank()}"})
    done = command(*run_of(micro, "--ranks", "2"))
    refused(done, "Rank 1 has another cpu than rank 0: kind 1, not kind 0.")


# ---- as people start them


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"),
}  # fmt: skip


@contextlib.contextmanager
def started(launcher: str, count: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command on so many ranks, none of which outlives the test."""
    ours = [sys.executable, "-m", "d3po_bench", *arguments, "--ranks", str(count)]
    if launcher != "ours":
        ours = [sys.executable, "-m", *LAUNCHERS[launcher], str(count), "-m", "d3po_bench"]
        ours += arguments
    MARK["D3PO_BENCH_TEST"] = secrets.token_hex(8)
    with subprocess.Popen(
        ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **MARK},
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            for number in processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


MARK: dict[str, str] = {}
"""In the environment of a command and of all that it starts."""


def processes(**also: str) -> list[int]:
    """Those of the command that have not ended, with these in their environment, too."""
    found, wanted = [], {f"{key}={value}".encode() for key, value in {**MARK, **also}.items()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            if wanted <= set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "count"), [("ours", 2), ("torchrun", 3), ("accelerate", 2)])
def test_every_launcher_gives_the_bytes_of_one_process(
    launcher: str, count: int, micro: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "several"
    with started(launcher, count, *run_of(micro, "--out", out, "--seeds", "2", **SMALL)) as process:
        said, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert not processes()
    assert said.count("incompress") == 1  # one table
    for seed in (0, 1):
        folder = seed_folder(out, micro, seed)
        assert written(folder) == written(seed_folder(alone, micro, seed))
        assert RunFolder(folder).facts["ranks"] == count


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds ranks in Linux's /proc")
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_of_a_launcher_ends_all_with_one_line(
    launcher: str, rank: str, micro: Path, tmp_path: Path
) -> None:
    arguments = run_of(micro, "--out", tmp_path, rounds=10**5, eval_every=0)
    with started(launcher, 2, *arguments) as process:
        end = time.monotonic() + 120
        while not list(tmp_path.rglob("last.safetensors")) and time.monotonic() < end:
            time.sleep(0.1)
        (victim,) = processes(RANK=rank)
        os.kill(victim, signal.SIGKILL)
        error = process.communicate(timeout=100)[1]
        assert not processes()
    assert process.returncode == 1
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "lost the others in" in lines[0] or "Interrupted" in lines[0]


@pytest.mark.parametrize("lost", [False, True])
def test_a_rank_that_has_lost_the_others_says_so_before_its_launcher_ends_it(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "lost", lambda: lost)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with places_local._terminable():
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if lost else before)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_command_that_started_them(
    number: signal.Signals, micro: Path, tmp_path: Path
) -> None:
    arguments = run_of(micro, "--out", tmp_path, rounds=10**5, eval_every=0)
    with started("ours", 2, *arguments) as process:
        end = time.monotonic() + 120
        while not list(tmp_path.rglob("last.safetensors")) and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(number)
        error = process.communicate(timeout=100)[1]
        while processes() and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes()
    assert not list(tmp_path.rglob(".lock"))
    if number != signal.SIGKILL:
        assert process.returncode == 1
        refused(Outcome(1, "", error), "Interrupted. The same command resumes", code=1)
