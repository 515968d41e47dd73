"""Calling the command line and looking at what it wrote, for tests of several files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from d3po_bench.runs.packed import PACKED, unpacked

ROOT = Path(__file__).parent.parent
TINY = unpacked(ROOT / "results" / "tiny" / PACKED)
"""The published runs of version 1."""

PUBLISHED = TINY / "incompress" / "d3po" / "seed-0"
"""One of them."""

SETTINGS = {
    "prompts_per_round": 2, "sampling_steps": 3, "units_per_update": 2, "learning_rate": 3e-3,
    "dtype": "fp32", "eval_every": 2, "eval_prompts": 2, "eval_images": 1, "threads": 1,
}  # fmt: skip
WRITTEN = ("metrics.jsonl", "eval.csv", "lora/pytorch_lora_weights.safetensors")
"""What two equal runs write equally."""


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
"""The fixture `command`."""


def run_of(model: Path | str, *more: str | Path, rounds: int = 2, **settings: Any) -> list[str]:
    """The arguments of a run of a second."""
    sets = [f"--set={key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    wanted = ["run", "--method", "d3po", "--objective", "incompress", "--model", str(model)]
    tail = ["--preset", "official_code", "--rounds", str(rounds), "--device", "cpu", *sets]
    return [*wanted, *tail, *map(str, more)]


def seed_folder(out: Path, model: Path, seed: int = 0) -> Path:
    name = str(model).replace("/", "--").strip("-.")
    return out / name / "incompress" / "d3po" / f"seed-{seed}"


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def written(folder: Path, names: tuple[str, ...] = WRITTEN) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def contents(folder: Path) -> dict[str, bytes]:
    return written(folder, tuple(files(folder)))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON file holds, in place."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def refused(outcome: Outcome, *words: str, code: int = 2) -> str:
    """Check that a command ended in one line, with these words; returns the line."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert outcome.code == code, outcome
    assert len(errors) == 1, outcome
    assert lines[-1] == errors[0]
    if code == 2:  # a run that had begun has shown progress before
        assert lines == errors
    assert "Traceback" not in outcome.err + outcome.out
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


class Stop:
    """Stands in for a method of a class, and raises instead of the call that `when` picks."""

    def __init__(self, target: Any, when: Callable[..., bool], problem: BaseException) -> None:
        self.target, self.when, self.problem = target, when, problem

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.when(owner, *args):
                raise self.problem
            return self.target(owner, *args, **kwargs)

        return call
