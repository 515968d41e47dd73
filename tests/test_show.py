"""`show`: a published run, one that has not ended, and one that has just begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.cli.show import known
from d3po_bench.errors import UserError
from tests.commands import PUBLISHED


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(PUBLISHED, tmp_path / "seed-0")
    return tmp_path / "seed-0"


def shown(run: Path) -> dict[str, dict[str, str]]:
    """Section -> name -> value."""
    return dict(known(run))


def edit(path: Path, **changes: Any) -> None:
    """Values of a JSON file changed; ... removes one."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def test_a_published_run() -> None:
    told = shown(PUBLISHED)
    assert told["run"]["method"] == "d3po"
    assert told["run"]["rounds"] == "12 of 12"
    assert told["run"]["kept"] == "text alone"
    assert told["run"]["ended"] == "2026-11-25T09:59:51+00:00 (0:01:52 after the start)"
    assert told["settings"] == {"preset": "quick, unchanged"}
    assert told["made with"]["commit"] == "b3fc746afa3b900c6c661a673f6beb97feb63418"
    assert "torch 2.13.0+cpu" in told["made with"]["packages"]
    assert told["made with"]["processor"] == "AMD EPYC (AVX512)"
    assert len(told["content"]) == 4
    assert told["cost"]["images"] == "1,536"
    assert told["cost"]["UNet passes"] == "34,624"
    rows = [ln.split(",") for ln in (PUBLISHED / "eval.csv").read_text().splitlines()[1:]]
    last = [float(r[4]) for r in rows if r[:2] == ["12", "eta1"]]
    assert told["last evaluation"]["round"] == "12"
    assert f"score {sum(last) / len(last):.4f}" in told["last evaluation"]["eta1"]


def test_seconds_leave_evaluation_out(run: Path) -> None:
    timing = [{"round": n, "sample": 2.0, "update": 1.0, "evaluate": 10.0} for n in (1, 2)]
    (run / "timing.jsonl").write_text("".join(json.dumps(t) + "\n" for t in timing))
    cost = shown(run)["cost"]
    assert (cost["seconds"], cost["seconds of evaluation"]) == ("6", "20")


def test_settings_that_differ_from_the_preset(run: Path) -> None:
    edit(run / "config.json", learning_rate=0.01, options={"clip_range": 0.3, "pairs": "extremes"})
    assert shown(run)["settings"] == {
        "preset": "quick", "learning_rate": "0.01", "clip_range": "0.3"
    }  # fmt: skip


def test_the_nearest_preset_is_named(run: Path) -> None:
    from d3po_bench.config import make

    made, _ = make("d3po", "incompress", "official_code", {"rounds": "7"})
    (run / "config.json").write_text(made.to_json())
    assert shown(run)["settings"] == {"preset": "official_code", "rounds": "7"}


def test_a_run_that_has_not_ended(run: Path) -> None:
    edit(run / "provenance.json", ended=..., dirty=True, diff="abc", cpu="A CPU", gpu="A GPU",
         inputs={"model": "m1", "prompts": "p1", "scorers": {"jpeg_size": "code"}})  # fmt: skip
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(text[:5]) + "\n")
    (run / "checkpoints").mkdir()
    told = shown(run)
    assert told["run"]["ended"] == "not yet"
    assert told["run"]["rounds"] == "5 of 12"
    assert told["run"]["kept"] == "a checkpoint"
    assert told["made with"]["commit"].endswith(" with changes (abc)")
    assert told["made with"]["processor"] == "A CPU"
    assert told["made with"]["device"] == "cpu A GPU"
    assert told["inputs"] == {"model": "m1", "prompts": "p1", "scorer jpeg_size": "code"}


def test_a_run_that_has_just_begun(run: Path) -> None:
    for name in ("metrics.jsonl", "timing.jsonl", "eval.csv", "provenance.json"):
        (run / name).unlink()
    told = shown(run)
    assert told["run"]["rounds"] == "0 of 12"
    assert told["run"]["started"] == "not on record"
    assert told["cost"]["seconds"] == "not on record"
    assert told["last evaluation"] == {"none": "not yet, or switched off"}


def test_a_method_that_is_not_installed(run: Path) -> None:
    edit(run / "config.json", method="of_a_plugin")
    told = shown(run)
    assert told["run"]["method"] == "of_a_plugin"
    assert told["settings"] == {"preset": "quick", "clip_range": "0.2", "pairs": "extremes"}


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.json"):
        list(known(tmp_path))
