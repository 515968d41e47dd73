"""What a run folder says of where, how and by which code the run was made."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.runs import provenance
from d3po_bench.runs.sessions import differing, sessions
from d3po_bench.runs.store import RunStore

CONFIG = RunConfig(method="d3po", objective="incompress")
TENSORS = {"weight/a": torch.ones(4)}


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """A started run."""
    folder = tmp_path / "seed-0"
    with RunStore.open(folder, CONFIG, resume=True) as started:
        started.start(CONFIG, inputs={"model": "a1", "prompts": "b2"}, device="cpu")
    return RunStore(folder)


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


def test_each_start_that_resumes_is_on_record_beside_the_first(run: RunStore) -> None:
    begun = run.provenance()
    run.checkpoint(TENSORS, {"round": 3})
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
    run.checkpoint(TENSORS, {"round": 0})
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


def test_a_run_is_not_resumed_with_other_packages(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.require_packages()
    began = run.provenance()["packages"]
    changed = {"torch": "1.0", "peft": None}
    monkeypatch.setattr(provenance, "_version", lambda name: changed.get(name, began[name]))
    with pytest.raises(UserError) as told:
        run.require_packages()
    said = f"peft {began['peft']}, not (none); torch {began['torch']}, not 1.0. Install those"
    assert said in str(told.value)


def test_what_a_run_has_lost_is_named(run: RunStore) -> None:
    run.require_rest(checkpoint=False)  # killed before the first
    run.checkpoint(TENSORS, {"round": 1})
    run.require_rest(checkpoint=True)
    with pytest.raises(UserError, match=r"has lost its checkpoints/last\.safetensors"):
        run.require_rest(checkpoint=False)
    (run.folder / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"has lost its provenance\.json"):
        run.require_rest(checkpoint=True)


@pytest.mark.parametrize(
    "strange",
    [
        {"sessions": 3}, {"sessions": []}, {"sessions": [3]}, {"sessions": [{"after_round": "1"}]},
        {"packages": []}, {"plugins": 3}, {"content": []}, {"inputs": None},
        {"inputs": {"scorers": "x"}},
    ],
)  # fmt: skip
def test_a_provenance_of_another_shape_is_refused(run: RunStore, strange: dict[str, Any]) -> None:
    path = run.folder / "provenance.json"
    path.write_text(json.dumps(run.provenance() | strange))
    with pytest.raises(UserError, match=r"provenance\.json cannot be read: .* object"):
        run.require_packages()


def test_a_damaged_provenance_is_refused(run: RunStore) -> None:
    (run.folder / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"provenance\.json cannot be read"):
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
    (tmp_path / "first-look").mkdir()
    (tmp_path / "first-look" / "metrics.jsonl").touch()
    assert here(name)["dirty"] is False  # what a run writes is not its code
    (tmp_path / name).write_text("1")
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
