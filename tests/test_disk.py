"""A full, limited or read-only disk: one line that names the file, and nothing is corrupt.

Once there is room again, the same command ends with the bytes of a run that always had it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.errors import RunError
from d3po_bench.launch.job import attempt
from tests.commands import ROOT, Command, files, refused, run_of, seed_folder, written
from tests.feedback_round import new_round

PAGE = 4096


# ---- anywhere: errors of the system, raised where a file is opened


@pytest.mark.parametrize(
    ("name", "number", "code", "said"),
    [
        ("config.json", errno.EROFS, 2, "Read-only file system"),
        ("last.safetensors", errno.ENOSPC, 1, "the disk is full"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("provenance.json", errno.EACCES, 2, "Permission denied"),
                ("metrics.jsonl", errno.ENOSPC, 1, "the disk is full"),
                ("timing.jsonl", errno.EFBIG, 1, "there is a limit on the size of files"),
                ("eval.csv", errno.EIO, 1, "the disk has an input/output error"),
                ("butterfly.png", errno.EDQUOT, 1, "the disk quota is used up"),
            )
        ),
    ],
)
def test_a_file_that_cannot_be_written_is_named_and_the_run_resumes_later(
    name: str, number: int, code: int, said: str,
    command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    open_ = Path.open

    def broken(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == f"{name}.part":
            raise OSError(number, os.strerror(number), str(self))
        return open_(self, *args, **kwargs)

    folder = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        done = command(*run_of(micro))
    assert done.code == code
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert f"/{name} cannot be written: {said}." in line
    assert "Traceback" not in done.err
    assert not [f for f in files(Path()) if f.endswith((".part", ".lock"))]
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)
    assert files(folder) == files(finished)


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "name"), [(2 * PAGE, "last.safetensors"), (0, "config.json"), (20, "config.json")]
)
def test_a_limit_on_the_size_of_files_is_told(
    size: int, name: str, command: Command, micro: Path, finished: Path
) -> None:
    folder = seed_folder(Path("runs"), micro)
    with at_most(size):
        done = command(*run_of(micro))
    refused(done, f"/{name} cannot be written: there is a limit on the size", code=1)
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)


def test_a_limit_that_ends_the_figures_is_told(command: Command, finished: Path) -> None:
    with at_most(2 * PAGE):
        done = command("plot", finished, "--out", "figures")
    refused(done, "figures/curves.png cannot be written: there is a limit", code=1)
    assert files(Path()) == set()
    assert command("plot", finished, "--out", "figures").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["feedback", "status", "ROUND"]])
def test_output_to_a_full_device_is_told(arguments: list[str], tmp_path: Path) -> None:
    new_round(tmp_path / "round", number=1, size=4)
    words = [str(tmp_path / "round") if a == "ROUND" else a for a in arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "d3po_bench", *words], stdout=full, stderr=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip
    line = "error: The output cannot be written: the disk is full. Fix that and run the same"
    assert done.stderr == f"{line} command again.\n"
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_stderr_leaves_the_exit_status() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "d3po_bench", "lisst"]
        assert subprocess.run(command, stderr=full, cwd=ROOT).returncode == 2


def test_a_full_disk_that_no_file_is_named_with_is_told() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    end = attempt(full, "")
    assert isinstance(end.problem, RunError)
    assert str(end.problem).startswith("The output cannot be written: the disk is full.")
    assert end.trace == ""


# ---- a disk of our own


def mount(*arguments: str | Path) -> None:
    """Call `mount`, or skip the test."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 4 MiB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, room: int) -> Path:
    """Leave `room` bytes on the disk; returns the file that fills the rest."""
    path = disk / "ballast"
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    path.write_bytes(bytes(max(0, free - room) // PAGE * PAGE))
    return path


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again(
    disk: Path, command: Command, micro: Path, finished: Path
) -> None:
    arguments = run_of(micro, "--out", disk / "runs")
    folder = seed_folder(disk / "runs", micro)
    named: list[str] = []
    room, before = 0, set[str]()
    for _ in range(100):
        ballast = fill(disk, room)
        done = command(*arguments)
        if done.code == 0:
            break
        line = refused(done, "cannot be written: the disk is full", code=1)
        named.append(Path(line.removeprefix("error: ").split(" cannot be")[0]).name)
        assert not [f for f in files(disk) if f.endswith((".part", ".lock"))]
        # A page more until something new fits, then none again: every file meets a full disk.
        room = room + PAGE if files(disk) == before else 0
        before = set(files(disk))
    ballast.unlink()
    assert set(named) >= {"config.json", "metrics.jsonl", "eval.csv", "last.safetensors", "lora"}
    assert written(folder) == written(finished)
    assert files(folder) == files(finished)


@pytest.mark.slow
def test_a_disk_too_full_for_the_figures(disk: Path, command: Command, finished: Path) -> None:
    assert command("plot", finished, "--out", "figures").code == 0
    first = Path("figures/curves.png").stat().st_size
    for room, name in ((0, "curves.png"), (-(-first // PAGE) * PAGE, "curves.svg")):
        ballast = fill(disk, room)
        done = command("plot", finished, "--out", disk / "figures")
        refused(done, f"{disk}/figures/{name} cannot be written: the disk is full", code=1)
    ballast.unlink()
    assert command("plot", finished, "--out", disk / "figures").code == 0
    names = files(Path("figures"))
    assert written(disk / "figures", tuple(names)) == written(Path("figures"), tuple(names))


def test_a_read_only_disk(disk: Path, command: Command, micro: Path, half: Path) -> None:
    shutil.copytree(half, disk / "runs")
    arguments = run_of(micro, "--out", disk / "runs")
    folder = seed_folder(disk / "runs", micro)
    before = written(disk, tuple(files(disk)))
    mount("-o", "remount,ro", disk)
    refused(command(*arguments), str(folder), "cannot be written: Read-only file system", "--out")
    done = command("plot", folder, "--unfinished", "--out", disk / "figures")
    refused(done, "figures/curves.png", "cannot be written: Read-only file system")
    assert written(disk, tuple(files(disk))) == before
    mount("-o", "remount,rw", disk)
    assert command(*arguments).code == 0
    assert files(folder) == files(seed_folder(half, micro))
