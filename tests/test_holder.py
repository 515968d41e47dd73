"""Who works in a folder: the living are waited for, and the dead are not."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.errors import InUseError, RunError
from d3po_bench.runs import files, holder
from d3po_bench.runs.files import LOCK, taken
from d3po_bench.runs.holder import DEAD, Holder, beating
from d3po_bench.training.trainer import Trainer
from tests.commands import Command, refused, run_of, seed_folder, written

HERE = Holder.here()
FAR = replace(HERE, host="elsewhere", token="theirs")


def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


@pytest.mark.parametrize(
    ("who", "alive"),
    [
        (FAR, True),
        (replace(FAR, time=time.time() - DEAD - 1), False),
        (replace(HERE, pid=os.getppid()), True),
        (replace(HERE, pid=gone()), False),
        (replace(HERE, token="before the container began again"), False),
        (replace(FAR, pid=gone()), True),  # of that number here, which says nothing
    ],
)
def test_who_is_alive(who: Holder, alive: bool) -> None:
    assert who.alive is alive


def test_a_record_is_read_as_it_was_written_and_nothing_else_is_one() -> None:
    found = Holder.read(HERE.record())
    assert found is not None
    assert replace(found, time=0) == replace(HERE, time=0)
    assert len(HERE.record()) == holder.SIZE
    for data in (b"", b"{}", b"[1]", b'{"host": "a", "pid": "x", "token": "", "time": 0}', b"\xff"):
        assert Holder.read(data) is None


def test_another_machine_is_waited_for_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each machine has its own locks, or the file system has none."""
    monkeypatch.setattr(files, "SETTLED", 0)
    lock = tmp_path / LOCK
    lock.write_bytes(FAR.record())
    with (
        pytest.raises(InUseError, match=r"process \d+ on elsewhere, .* free 180 s"),
        taken(tmp_path),
    ):
        pass
    found = Holder.read(lock.read_bytes())
    assert found is not None
    assert found.token == "theirs"
    silent = FAR.record().replace(b'"time": ', b'"time": -')
    lock.write_bytes(silent)
    with taken(tmp_path):
        now = Holder.read(lock.read_bytes())
        assert now is not None
        assert now.near
    assert not lock.exists()


def test_a_folder_that_was_taken_over_is_left_to_its_new_process(tmp_path: Path) -> None:
    lock = tmp_path / LOCK

    def work() -> None:
        with taken(tmp_path) as hold:
            lock.write_bytes(FAR.record())
            hold.beat()  # which does not speak for the other one
            with pytest.raises(RunError, match="taken over by process"):
                hold.require()

    with pytest.raises(RunError, match="taken over by process"):
        work()
    found = Holder.read(lock.read_bytes())
    assert found is not None
    assert found.token == "theirs"


def test_the_refused_are_told_who_works_there(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("wb") as other:
        other.write(replace(HERE, pid=77).record())
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InUseError, match=r"\(process 77 on "), taken(tmp_path):
            pass


def test_signs_of_life_come_while_others_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "BEAT", 0.01)
    several, calls = threading.Event(), list[int]()

    def write() -> None:
        calls.append(1)
        if len(calls) == 3:
            several.set()
        raise OSError

    with beating(write):
        assert several.wait(30)


@pytest.mark.parametrize(
    "asked", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_stop_ends_after_its_round(
    asked: signal.Signals, command: Command, micro: Path, finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train_round: Callable[..., Any] = Trainer.train_round

    def asking(self: Trainer, *arguments: Any) -> Any:
        os.kill(os.getpid(), asked)
        return train_round(self, *arguments)

    folder = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_round", asking)
        done = command(*run_of(micro, "--seeds", "2", checkpoint_every=9))
    refused(done, "seed 0: Stopped as asked, after round 1.", "before its first round", code=75)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 1
    assert (folder / "checkpoints/last.safetensors").exists()
    assert not seed_folder(Path("runs"), micro, 1).exists()
    assert signal.getsignal(asked) is signal.SIG_DFL
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)


def test_asked_twice_it_ends_at_once(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asking(self: Trainer, *arguments: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_round", asking)
    refused(command(*run_of(micro)), "Interrupted.", code=1)
