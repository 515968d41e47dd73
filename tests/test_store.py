"""A run folder: never half a file, one process at a time, its own config only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs import store, tensors
from d3po_bench.runs.store import BEFORE, NEWEST, RunStore
from tests.damage import Harm, failing, flipped, flipped_in_the_header, listed, truncated

CONFIG = RunConfig(method="d3po", objective="incompress")


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """A started run."""
    folder = tmp_path / "seed-0"
    with RunStore.open(folder, CONFIG, resume=True) as started:
        started.start(CONFIG, inputs={"model": "a1", "prompts": "b2"}, device="cpu")
    return RunStore(folder)


def test_a_run_resumes_with_the_inputs_that_it_began_with(run: RunStore) -> None:
    assert run.provenance()["inputs"] == {"model": "a1", "prompts": "b2"}
    run.start(CONFIG, inputs={"model": "a1", "prompts": "b2"})
    before = (run.folder / "provenance.json").read_bytes()
    with pytest.raises(UserError, match=r"began with other inputs: prompts b2, not c3"):
        run.start(CONFIG, inputs={"model": "a1", "prompts": "c3"}, after=1)
    assert (run.folder / "provenance.json").read_bytes() == before
    run.start(CONFIG, inputs={"model": "a1", "prompts": "c3"})  # nothing is kept: it begins anew
    assert run.provenance()["inputs"]["prompts"] == "c3"


# ---- a folder is one run's


def test_a_folder_that_was_not_used_is_gone(tmp_path: Path) -> None:
    def use() -> None:
        with RunStore.open(tmp_path / "a" / "b", CONFIG, resume=True):
            assert listed(tmp_path) == ["a", "a/b", "a/b/.lock"]
            raise UserError("no prompts")

    with pytest.raises(UserError, match="no prompts"):
        use()
    assert listed(tmp_path) == []


def test_a_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with RunStore.open(tmp_path / "a" / "b", CONFIG, resume=True):
        pass
    assert listed(tmp_path) == ["a"]


def test_a_started_run_keeps_config_and_provenance(run: RunStore) -> None:
    assert listed(run.folder) == ["config.json", "provenance.json"]
    assert (run.folder / "config.json").read_text() == CONFIG.to_json()


def test_a_second_process_is_refused(run: RunStore) -> None:
    with (run.folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="Another process is running"),
            RunStore.open(run.folder, CONFIG, resume=True),
        ):
            pass
        assert (run.folder / ".lock").exists()  # the other one's
    with (
        RunStore.open(run.folder, CONFIG, resume=True),
        pytest.raises(UserError, match="Another process is running"),
        RunStore.open(run.folder, CONFIG, resume=True),
    ):
        pass


def test_a_lock_file_that_was_just_removed_does_not_count(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_first(file: Any, how: int) -> None:
        (run.folder / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with (
        pytest.raises(UserError, match="Another process is running"),
        RunStore.open(run.folder, CONFIG, resume=True),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_where_files_cannot_be_locked_this_machine_keeps_others_out(
    number: int, run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre and NFS may be mounted."""
    flock = fcntl.flock

    def unable(file: Any, how: int) -> None:
        if Path(file.name).name == ".lock":  # not the one that is elsewhere
            raise OSError(number, os.strerror(number))
        flock(file, how)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(fcntl, "flock", unable)
    with RunStore.open(run.folder, CONFIG, resume=True) as opened:
        assert opened.hold is not None
        assert not opened.hold.everywhere
        with (
            pytest.raises(UserError, match="Another process is running"),
            RunStore.open(run.folder, CONFIG, resume=True),
        ):
            pass
        with RunStore.open(tmp_path / "other", CONFIG, resume=True):
            pass
    with RunStore.open(run.folder, CONFIG, resume=True):
        pass
    assert listed(run.folder) == ["config.json", "provenance.json"]


def test_another_fault_of_the_lock_is_one_line(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(OSError(errno.EIO, "Input/output error")))
    with (
        pytest.raises(RunError, match=r"\.lock cannot be written: the disk has an input"),
        RunStore.open(run.folder, CONFIG, resume=True),
    ):
        pass


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_folder_that_goes_while_a_run_writes_is_not_made_again(
    how: str, again: bool, run: RunStore, tmp_path: Path
) -> None:
    """Its rows would be in two places, and neither whole."""

    def work() -> None:
        with RunStore.open(run.folder, CONFIG, resume=True) as opened:
            opened.log({"round": 1}, {"round": 1})
            if how == "moved":
                run.folder.rename(tmp_path / "away")
            else:
                shutil.rmtree(run.folder)
            if again:
                run.folder.mkdir()
                (run.folder / ".lock").touch()
            with pytest.raises(RunError, match="was moved or removed"):
                opened.save_lora(lambda folder: folder.mkdir())
            opened.log({"round": 2}, {"round": 2})

    with pytest.raises(RunError, match=r"seed-0 was moved or removed .*Move it back"):
        work()
    assert listed(run.folder) == ([".lock"] if again else [])
    if how == "moved":
        assert len(RunStore(tmp_path / "away").metrics) == 1


def test_another_config_is_refused_by_what_differs(run: RunStore) -> None:
    other = replace(CONFIG, rounds=7, learning_rate=1.0)
    with pytest.raises(UserError) as problem:
        store.require_same(run.folder, other, resume=True)
    text = str(problem.value)
    assert f"{run.folder} holds another run: learning_rate is 3e-05 there, not 1.0" in text
    assert "rounds is 400 there, not 7." in text


def test_a_config_that_was_changed_by_hand_is_refused(run: RunStore) -> None:
    path = run.folder / "config.json"
    found = json.loads(path.read_text())
    changes = {
        "learning_rate is 0.9 there, not 3e-05": {"learning_rate": 0.9},  # but not its run_id
        "run_id is 'x' there": {"run_id": "x"},
        "unknown settings: warp": {"warp": 1},
    }
    for said, change in changes.items():
        path.write_text(json.dumps(found | change))
        with pytest.raises(UserError, match=said):
            store.require_same(run.folder, CONFIG, resume=True)


def test_a_run_that_is_not_to_be_resumed_is_refused(run: RunStore) -> None:
    store.require_same(run.folder, CONFIG, resume=True)
    with pytest.raises(UserError, match="Resume it with --resume"):
        store.require_same(run.folder, CONFIG, resume=False)


@pytest.mark.parametrize("text", ["", "{broken", "[]", "3", "{}", "\udcff"])
def test_a_damaged_config_is_refused(run: RunStore, text: str) -> None:
    path = run.folder / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(str(path))):
        store.require_same(run.folder, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "eval.csv"])
def test_damaged_rows_are_refused(run: RunStore, name: str) -> None:
    (run.folder / name).write_text('{"round": 1}\n{"rou')
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        RunStore(run.folder)


# ---- metrics and evaluation


def row(round_: int, score: float) -> dict[str, Any]:
    return {"round": round_, "sampler": "eta1", "prompt": 'a "b", c', "index": 0, "score": score}


def test_what_is_logged_is_read_back(run: RunStore) -> None:
    run.log({"round": 1, "loss": 0.1}, {"round": 1, "sample": 1.5})
    run.log({"round": 2, "loss": 0.2}, {"round": 2, "sample": 1.0})
    run.log_evaluation([row(0, 0.1)])
    run.log_evaluation([row(2, 1 / 3)])
    again = RunStore(run.folder)
    assert again.metrics == run.metrics
    assert again.timing == run.timing
    assert [e["score"] for e in again.evaluation] == ["0.1", str(1 / 3)]
    assert again.evaluation[0]["prompt"] == 'a "b", c'


def test_resuming_from_a_round_writes_the_same_bytes(run: RunStore) -> None:
    def go(target: RunStore, start: int, stop: int) -> None:
        for n in range(start, stop):
            target.log({"round": n, "loss": n / 3}, {"round": n})
            target.log_evaluation([row(n, n / 7)])

    def written() -> list[bytes]:
        names = ("metrics.jsonl", "timing.jsonl", "eval.csv")
        return [(run.folder / name).read_bytes() for name in names]

    go(run, 1, 6)
    whole = written()
    again = RunStore(run.folder)
    again.keep_until(3)
    assert [m["round"] for m in again.metrics] == [1, 2, 3]
    assert [t["round"] for t in again.timing] == [1, 2, 3]
    assert [e["round"] for e in again.evaluation] == ["1", "2", "3"]
    again.log({"round": 4, "loss": 0.0}, {"round": 4})
    assert written()[0] != whole[0]
    again.keep_until(3)
    go(again, 4, 6)
    assert written() == whole


def test_a_column_that_comes_later_is_empty_before(run: RunStore) -> None:
    run.log_evaluation([{"round": 0, "score": 1}])
    run.log_evaluation([{"round": 1, "score": 2, "animal": 0.5}])
    assert (run.folder / "eval.csv").read_text() == "round,score,animal\n0,1,\n1,2,0.5\n"


def test_a_sample_is_a_png_named_after_its_prompt(run: RunStore) -> None:
    from PIL import Image

    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    image[0, 1, 2] = 200
    prompts = ("A cat, on / a mat!", "猫", "犬", "cat?", "cat!", "Cat 2")
    run.save_samples(3, {prompt: image + n for n, prompt in enumerate(prompts)})
    folder = run.folder / "samples" / "round-00003"
    reds = {}
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.size == (6, 4)
            reds[path.stem] = picture.getchannel("R").getpixel((2, 1))
    assert reds == {
        "a-cat-on-a-mat": 200, "prompt": 201, "prompt-2": 202, "cat": 203, "cat-2": 204,
        "cat-2-2": 205,
    }  # fmt: skip


# ---- checkpoints


def test_a_checkpoint_comes_back(run: RunStore) -> None:
    assert run.load_checkpoint() is None
    tensors = {
        "weight/a": torch.arange(6.0).view(2, 3).t(),  # not contiguous
        "step/a": torch.tensor(3.0),
        "weight/b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    facts = {"round": 2, "pairs": 64, "scaler": {"scale": 65536.0}}
    run.checkpoint(tensors, {"round": 1})
    run.checkpoint(tensors, facts)
    found = RunStore(run.folder).load_checkpoint()
    assert found is not None
    assert found[1] == facts
    assert found[0].keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[0][name], value)
        assert found[0][name].dtype == value.dtype
    assert listed(run.folder / "checkpoints") == ["last.safetensors", "previous.safetensors"]


def state(round_: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a round, about as a trainer has them."""
    rng = torch.Generator().manual_seed(round_)
    tensors = {f"weight/{n}": torch.randn(8, 4, generator=rng) for n in "abc"}
    return tensors | {"step/a": torch.tensor(float(round_))}, {"round": round_, "history": {}}


@pytest.mark.parametrize("harm", [truncated, flipped, flipped_in_the_header])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run: RunStore, harm: Harm) -> None:
    newest, before = (run.folder / "checkpoints" / f"{n}.safetensors" for n in ("last", "previous"))
    for seed in range(20):
        for path in (newest, before):
            path.unlink(missing_ok=True)
        for round_ in (1, 2):
            run.checkpoint(*state(round_))
        newest.write_bytes(harm(newest.read_bytes(), random.Random(seed)))
        again = RunStore(run.folder)
        found = again.load_checkpoint()
        assert found is not None
        assert found[1] == state(1)[1]
        assert all(torch.equal(found[0][name], t) for name, t in state(1)[0].items())
        assert again.damaged

        again.checkpoint(*state(2))  # in the damaged one's place: the whole one stays
        assert (_round_of(newest), _round_of(before)) == (2, 1)
        for path in (before, newest):
            path.write_bytes(harm(path.read_bytes(), random.Random(seed)))
        with pytest.raises(UserError, match="No whole checkpoint is left") as told:
            RunStore(run.folder).load_checkpoint()
        assert str(newest) in str(told.value)
        assert str(before) in str(told.value)


def _round_of(path: Path) -> int:
    return int(tensors.read_tensors(path)[1]["round"])


def test_the_one_before_is_there_whenever_the_newest_is_not(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between any two steps of a write leaves a checkpoint that can be read."""
    run.checkpoint(*state(1))
    run.checkpoint(*state(2))
    replace, seen = Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        done = replace(self, target)
        found = RunStore(run.folder).load_checkpoint()
        seen.append(found and found[1]["round"])
        return done

    monkeypatch.setattr(Path, "replace", watched)
    run.checkpoint(*state(3))
    assert seen == [2, 3]


def test_a_checkpoint_that_was_not_written_leaves_both_of_before(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.checkpoint(*state(1))
    run.checkpoint(*state(2))
    newest, before = run.folder / NEWEST, run.folder / BEFORE
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(RunError, match=r"last\.safetensors cannot be written: the disk"):
            run.checkpoint(*state(3))
    assert (_round_of(newest), _round_of(before)) == (2, 1)


def test_too_little_memory_to_read_is_no_damage(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.checkpoint(*state(1))
    problem = OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr(store, "read_tensors", failing(problem))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        run.load_checkpoint()


def test_a_strangers_safetensors_is_refused_as_a_checkpoint(run: RunStore) -> None:
    from safetensors.torch import save

    run.checkpoint({"weight/a": torch.ones(4)}, {"round": 1})
    (run.folder / "checkpoints" / "last.safetensors").write_bytes(save({"a": torch.ones(1)}))
    with pytest.raises(UserError, match=r"last\.safetensors is damaged"):
        run.load_checkpoint()
