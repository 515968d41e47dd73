"""Golden scores: a scorer that says something else than it once did is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import UserError
from d3po_bench.models.embedded import classifier
from eval import doctor, golden
from eval.golden import checked_scorer
from eval.scorers import _clip

CPU = torch.device("cpu")
SHIPPED = [name for name in doctor.checkable() if not name.endswith(":official")]


class Toy:
    """Scores with an error that grows."""

    unit = "points"

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.double().mean((1, 2, 3)) / 255 + self.error


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty golden.json."""
    path = tmp_path / "golden.json"
    path.write_text("{}")
    monkeypatch.setattr(golden, "GOLDEN", path)
    golden.recorded.cache_clear()
    yield path
    golden.recorded.cache_clear()


def test_the_pictures_never_change() -> None:
    pictures = golden.pictures()
    assert pictures.shape == (8, 3, 64, 64)
    assert pictures.dtype == torch.uint8
    assert int(pictures.long().sum()) == PIXELS
    assert len(golden.PROMPTS) == 8


PIXELS = 12953936


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_has_golden_scores_and_gives_them(name: str) -> None:
    scorer = registry.load_scorer(name, CPU)
    assert golden.check(name, scorer)
    assert golden.unchecked({name: scorer}) == []


def flipped(path: Path) -> None:
    """Change the last bit of the last weight: no score shows it."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["clip", "aesthetic"])
def test_a_flipped_weight_of_what_ships_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(_clip.EMBEDDED, tmp_path / "embedded")
    monkeypatch.setattr(_clip, "EMBEDDED", copy)
    assert checked_scorer(f"{name}:tiny", CPU)
    flipped(copy / "clip" / "model.safetensors")
    for wanted in ((f"{name}:tiny", CPU), (name, CPU, "tiny")):
        with pytest.raises(UserError, match=rf"weights of {name} .*not those that ship .*Install"):
            checked_scorer(*wanted)


@pytest.mark.parametrize("name", ["animal", "diversity"])
def test_a_flipped_weight_of_the_classifier_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(classifier.WEIGHTS, tmp_path))
    flipped(copy)
    monkeypatch.setattr(classifier, "WEIGHTS", copy)
    with pytest.raises(UserError, match=rf"weights of {name} .*not those that ship"):
        checked_scorer(name, CPU, "tiny")


def test_weights_of_ones_own_need_no_golden_scores(tmp_path: Path) -> None:
    copy = shutil.copytree(_clip.EMBEDDED / "clip", tmp_path / "clip")
    known, flip = f"clip:{copy}", f"clip:{tmp_path / 'mine'}"
    flipped(shutil.copytree(copy, tmp_path / "mine") / "model.safetensors")
    scorers = {name: checked_scorer(name, CPU) for name in (flip, known, "jpeg_size")}
    assert golden.unchecked(scorers) == [flip]
    assert flip in golden.note([flip])


def test_unknown_weights_have_none(table: Path) -> None:
    assert not golden.check("toy", Toy())
    assert golden.unchecked({"toy": Toy(), "other:w": Toy()}) == ["other:w", "toy"]


def test_drift_is_refused_with_both_numbers(table: Path) -> None:
    golden.record("toy", Toy())
    assert golden.check("toy", Toy(0.001))
    with pytest.raises(
        UserError, match=r"The scorer toy \(toy\) gives .* with numpy .*it gave .* with numpy"
    ):
        golden.check("toy", Toy(0.01))
    with pytest.raises(UserError, match="gives nan"):
        golden.check("toy", Toy(float("nan")))


def test_a_run_does_not_start_with_a_drifted_scorer(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = registry.load_scorer("jpeg_size", CPU)
    golden.record("jpeg_size", scorer)
    kind: Any = type(scorer)
    true = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args: true(*args) + 0.1)
    with pytest.raises(UserError, match="The scorer jpeg_size"):
        checked_scorer("jpeg_size", CPU)


def test_recorded_is_what_was_said(table: Path) -> None:
    golden.record("toy", Toy())
    found = json.loads(table.read_text())["toy"]["code"]
    assert found["scores"] == golden.columns("toy", Toy())
    assert found["versions"] == golden.versions()
