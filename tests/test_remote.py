"""Run folders in object storage: killed and resumed to the same bytes, and read from there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3po_bench import api
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs import remote
from d3po_bench.runs.holder import Holder
from d3po_bench.runs.remote import Mirror, address_of, workplace
from d3po_bench.runs.run import RunFolder
from d3po_bench.training.trainer import Trainer
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

OUT = "memory://bucket/runs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and an empty memory://."""
    import fsspec

    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "SETTLED", 0)
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


def there(folder: Path) -> Mirror:
    """The address of a run, seen from a machine that has nothing of it."""
    found = Mirror.of(folder)
    assert found is not None
    return Mirror(found.address, Path("fresh"))


def test_a_workplace_says_which_address_it_is_of(tmp_path: Path) -> None:
    assert address_of(workplace("s3://bucket/a/b/") / "tiny") == "s3://bucket/a/b/tiny"
    assert address_of(tmp_path / "runs") is None


def test_a_run_that_was_killed_goes_on_from_there_to_the_same_bytes(
    command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = seed_folder(workplace(OUT), micro)

    def in_round_2(trainer: Trainer, *_: Any) -> bool:
        return trainer.round == 1

    with monkeypatch.context() as patch:
        stop = Stop(Trainer.train_round, in_round_2, KeyboardInterrupt())
        patch.setattr(Trainer, "train_round", stop)
        assert command(*run_of(micro, "--out", OUT)).code == 1
    shutil.rmtree(workplace(OUT))  # that was on another machine
    done = command(*run_of(micro, "--out", OUT))
    assert done.code == 0, done
    assert f"the runs are kept in {OUT}" in done.err
    assert len(RunFolder(folder).facts["sessions"]) == 2
    assert written(folder) == written(finished)
    there(folder).pull()
    expected = {n: data for n, data in contents(folder).items() if n not in remote.OWN}
    index = {remote.INDEX}
    assert {n: data for n, data in contents(Path("fresh")).items() if n not in index} == expected


@pytest.mark.parametrize(
    "number", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 9, 14))]
)
def test_wherever_an_upload_breaks_off_the_run_resumes(
    number: int, command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    memory = type(fsspec.filesystem("memory"))
    left = iter(range(number))

    def broken(self: Any, lpath: Any, rpath: Any, **_: Any) -> None:
        if next(left, None) is None:
            raise OSError("the connection is gone")
        self.pipe_file(rpath, Path(lpath).read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(memory, "put_file", broken)
        done = command(*run_of(micro, "--out", OUT))
    refused(done, "memory://bucket/runs", "the connection is gone", "it resumes", code=1)
    shutil.rmtree(workplace(OUT))
    assert command(*run_of(micro, "--out", OUT)).code == 0
    assert written(seed_folder(workplace(OUT), micro)) == written(finished)


def test_a_second_writer_is_refused_and_the_dead_are_not_waited_for(
    command: Command, micro: Path
) -> None:
    mirror = there(seed_folder(workplace(OUT), micro))
    far = replace(Holder.here(), host="elsewhere")
    mirror.files.pipe_file(f"{mirror.root}/.lock", far.record())
    line = refused(
        command(*run_of(micro, "--out", OUT)), "running in memory://bucket/runs/", code=2
    )
    assert "on elsewhere" in line
    mirror.files.pipe_file(f"{mirror.root}/.lock", far.record().replace(b'"time": ', b'"time": -'))
    assert command(*run_of(micro, "--out", OUT)).code == 0
    assert ".lock" not in mirror._there()


def test_what_was_taken_over_is_not_written(tmp_path: Path) -> None:
    mirror = Mirror(OUT, tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows").write_text("mine")
    with mirror.held():
        mirror.files.pipe_file(f"{mirror.root}/.lock", replace(Holder.here(), token="x").record())
        with pytest.raises(RunError, match="taken over by process"):
            mirror.push()
    assert [*mirror._there()] == [".lock"]


def test_runs_are_read_from_their_address(command: Command, micro: Path) -> None:
    assert command(*run_of(micro, "--out", OUT)).code == 0
    shutil.rmtree(workplace(OUT))
    run = f"{OUT}/{seed_folder(Path(), micro)}"
    shown = command("show", run)
    assert "rounds     2 of 2" in shown.out
    assert command("report", OUT).code == 0
    assert command("plot", OUT, "--out", "figures").code == 0
    assert not workplace(OUT).exists()  # what reads leaves the place of work alone
    assert len(api.load_runs(OUT).folders) == 1
    copied = files(remote.copy(OUT))
    assert not [name for name in copied if "checkpoints" in name or ".lock" in name]
    assert [name for name in copied if name.endswith("pytorch_lora_weights.safetensors")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "memory://none"), "There is nothing in memory://none"),
        (("plot", "nosuch://a/b"), "nosuch://a/b cannot be read"),
        (("export", OUT, "--format", "kohya", "--out", "s3://a/b"), "s3://a/b is not on this"),
    ],
)
def test_other_addresses_are_refused(
    arguments: tuple[str, ...], said: str, command: Command
) -> None:
    assert said in command(*arguments).err


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.fsspec", None)
    with pytest.raises(UserError, match=r"d3po-bench\[storage\]"):
        Mirror("s3://bucket/runs", Path())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket of moto's S3 server, whose packages are at odds with ours."""
    moto = shutil.which(os.environ.get("MOTO_SERVER", "moto_server"))
    if moto is None:
        pytest.skip("needs moto_server: pipx install 'moto[server]', or MOTO_SERVER=its path")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with (
        (tmp_path / "moto.log").open("w") as log,
        subprocess.Popen([moto, "-p", str(port)], stdout=log, stderr=log) as server,
    ):
        try:
            _make_bucket(f"http://127.0.0.1:{port}/bucket")
            yield "s3://bucket/runs"
        finally:
            server.terminate()


def _make_bucket(address: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="PUT")):
                return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.mark.slow
def test_on_s3_a_killed_process_is_resumed_by_another_machine(
    bucket: str, command: Command, micro: Path, tmp_path: Path
) -> None:
    arguments = run_of(micro, "--out", bucket, rounds=30, eval_every=0)
    folder = seed_folder(workplace(bucket), micro)
    with subprocess.Popen([sys.executable, "-m", "d3po_bench", *arguments], cwd=ROOT) as process:
        end = time.monotonic() + 300
        while len(RunFolder(folder).metrics) < 3:  # then a checkpoint was uploaded
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    assert not RunFolder(folder).finished
    shutil.rmtree(tmp_path / "cache")
    assert command(*arguments).code == 0
    assert len(RunFolder(folder).facts["sessions"]) == 2
    assert command(*run_of(micro, rounds=30, eval_every=0)).code == 0
    names = ("metrics.jsonl", "lora/pytorch_lora_weights.safetensors")
    assert written(folder, names) == written(seed_folder(Path("runs"), micro), names)
