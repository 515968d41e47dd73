"""Methods, scorers and objectives that a Python caller gives as objects."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import d3po_bench as db
from d3po_bench import own, registry
from d3po_bench.d3po import D3PO
from d3po_bench.runs.run import RunFolder
from eval.analysis.scores import Score, score_of
from tests.commands import SETTINGS, edit_json, written


class Brightness:
    """A scorer with something of its own."""

    unit = "points"
    direction = -1

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * images.float().mean((1, 2, 3))


def contrast(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.float().std((1, 2, 3))


contrast.unit, contrast.direction = "levels", 1  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Doubled(D3PO):
    """D3PO with an option of its own."""

    factor: float = 2.0

    def loss(self, policy: Any, items: Any) -> Any:
        loss, metrics = super().loss(policy, items)
        return self.factor * loss, metrics


@pytest.fixture
def quick(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a run of a second, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return {"model": micro, "preset": "official_code", "rounds": 1, "device": "cpu",
            "settings": SETTINGS}  # fmt: skip


def test_objects_train_as_what_is_installed_does(quick: dict[str, Any]) -> None:
    runs = db.run(
        method=Doubled(beta=0.3, factor=3.0), objective=contrast,
        scorers=[Brightness(0.5), "jpeg_size"], **quick,
    )  # fmt: skip
    made = RunFolder(runs.folders[0])
    assert made.folder.parts[-3:] == ("contrast", "Doubled", "seed-0")
    assert made.config.options == {"beta": 0.3, "factor": 3.0}
    assert made.evaluation[0].keys() >= {"score", "Brightness", "jpeg_size"}
    assert score_of(made) == Score("contrast", "levels", 1)
    module = __name__
    assert made.facts["plugins"] == {
        "method Doubled": f"{module}:Doubled",
        "objective contrast": f"{module}:contrast",
        "scorer Brightness": f"{module}:Brightness(scale=0.5)",
        "scorer contrast": f"{module}:contrast",
    }
    assert runs.table()["objective"].tolist() == ["contrast"]


@pytest.mark.slow
def test_objects_with_other_numbers_are_others(quick: dict[str, Any]) -> None:
    db.run(objective=Brightness(1.0), **quick)
    with pytest.raises(db.UserError, match=r"holds another run: sources is .*scale=1.0"):
        db.run(objective=Brightness(2.0), **quick)
    with pytest.raises(db.UserError, match="Two scorers are called Brightness"):
        db.run(objective=Brightness(1.0), scorers=[Brightness(2.0)], **quick)


def test_an_objective_says_prompts_scorer_and_sign(quick: dict[str, Any]) -> None:
    up = db.Objective(prompts="hand", scorer=Brightness(), sign=1)
    (folder,) = db.run(objective=up, **quick).folders
    assert score_of(RunFolder(folder)) == Score("Brightness", "points", 1)
    assert {row["prompt"] for row in RunFolder(folder).evaluation} == {"1 hand"}
    down = db.Objective(prompts="hand", scorer=Brightness(), sign=-1)
    with pytest.raises(db.UserError, match="holds another run: sources is"):
        db.run(objective=down, **quick)
    named = db.Objective(prompts="hand", scorer="jpeg_size", sign=-1)
    (folder,) = db.run(objective=named, out="named", **quick).folders
    assert score_of(RunFolder(folder)) == Score("jpeg_size", "kB", -1)
    assert folder.parts[-3] == "jpeg_size-down"


def test_an_objective_of_a_named_scorer_has_a_name_of_its_own() -> None:
    for scorer, name in (("aesthetic:tiny", "aesthetic-tiny-up"), ("./red.py", "red-up")):
        text = own.hold(db.Objective(prompts="hand", scorer=scorer, sign=1), f"a {scorer}")
        assert registry.name_of("objective", text) == name


def test_an_objects_source_is_on_record(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = db.run(method=Doubled, objective=Brightness, **quick).folders
    digests = RunFolder(folder).facts["inputs"]
    assert len(digests["method"]) == len(digests["scorers"]["Brightness"]) == 12
    edit_json(folder / "provenance.json", lambda facts: facts.pop("ended"))
    monkeypatch.setattr(own, "_digest_of", lambda thing: "another")
    with pytest.raises(db.UserError, match=r"began with other inputs: (method|scorers)"):
        db.run(method=Doubled, objective=Brightness, **quick)


def test_a_method_from_a_file_is_the_same_as_by_its_name(quick: dict[str, Any]) -> None:
    Path("mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from d3po_bench.d3po import D3PO\n"
        "@dataclass(frozen=True)\n"
        "class Mine(D3PO):\n"
        "    more: int = 1\n"
        "METHOD = Mine\n"
    )
    (ours,) = db.run(method="d3po", objective="incompress", **quick).folders
    settings = {**SETTINGS, "more": 2}
    (theirs,) = db.run(
        method="./mine.py", objective="incompress", **{**quick, "settings": settings}
    ).folders
    assert written(ours) == written(theirs)
    assert theirs.parts[-2] == "mine"
    assert RunFolder(theirs).config.sources == {"method": "mine.py"}
    table = db.load_runs(theirs).table()
    assert table["method"].tolist() == ["mine"]
    Path("mine.py").write_text("METHOD = 3")
    with pytest.raises(db.UserError, match=r"The method \./mine.py is 3, not a dataclass"):
        db.run(method="./mine.py", objective="incompress", **quick)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda images, prompts: [0.0], "would be called '<lambda>' in run folders. Rename it"),
        (len, "does not say its unit"),
        (3, "is 3. A reward is a function"),
        (partial(contrast, prompts=()), "does not say its unit"),
        (db.Objective(prompts="animals", scorer=contrast, sign=0), "Make it, for example"),  # type: ignore[arg-type]
        (db.Objective(prompts="animals", scorer=3, sign=1), "Make it, for example"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_objective_is_one_line(
    objective: Any, said: str, quick: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(db.UserError) as caught:
        db.run(objective=objective, **quick)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_go_to_another_process_is_refused(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.float().mean((1, 2, 3))

    local.unit, local.direction = "points", 1  # type: ignore[attr-defined]
    with pytest.raises(db.UserError, match=r"cannot go to another process: .* or give jobs=1"):
        db.run(objective=local, seeds=2, jobs=2, **quick)
    monkeypatch.setattr(contrast, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(db.UserError, match="it is defined in a notebook or at a prompt"):
        db.run(objective=contrast, seeds=2, jobs=2, **quick)
    assert list(tmp_path.iterdir()) == []
    assert db.run(objective=local, **quick).folders


SCRIPT = """
import d3po_bench as db

class Own:
    unit, direction = "points", 1
    def __init__(self, scale):
        self.scale = scale
    def __call__(self, images, prompts):
        return self.scale * images.float().mean((1, 2, 3))

if __name__ == "__main__":
    import json, sys
    settings = json.loads(sys.argv[2])
    db.run(objective=Own(2.0), seeds=2, jobs=2, model=sys.argv[1], preset="official_code",
           rounds=1, device="cpu", settings=settings)
"""


@pytest.mark.slow
def test_objects_of_a_script_go_to_worker_processes(micro: Path, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run(
        [sys.executable, "script.py", str(micro), json.dumps(SETTINGS)], cwd=tmp_path, check=True
    )
    assert len(list(tmp_path.rglob("seed-*/lora"))) == 2
