"""Scorers of one's own: what they return becomes numbers or one line, and they change nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import RunError, UserError
from d3po_bench.scoring import TAKEN, Guarded, require_scores, undisturbed
from d3po_bench.types import Objective, Scorer, ScorerWithColumns
from eval.measure import cell, scored
from tests.commands import Command, refused, run_of
from tests.conftest import CPU

IMAGES = torch.stack([torch.full((3, 4, 4), n, dtype=torch.uint8) for n in (10, 20, 30)])
PROMPTS = ["cat", "dog", "fox"]


class Own:
    """A scorer that does what it is told with each picture's brightness [N]."""

    unit = "points"

    def __init__(self, says: Callable[[Tensor], Any]) -> None:
        self.says = says

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        return self.says(images.float().mean((1, 2, 3)))


class Broken:
    """What cannot even be asked for its numbers."""

    def __array__(self, *kind: Any, **options: Any) -> Any:
        raise ZeroDivisionError("not today")


class OwnColumns(Own):
    """The same with columns."""

    def columns(self, images: Tensor, prompts: Sequence[str]) -> Any:
        return self(images, prompts)


def guarded(says: Callable[[Tensor], Any]) -> Guarded:
    return Guarded("mine", Own(says))


# ---- what it returns


@pytest.mark.parametrize(
    "says",
    [
        lambda b: b,
        lambda b: b.tolist(),
        lambda b: tuple(b.tolist()),
        lambda b: list(b),
        lambda b: b.numpy(),
        lambda b: b.flip(0).numpy()[::-1],
        lambda b: b.double().numpy(),
        lambda b: b.numpy().astype(np.uint16),
        lambda b: b.long(),
        lambda b: b.half(),
        lambda b: b.unsqueeze(1),
        lambda b: b.unsqueeze(1).tolist(),
        lambda b: b.clone().requires_grad_() * 1,
        lambda b: torch.inference_mode()(lambda: b * 1)(),
    ],
)
def test_what_peoples_functions_return_becomes_numbers(says: Callable[[Tensor], Any]) -> None:
    found = guarded(says)(IMAGES, PROMPTS)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not found.is_inference()
    assert found.tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (lambda b: b[:-1], "numbers of the shape (2,) for 3 pictures"),
        (lambda b: b.mean(), "numbers of the shape () for 3 pictures"),
        (lambda b: float(b.mean()), "numbers of the shape () for 3 pictures"),
        (lambda b: b.expand(3, 3), "numbers of the shape (3, 3) for 3 pictures"),
        (lambda b: b.unsqueeze(0), "numbers of the shape (1, 3) for 3 pictures"),
        (lambda b: None, "numbers of the shape () for 3 pictures"),
        (lambda b: ["good", "bad", "good"], "no numbers but a list: could not convert string"),
        (lambda b: {"score": b}, "no numbers but a dict"),
        (lambda b: (x for x in b), "no numbers but a generator"),
        (lambda b: [[1, 2], [3]], "no numbers but a list"),
        (lambda b: b + 1j, "no numbers but a Tensor: complex numbers"),
        (lambda b: b.numpy() + 1j, "no numbers but a ndarray: complex numbers"),
        (lambda b: b.to_sparse(), "no numbers but a Tensor: a nested or sparse tensor"),
        (
            lambda b: torch.nested.nested_tensor([b, b], layout=torch.jagged),
            "no numbers but a NestedTensor: a nested or",
        ),
        (lambda b: b.to("meta"), "no numbers but a Tensor: Cannot copy out of meta tensor"),
        (lambda b: [10**400, 1, 2], "no numbers but a list: int too large to convert"),
        (lambda b: Broken(), "no numbers but a Broken: not today"),
    ],
)
def test_anything_else_is_one_line_with_the_scorers_name(
    says: Callable[[Tensor], Any], said: str
) -> None:
    with pytest.raises(RunError) as refusal:
        guarded(says)(IMAGES, PROMPTS)
    assert str(refusal.value).startswith(f"The scorer mine returned {said}")


def test_what_is_masked_is_no_score() -> None:
    scorer = guarded(lambda b: np.ma.array(b.numpy(), mask=[False, True, False]))
    found = scorer(IMAGES, PROMPTS)
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == [10, 30]


def test_nan_is_blamed_on_the_scorer() -> None:
    scorer = guarded(lambda b: b.where(b < 15, torch.nan))
    with pytest.raises(RunError, match="The scorer mine returned nan for 2 of 3 pictures"):
        require_scores(scorer, scorer(IMAGES, PROMPTS))
    require_scores(scorer, scorer(IMAGES[:1], PROMPTS[:1]))


def test_a_further_scorer_may_have_nothing_to_say() -> None:
    assert [cell(value) for value in (1.25, float("nan"), float("inf"))] == [1.25, "", ""]


# ---- what it changes


def test_a_scorer_writes_into_copies() -> None:
    class Writes:
        unit = "points"

        def __call__(self, images: Tensor, prompts: Any) -> Tensor:
            images.zero_()
            prompts.clear()
            return images.new_zeros(3)

    images, prompts = IMAGES.clone(), list(PROMPTS)
    Guarded("mine", Writes())(images, prompts)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS


STATE: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "autograd": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "seed": (lambda: torch.manual_seed(7), lambda: torch.get_rng_state().tolist()),
    "draws": (lambda: torch.rand(3), lambda: torch.get_rng_state().tolist()),
    "threads": (lambda: torch.set_num_threads(2), torch.get_num_threads),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision,
    ),
    "precision, by both interfaces": (
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        torch.get_float32_matmul_precision,
    ),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.get_deterministic_debug_mode,
    ),
    "autocast": (
        lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu"),
    ),
    "oneDNN": (lambda: torch._C._set_mkldnn_enabled(False), torch._C._get_mkldnn_enabled),
    "attention": (
        lambda: torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.flash_sdp_enabled,
    ),
    "tf32": (
        lambda: setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
        lambda: torch.backends.cudnn.allow_tf32,
    ),
    "denormals": (
        lambda: torch.set_flush_denormal(True), lambda: float(torch.tensor(1e-40) * 1),
    ),
    "anomalies": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "benchmark": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
        lambda: torch.backends.cudnn.benchmark,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATE)
def test_torch_is_afterwards_as_it_was(name: str) -> None:
    change, read = STATE[name]

    def says(brightness: Tensor) -> Tensor:
        change()
        return brightness

    before = read()
    assert guarded(says)(IMAGES, PROMPTS).tolist() == [10, 20, 30]
    assert read() == before

    def fails() -> None:
        with undisturbed():
            change()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert read() == before


# ---- its columns


def test_columns_are_numbers_too_and_only_where_there_are_any() -> None:
    scorer = Guarded("mine", OwnColumns(lambda b: {"light": b.tolist(), "dark": -b.long()}))
    assert isinstance(scorer, ScorerWithColumns)
    assert not isinstance(guarded(lambda b: b), ScorerWithColumns)
    found = scored(IMAGES, PROMPTS, {"score": guarded(lambda b: b), "mine": scorer})
    assert {name: values.tolist() for name, values in found.items()} == {
        "score": [10, 20, 30], "light": [10, 20, 30], "dark": [-10, -20, -30],
    }  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(TAKEN), "kl_1"])
def test_no_scorer_takes_a_column_of_ours(name: str) -> None:
    with pytest.raises(UserError, match=f"A scorer cannot be called {name}: "):
        Guarded(name, Own(lambda b: b))
    scorer = Guarded("mine", OwnColumns(lambda b: {name: b}))
    with pytest.raises(RunError, match=f"The scorer mine has a column {name}, as every"):
        scored(IMAGES, PROMPTS, {"mine": scorer})


def test_columns_that_cannot_stand_together_are_refused() -> None:
    two: dict[str, Scorer] = {
        "light": guarded(lambda b: b), "mine": Guarded("mine", OwnColumns(lambda b: {"light": b})),
    }  # fmt: skip
    with pytest.raises(RunError, match="The scorer mine has a column light, as another"):
        scored(IMAGES, PROMPTS, two)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\rb", "\u202eab"])
def test_columns_have_names_that_a_table_can_have(name: str) -> None:
    with pytest.raises(RunError, match="which no table can have"):
        scored(IMAGES, PROMPTS, {"mine": Guarded("mine", OwnColumns(lambda b: {name: b}))})


@pytest.mark.parametrize("odd", [[1, 2, 3], {1: [1, 2, 3]}, None])
def test_columns_that_are_none_are_one_line(odd: Any) -> None:
    with pytest.raises(RunError, match="The columns of the scorer mine are a "):
        scored(IMAGES, PROMPTS, {"mine": Guarded("mine", OwnColumns(lambda b: odd))})


# ---- a package's own, by its entry points

PACKAGE = """
from dataclasses import dataclass
import torch
from d3po_bench.d3po import D3PO
from d3po_bench.types import Objective

torch.set_grad_enabled(False)

class Own:
    unit = "points"

    def __call__(self, images, prompts):
        torch.set_grad_enabled(False)
        return images.float().mean((1, 2, 3)).tolist()

def load(device):
    torch.set_grad_enabled(False)
    return Own()

def without_unit(device):
    return lambda images, prompts: [0.0] * len(images)

def reward(images, prompts):
    return [0.0] * len(images)

@dataclass(frozen=True)
class Zeroes(D3PO):
    def rows(self, rollout, rng):
        found = super().rows(rollout, rng)
        rollout.scores.zero_()
        return found

OBJECTIVE = Objective(prompts="animals", scorer="mine", sign=1)
NO_SIGN = Objective(prompts="animals", scorer="mine", sign=0)
NO_PROMPTS = Objective(prompts=3, scorer="mine", sign=1)
NO_SCORER = Objective(prompts="animals", scorer=None, sign=1)
"""


@pytest.fixture
def brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package whose entry points are kind=name of what is in PACKAGE."""
    (tmp_path / "own_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_package", raising=False)

    def call(**named: str) -> None:
        def entries(group: str) -> list[EntryPoint]:
            here = named.get(group.removeprefix("d3po_bench."))
            value = "own_package" + (f":{here}" if here else "")
            return [EntryPoint("mine", value, group)] if here is not None else []

        monkeypatch.setattr(registry, "entry_points", entries)

    return call


@pytest.mark.parametrize("objective", ["", "OBJECTIVE"])
def test_a_run_trains_whatever_its_reward_does_to_autograd(
    objective: str, brings: Callable[..., None], command: Command, micro: Path
) -> None:
    brings(scorers="load", objectives=objective)
    assert command(*run_of(micro, rounds=1), "--objective", "mine").code == 0
    (path,) = Path("runs").rglob("metrics.jsonl")
    assert re.search(r'"unet_backwards": [1-9]', path.read_text())
    assert float(re.findall(r'"grad_norm": ([^,}]+)', path.read_text())[0]) > 0


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"scorers": "without_unit"}, "The scorer mine is a function without a call or a unit"),
        ({"scorers": "reward"}, "The scorer mine cannot be loaded as load(device): "),
        ({"scorers": "PACKAGE"}, "The scorer mine of"),
        ({"scorers": "OBJECTIVE"}, "The scorer mine is Objective("),
    ],
)
def test_what_is_no_scorer_is_one_line(
    named: dict[str, str], said: str, brings: Callable[..., None]
) -> None:
    brings(**named)
    with pytest.raises(UserError) as refusal:
        registry.load_scorer("mine", CPU)
    assert said in str(refusal.value)


@pytest.mark.parametrize("value", ["load", "NO_SIGN", "NO_PROMPTS", "NO_SCORER"])
def test_what_is_no_objective_is_one_line(
    value: str, brings: Callable[..., None], command: Command, micro: Path
) -> None:
    brings(scorers="load", objectives=value)
    refused(command(*run_of(micro), "--objective", "mine"), "The objective mine is ")
    assert not Path("runs").exists()


def test_an_objective_is_found_as_a_module_or_by_itself(brings: Callable[..., None]) -> None:
    expected = Objective(prompts="animals", scorer="mine", sign=1)
    for value in ("", "OBJECTIVE"):
        brings(objectives=value)
        assert registry.objective("mine") == expected


def test_a_package_that_ends_the_program_is_one_line(
    command: Command, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the command would end with 0, and nothing would have run."""
    (tmp_path / "goodbye.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [EntryPoint("mine", "goodbye", group)]
    )
    refused(
        command(*run_of(micro), "--objective", "mine"), "does not load from goodbye: SystemExit"
    )
    assert not Path("runs").exists()


def test_scores_on_record_are_those_before_a_method_wrote_into_them(
    brings: Callable[..., None], command: Command, micro: Path
) -> None:
    brings(methods="Zeroes")
    assert command(*run_of(micro, rounds=1, eval_every=0), "--method", "mine").code == 0
    (path,) = Path("runs").rglob("metrics.jsonl")
    assert json.loads(path.read_text())["score_mean"] > 0
