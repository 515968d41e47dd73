"""A run folder: never half a file, one process at a time, its own config only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs import provenance, store
from d3po_bench.runs.files import write_atomically, write_folder, writing
from d3po_bench.runs.run import read_facts
from d3po_bench.runs.sessions import differing, sessions
from d3po_bench.runs.store import RunStore

CONFIG = RunConfig(method="d3po", objective="incompress")


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """A started run."""
    folder = tmp_path / "seed-0"
    with RunStore.open(folder, CONFIG, resume=True) as started:
        started.start(CONFIG, inputs={"model": "a1", "prompts": "b2"}, device="cpu")
    return RunStore(folder)


def test_a_run_goes_on_with_the_inputs_that_it_began_with(run: RunStore) -> None:
    assert run.provenance()["inputs"] == {"model": "a1", "prompts": "b2"}
    run.start(CONFIG, inputs={"model": "a1", "prompts": "b2"})
    before = (run.folder / "provenance.json").read_bytes()
    with pytest.raises(UserError, match=r"Expected the prompts that .* \(b2\), got others \(c3\)"):
        run.start(CONFIG, inputs={"model": "a1", "prompts": "c3"})
    assert (run.folder / "provenance.json").read_bytes() == before


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def failing(problem: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise problem

    return fail


# ---- write_atomically


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    for data in (b"one", b"2"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert files(tmp_path) == ["a", "a/b.txt"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize(
    ("problem", "kind", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError, 1, "got a full disk"),
        (OSError(errno.EDQUOT, "Quota exceeded"), RunError, 1, "got a full disk"),
        (OSError(errno.EFBIG, "File too large"), RunError, 1, "a limit on the size of files"),
        (OSError(errno.EIO, "Input/output error"), RunError, 1, "got: Input/output error"),
        (OSError(errno.EROFS, "Read-only file system"), UserError, 2, "got: Read-only file system"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: bytes | None,
    problem: OSError, kind: type[UserError], code: int, said: str,
) -> None:  # fmt: skip
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(problem))
        with pytest.raises(UserError) as raised:
            write_atomically(path, b"new")
    assert type(raised.value) is kind
    assert raised.value.exit_code == code
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert files(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_ctrl_c_in_a_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert files(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_part_left_by_a_kill_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"half of a longer file")
    write_atomically(tmp_path / "file", b"new")
    assert files(tmp_path) == ["file"]


def test_a_full_disk_in_somebody_elses_writer() -> None:
    problem = SafetensorError("Error while serializing: I/O error: No space left on device")
    with pytest.raises(RunError, match="got a full disk"), writing(Path("lora")):
        raise problem
    with pytest.raises(UserError, match="got: odd"), writing(Path("lora")):
        raise SafetensorError("odd")


# ---- a folder is one run's


def test_a_folder_that_was_not_used_is_gone(tmp_path: Path) -> None:
    def use() -> None:
        with RunStore.open(tmp_path / "a" / "b", CONFIG, resume=True):
            assert files(tmp_path) == ["a", "a/b", "a/b/.lock"]
            raise UserError("no prompts")

    with pytest.raises(UserError, match="no prompts"):
        use()
    assert files(tmp_path) == []


def test_a_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with RunStore.open(tmp_path / "a" / "b", CONFIG, resume=True):
        pass
    assert files(tmp_path) == ["a"]


def test_a_started_run_keeps_config_and_provenance(run: RunStore) -> None:
    assert files(run.folder) == ["config.json", "provenance.json"]
    assert (run.folder / "config.json").read_text() == CONFIG.to_json()


def test_a_second_process_is_refused(run: RunStore) -> None:
    with (run.folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="got another process running in it"),
            RunStore.open(run.folder, CONFIG, resume=True),
        ):
            pass
        assert (run.folder / ".lock").exists()  # the other one's
    with (
        RunStore.open(run.folder, CONFIG, resume=True),
        pytest.raises(UserError, match="got another process running in it"),
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
        pytest.raises(UserError, match="got another process"),
        RunStore.open(run.folder, CONFIG, resume=True),
    ):
        pass


def test_another_config_is_refused_by_what_differs(run: RunStore) -> None:
    other = replace(CONFIG, rounds=7, learning_rate=1.0)
    with pytest.raises(UserError) as problem:
        store.require_same(run.folder, other, resume=True)
    text = str(problem.value)
    assert f"Expected the run {other.run_id} in {run.folder}, got {CONFIG.run_id}" in text
    assert "(learning_rate 3e-05 -> 1.0, rounds 400 -> 7)" in text


def test_a_config_that_was_changed_by_hand_is_refused(run: RunStore) -> None:
    path = run.folder / "config.json"
    found = json.loads(path.read_text())
    for change in ({"learning_rate": 0.9}, {"warp": 1}):  # the run_id is left alone
        path.write_text(json.dumps(found | change))
        (name,) = change
        with pytest.raises(UserError, match=f"{name} {change[name]} -> "):
            store.require_same(run.folder, CONFIG, resume=True)


def test_a_run_that_is_not_to_be_resumed_is_refused(run: RunStore) -> None:
    store.require_same(run.folder, CONFIG, resume=True)
    with pytest.raises(UserError, match="Go on with --resume"):
        store.require_same(run.folder, CONFIG, resume=False)


@pytest.mark.parametrize("text", ["", "{broken", "[]", "3", "{}", "\udcff"])
def test_a_damaged_config_is_refused(run: RunStore, text: str) -> None:
    path = run.folder / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="got a damaged file") as problem:
        store.require_same(run.folder, CONFIG, resume=True)
    assert str(path) in str(problem.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_damaged_metrics_are_refused(run: RunStore, name: str) -> None:
    (run.folder / name).write_text('{"round": 1}\n{"rou')
    with pytest.raises(UserError, match="got a damaged file"):
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


def test_going_on_from_a_round_writes_the_same_bytes(run: RunStore) -> None:
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
    run.save_sample(3, "A cat, on / a mat!", image)
    run.save_sample(3, "猫", image)
    folder = run.folder / "samples" / "round-00003"
    assert files(folder) == ["a-cat-on-a-mat.png", "prompt.png"]
    with Image.open(folder / "prompt.png") as picture:
        assert picture.size == (6, 4)
        assert picture.getpixel((2, 1)) == (200, 0, 0)


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
    assert files(run.folder / "checkpoints") == ["last.safetensors", "previous.safetensors"]


def state(round_: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a round, about as a trainer has them."""
    rng = torch.Generator().manual_seed(round_)
    tensors = {f"weight/{n}": torch.randn(8, 4, generator=rng) for n in "abc"}
    return tensors | {"step/a": torch.tensor(float(round_))}, {"round": round_, "history": {}}


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flipped_in_the_header(data: bytes, rng: random.Random) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    return flipped(data[:size], rng) + data[size:]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("harm", [truncated, flipped, flipped_in_the_header])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run: RunStore, harm: Callable[[bytes, random.Random], bytes], seed: int
) -> None:
    newest, before = (run.folder / "checkpoints" / f"{n}.safetensors" for n in ("last", "previous"))
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
    before.write_bytes(harm(before.read_bytes(), random.Random(seed)))
    newest.write_bytes(harm(newest.read_bytes(), random.Random(seed)))
    with pytest.raises(UserError, match=r"Expected a whole checkpoint at .* damaged one") as told:
        RunStore(run.folder).load_checkpoint()
    assert str(newest) in str(told.value)
    assert str(before) in str(told.value)


def _round_of(path: Path) -> int:
    return int(store._read_checkpoint(path)[1]["round"])


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
    newest, before = run._checkpoints()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(RunError, match=r"room to write .*last\.safetensors, got a full disk"):
            run.checkpoint(*state(3))
    assert (_round_of(newest), _round_of(before)) == (2, 1)


def test_too_little_memory_to_read_is_no_damage(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.checkpoint(*state(1))
    problem = OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr(store, "_read_checkpoint", failing(problem))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        run.load_checkpoint()


# ---- the folder of the final weights


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "lora"

    def save(text: str) -> Callable[[Path], None]:
        def fill(part: Path) -> None:
            part.mkdir()
            (part / text).write_text(text)
            if text == "broken":
                raise OSError(errno.ENOSPC, "No space left on device")

        return fill

    with pytest.raises(RunError, match=r"room to write .*lora, got a full disk"):
        write_folder(folder, save("broken"))
    assert files(tmp_path) == []
    (tmp_path / "lora.part").mkdir()  # as a kill leaves it
    (tmp_path / "lora.part" / "old").touch()
    write_folder(folder, save("one"))
    assert files(tmp_path) == ["lora", "lora/one"]
    write_folder(folder, save("two"))
    assert files(tmp_path) == ["lora", "lora/two"]


def test_a_strangers_safetensors_is_refused_as_a_checkpoint(run: RunStore) -> None:
    from safetensors.torch import save

    run.checkpoint({"weight/a": torch.ones(4)}, {"round": 1})
    (run.folder / "checkpoints" / "last.safetensors").write_bytes(save({"a": torch.ones(1)}))
    with pytest.raises(UserError, match="got a damaged one"):
        run.load_checkpoint()


# ---- provenance


def test_provenance_says_where_the_run_was_made(run: RunStore) -> None:
    facts = run.provenance()
    assert {"started", "python", "platform", "machine", "packages", "device"} <= facts.keys()
    assert facts["device"] == "cpu"
    assert facts["packages"]["torch"] == torch.__version__
    assert {"diffusers", "transformers", "peft", "pillow"} <= facts["packages"].keys()
    assert json.loads((run.folder / "provenance.json").read_text()) == facts


def test_provenance_keeps_the_start_and_tells_the_end(run: RunStore) -> None:
    started = run.provenance()["started"]
    before = run.finished
    run.write_provenance(ended="2030-01-01T00:00:00+00:00", device="cuda")
    assert (before, run.finished) == (False, True)
    assert run.provenance()["started"] == started
    assert run.provenance()["device"] == "cuda"


def test_each_start_that_goes_on_is_on_record_beside_the_first(run: RunStore) -> None:
    begun = run.provenance()
    run.checkpoint(*state(3))
    later = RunStore(run.folder)
    later.start(CONFIG, inputs=begun["inputs"], after=3, facts={"round": 7}, device="cuda", gpu="A")
    facts = later.provenance()
    first, second = facts["sessions"]
    assert [first["after_round"], second["after_round"]] == [0, 3]
    assert differing(first, second) == {"device": ("cpu", "cuda"), "gpu": (None, "A")}
    told = {"sessions": [first, second], "checkpointed": True, "round": 7}
    assert facts == begun | told
    later.finish()
    assert "gpu" not in later.provenance()


def test_a_start_of_which_nothing_is_kept_is_not_on_record(run: RunStore) -> None:
    run.start(CONFIG, inputs=run.provenance()["inputs"], device="cuda")
    facts = run.provenance()
    assert facts["device"] == "cuda"
    assert [session["device"] for session in facts["sessions"]] == ["cuda"]


def test_a_start_that_left_nothing_is_not_on_record(run: RunStore) -> None:
    inputs = run.provenance()["inputs"]
    run.checkpoint(*state(0))
    for after, device in ((0, "a"), (0, "b"), (1, "c"), (3, "d"), (3, "e"), (1, "f")):
        run.start(CONFIG, inputs=inputs, after=after, device=device)
    told = [(s["after_round"], s["device"]) for s in run.provenance()["sessions"]]
    assert told == [(0, "cpu"), (0, "b"), (1, "f")]


def test_a_run_of_an_older_version_has_one_session(run: RunStore) -> None:
    facts = run.provenance()
    (recorded,) = facts.pop("sessions")
    assert differing(recorded, sessions(facts)[0]) == {}


def test_sessions_differ_in_packages_and_settings_by_name() -> None:
    one = {"started": "1", "packages": {"torch": "2", "numpy": "1"}, "execution": {"threads": 1}}
    other = {"started": "2", "packages": {"torch": "3", "numpy": "1"}, "execution": {"threads": 2}}
    assert differing(one, one | {"started": "2", "after_round": 4}) == {}
    assert differing(one, other) == {"packages.torch": ("2", "3"), "execution.threads": (1, 2)}


def test_a_run_does_not_go_on_with_other_packages(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.require_packages()
    began = run.provenance()["packages"]
    changed = {"torch": "1.0", "peft": None}
    monkeypatch.setattr(provenance, "_version", lambda name: changed.get(name, began[name]))
    with pytest.raises(UserError) as told:
        run.require_packages()
    then, here = f"(peft {began['peft']}, torch {began['torch']})", "(peft (none), torch 1.0)"
    assert f"began with {then}, got others {here}. Install those versions" in str(told.value)


def test_what_a_run_has_lost_is_named(run: RunStore) -> None:
    run.require_rest(checkpoint=False)  # killed before the first
    run.checkpoint(*state(1))
    run.require_rest(checkpoint=True)
    with pytest.raises(UserError, match=r"Expected checkpoints/last.safetensors .* got no such"):
        run.require_rest(checkpoint=False)
    (run.folder / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"Expected provenance.json beside the rest of the run"):
        run.require_rest(checkpoint=True)


@pytest.mark.parametrize("strange", [{"sessions": 3}, {"sessions": [3]}, {"packages": []}])
def test_a_provenance_of_another_shape_is_refused(run: RunStore, strange: dict[str, Any]) -> None:
    path = run.folder / "provenance.json"
    path.write_text(json.dumps(run.provenance() | strange))
    with pytest.raises(UserError, match="got a damaged file"):
        run.require_packages()
    with pytest.raises(UserError, match="names and values as"):
        read_facts(run.folder)


def test_a_damaged_provenance_is_refused(run: RunStore) -> None:
    (run.folder / "provenance.json").write_text("{")
    with pytest.raises(UserError, match="got a damaged file"):
        _ = run.finished


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@needs_git
def test_the_commit_is_of_this_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(path: str) -> dict[str, Any]:
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / path))
        return provenance._commit()

    name = "d3po_bench/runs/provenance.py"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert here(name) == {}
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    found = here(name)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "new").touch()
    assert here(name)["dirty"] is True
    # an environment inside somebody's repository: that commit is not ours
    (tmp_path / "venv" / name).parent.mkdir(parents=True)
    assert here(f"venv/{name}") == {}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean commit of some code, which says that `store` lies in it."""
    for name in ("d3po_bench/store.py", "baselines/ddpo.py", ".gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("*.pyc\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    monkeypatch.setattr(
        provenance, "__file__", str(tmp_path / "d3po_bench" / "runs" / "provenance.py")
    )
    return tmp_path


@needs_git
@pytest.mark.parametrize("shown", ["normal", "no"])
def test_new_files_of_the_code_are_changes_by_what_they_hold(code: Path, shown: str) -> None:
    """A method is found by its file, which git need not know."""
    git(code, "config", "status.showUntrackedFiles", shown)
    assert provenance._commit()["dirty"] is False
    found = []
    for name, text in (("mine", "1"), ("mine", "2"), ("other", "2")):
        path = code / "baselines" / "new" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        facts = provenance._commit()
        assert facts["dirty"] is True
        found.append(facts["diff"])
    assert len(set(found)) == 3
    shutil.rmtree(code / "baselines" / "new")
    (code / "baselines" / "ddpo.pyc").touch()
    assert provenance._commit()["dirty"] is False


@needs_git
def test_strange_files_do_not_cost_the_commit(code: Path) -> None:
    (code / "baselines" / "ddpo.py").write_bytes("# \u00e9".encode("latin-1"))
    (code / "eval").symlink_to("nowhere")
    git(code, "init", "-q", "d3po_bench/inner")
    git(code / "d3po_bench" / "inner", "commit", "-qm", "a", "--allow-empty")
    facts = provenance._commit()
    assert len(facts["commit"]) == 40
    assert facts["dirty"] is True
