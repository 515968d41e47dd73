"""Runs that stop: interrupted, out of memory or room, or with a worker that was killed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from d3po_bench.d3po import D3PO
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch import launch
from d3po_bench.launch.job import died
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.runs.run import RunFolder
from d3po_bench.runs.store import RunStore
from d3po_bench.training.trainer import Trainer
from tests.commands import (
    ROOT,
    Command,
    Outcome,
    Stop,
    files,
    refused,
    run_of,
    seed_folder,
    written,
)


def in_round_2(trainer: Trainer, *_: Any) -> bool:
    return trainer.round == 1


def of_round(number: int) -> Callable[..., bool]:
    return lambda store, tensors, facts: bool(facts["round"] == number)


@pytest.mark.parametrize(
    ("owner", "name", "when", "rounds_kept"),
    [
        (Trainer, "train_round", in_round_2, 1),
        pytest.param(RunStore, "checkpoint", of_round(0), 0, marks=pytest.mark.slow),
        pytest.param(RunStore, "checkpoint", of_round(1), 1, marks=pytest.mark.slow),
        pytest.param(RunStore, "checkpoint", of_round(2), 2, marks=pytest.mark.slow),
        pytest.param(
            RunStore, "log", lambda store, *_: len(store.metrics) == 1, 1, marks=pytest.mark.slow
        ),
        pytest.param(StableDiffusion, "save", lambda *_: True, 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    owner: type, name: str, when: Callable[..., bool], rounds_kept: int,
    command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Stop(getattr(owner, name), when, KeyboardInterrupt()))
        done = command(*run_of(micro))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: Interrupted. The same command resumes")
    stopped = RunFolder(folder)
    assert len(stopped.metrics) == rounds_kept
    assert not stopped.finished
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)
    assert files(folder) == files(finished)


@pytest.mark.slow
def test_a_loss_of_nan_ends_the_run_and_keeps_what_is_written(
    command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    loss = D3PO.loss

    def broken(self: D3PO, *args: Any) -> Any:
        value, metrics = loss(self, *args)
        calls.append(1)
        return (value if len(calls) == 1 else value * torch.nan), metrics

    with monkeypatch.context() as patch:
        patch.setattr(D3PO, "loss", broken)
        done = command(*run_of(micro))
    refused(done, "Round 2, seed 0", "nan for loss", "learning_rate", code=1)
    folder = seed_folder(Path("runs"), micro)
    assert (folder / "metrics.jsonl").read_text().splitlines() == (
        finished / "metrics.jsonl"
    ).read_text().splitlines()[:1]
    assert not (folder / "lora").exists()
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)


@pytest.mark.slow
def test_a_failed_seed_does_not_stop_the_next(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(Trainer.train_round, lambda t, _: t.config.seed == 0, RunError("told"))
    monkeypatch.setattr(Trainer, "train_round", stop)
    refused(command(*run_of(micro, "--seeds", "2")), "Round 1, seed 0", code=1)
    assert not RunFolder(seed_folder(Path("runs"), micro, 0)).finished
    assert RunFolder(seed_folder(Path("runs"), micro, 1)).finished


@pytest.mark.parametrize(
    "writes", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 12, 14, 25, 28))]
)
def test_a_full_disk_ends_the_run_which_resumes_when_there_is_room(
    writes: int, command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(writes))
    fsync = os.fsync

    def full(number: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    folder = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = command(*run_of(micro))
    refused(done, "cannot be written: the disk is full", code=1)
    assert not [name for name in files(Path()) if name.endswith((".part", ".lock"))]
    assert folder.exists() == (writes > 0)
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)


def test_a_full_disk_at_the_lora_is_told(
    command: Command, micro: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(StableDiffusion, "save", Stop(None, lambda *_: True, problem))
    refused(command(*run_of(micro)), "lora cannot be written: the disk is full", code=1)
    assert not RunFolder(seed_folder(half, micro)).finished


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        pytest.param(
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(RuntimeError("std::bad_alloc"), marks=pytest.mark.slow),
        pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), marks=pytest.mark.slow),
    ],
)
def test_too_little_memory_says_how_to_need_less(
    problem: Exception, command: Command, micro: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "save", Stop(None, lambda *_: True, problem))
    refused(command(*run_of(micro)), "Out of memory.", "--set micro_batch=8", code=1)


def wait_for(condition: Callable[[], bool]) -> None:
    """Look every tenth of a second, for three minutes at most."""
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def in_group(number: int) -> bool:
    """Whether a process of that group is left."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "jobs", "code", "said"),
    [
        (signal.SIGTERM, 2, 75, ["error: seed 0", "Stopped as asked, after round"]),
        (signal.SIGINT, 1, 1, ["error: Interrupted. The same command resumes"]),
    ],
)
def test_a_stopped_command_takes_its_workers_along_and_keeps_its_rounds(
    number: signal.Signals, jobs: int, code: int, said: list[str], micro: Path, tmp_path: Path
) -> None:
    arguments = run_of(
        micro, "--seeds", str(jobs), "--jobs", str(jobs),
        rounds=10**5, eval_every=0, checkpoint_every=10**5,
    )  # fmt: skip

    def rounds() -> list[int]:
        return [p.read_text().count("\n") for p in tmp_path.rglob("metrics.jsonl")]

    with subprocess.Popen(
        [sys.executable, "-m", "d3po_bench", *arguments, "--out", tmp_path / "runs"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        # A background job of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: len(rounds()) == jobs and min(rounds()) > 1)
            assert not list(tmp_path.rglob("*.safetensors"))
            process.send_signal(number)
            error = process.communicate(timeout=180)[1]
            wait_for(lambda: not in_group(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert all(words in error.splitlines()[-1] for words in said)
    assert "Traceback" not in error
    assert not [name for name in files(tmp_path) if name.endswith((".lock", ".part"))]
    for folder in (path.parent for path in tmp_path.rglob("metrics.jsonl")):
        store = RunStore(folder)
        checkpoint = store.load_checkpoint()
        assert checkpoint is not None
        # the signal may come between a round's line and its state
        assert checkpoint[1]["round"] in (len(store.metrics) - 1, len(store.metrics))


def endless(micro: Path, out: Path) -> subprocess.Popen[str]:
    """A command with two workers that will not end by itself, in a process group of its own."""
    arguments = run_of(micro, "--seeds", "2", "--jobs", "2", rounds=10**5, eval_every=0)
    return subprocess.Popen(
        [sys.executable, "-m", "d3po_bench", *arguments, "--out", out],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_takes_its_workers_along(micro: Path, tmp_path: Path) -> None:
    with endless(micro, tmp_path / "runs") as process:
        try:
            wait_for(lambda: len(list(tmp_path.rglob("metrics.jsonl"))) == 2)
            process.kill()
            wait_for(lambda: not list(tmp_path.rglob(".lock")))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


SLEEPER = """
import sys, time
from d3po_bench.launch.local import side_by_side

def sleep(task, tell):
    print("asleep", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    side_by_side(sleep, [1, 2], 2, lambda task, result: True)
"""


def test_workers_whose_tasks_tell_nothing_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    with subprocess.Popen(
        [sys.executable, "sleeper.py"], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["asleep\n"] * 2
            process.kill()
            process.wait()
            wait_for(lambda: not in_group(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_run_whose_folder_is_moved_ends_with_that(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seed_folder(Path("runs"), micro)
    train_round = Trainer.train_round

    def moving(self: Trainer, *arguments: Any) -> Any:
        found = train_round(self, *arguments)
        if folder.exists():
            folder.rename("moved")
        return found

    monkeypatch.setattr(Trainer, "train_round", moving)
    done = command(*run_of(micro))
    refused(done, f"{folder} was moved or removed while a command worked in it", code=1)
    assert "Runs are in" not in done.err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, "The worker process was killed (out of memory?)."),
        (-signal.SIGSEGV, f"process died of signal {signal.SIGSEGV:d} (Segmentation fault)."),
        (3, "process ended with status 3."),
    ],
)
def test_what_ended_a_worker_is_told(code: int, said: str) -> None:
    problem = died(code, "").problem
    assert isinstance(problem, RunError)
    assert said in str(problem)


def workers(number: int) -> list[int]:
    """The worker processes of a command."""
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in Linux's /proc")
def test_workers_that_the_kernel_killed_for_their_memory_are_told(
    micro: Path, tmp_path: Path
) -> None:
    with endless(micro, tmp_path / "runs") as process:
        try:
            wait_for(lambda: len(list(tmp_path.rglob("metrics.jsonl"))) == 2)
            for worker in workers(process.pid):
                os.kill(worker, signal.SIGKILL)
            error = process.communicate(timeout=180)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    refused(Outcome(process.returncode, "", error), "error: seed 0, seed 1: The worker",
            "killed (out of memory?)", "--jobs 1", "--set micro_batch=8", code=1)  # fmt: skip


def test_errors_of_several_seeds_become_one_line() -> None:
    one, two = RunError("one."), UserError("two.")
    failed = {"seed 0": one, "seed 1": two, "seed 3": one}
    with pytest.raises(RunError, match=r"^seed 0, seed 3: one\. seed 1: two\.$"):
        launch.require_all(failed)
    with pytest.raises(UserError, match=r"^two\.$"):
        launch.require_all({"": two})
    many = {f"seed {n}": RunError("Stopped.") for n in range(99)}
    with pytest.raises(RunError, match=r"^seed 0, seed 1, seed 2, seed 3 and 95 others: Stop"):
        launch.require_all(many)
