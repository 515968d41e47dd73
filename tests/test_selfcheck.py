"""A scorer that says something else than it once did is refused, with what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import UserError
from eval import doctor, selfcheck

CPU = torch.device("cpu")
SHIPPED = [name for name in doctor._checkable() if not name.endswith(":official")]


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
    monkeypatch.setattr(selfcheck, "GOLDEN", path)
    selfcheck.golden.cache_clear()
    yield path
    selfcheck.golden.cache_clear()


def test_the_pictures_never_change() -> None:
    pictures = selfcheck.pictures()
    assert pictures.shape == (8, 3, 64, 64)
    assert pictures.dtype == torch.uint8
    assert int(pictures.long().sum()) == PIXELS
    assert len(selfcheck.PROMPTS) == 8


PIXELS = 12953936


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_has_golden_scores_and_gives_them(name: str) -> None:
    scorer = registry.load_scorer(name, CPU)
    assert selfcheck.check(name.partition(":")[0], scorer)


def test_unknown_weights_have_none(table: Path) -> None:
    assert not selfcheck.check("toy", Toy())


def test_drift_is_refused_with_both_numbers(table: Path) -> None:
    selfcheck.record("toy", Toy())
    assert selfcheck.check("toy", Toy(0.001))
    with pytest.raises(UserError, match=r"from the scorer toy \(toy\).*recorded with numpy.*got "):
        selfcheck.check("toy", Toy(0.01))
    with pytest.raises(UserError, match="got nan"):
        selfcheck.check("toy", Toy(float("nan")))


def test_a_run_does_not_start_with_a_drifted_scorer(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = registry.load_scorer("jpeg_size", CPU)
    selfcheck.record("jpeg_size", scorer)
    kind: Any = type(scorer)
    true = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args: true(*args) + 0.1)
    with pytest.raises(UserError, match=r"Expected .* from the scorer jpeg_size"):
        registry.scorer("jpeg_size", CPU)


def test_recorded_is_what_was_said(table: Path) -> None:
    selfcheck.record("toy", Toy())
    found = json.loads(table.read_text())["toy"]["code"]
    assert found["scores"] == selfcheck.columns("toy", Toy())
    assert found["versions"] == selfcheck.versions()
