"""The Python door: the examples of docs/python.md as they are printed, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import d3po_bench as db
from d3po_bench.launch import launch
from d3po_bench.launch.progress import Board
from d3po_bench.training import trainer
from eval.analysis.gains import records
from eval.analysis.runs import read_groups
from tests.commands import ROOT, SETTINGS, Command, seed_folder, written
from tests.made_up import write_run

GUIDE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- example: \w+ -->\n```python\n(.*?)```", GUIDE, re.DOTALL)


def quick(micro: Path) -> dict[str, Any]:
    """Arguments of a run of a second."""
    return {"model": micro, "preset": "official_code", "rounds": 2, "device": "cpu",
            "settings": SETTINGS}  # fmt: skip


@pytest.fixture
def small(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which runs are small ones whatever else they ask for."""
    run = launch.run

    def shrunk(request: launch.RunRequest, board: Board) -> list[Path]:
        kept = {k: str(v) for k, v in {**SETTINGS, **request.settings}.items()}
        given = vars(request) | {"model": str(micro), "preset": "official_code", "rounds": 2}
        return run(launch.RunRequest(**given | {"settings": kept}), board)

    monkeypatch.setattr(launch, "run", shrunk)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_guides_examples_run(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == GUIDE.count("```python")
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "No method is called 'd3p'. Did you mean 'd3po'?" in said
    assert [run.parts[0] for run in names["everything"].folders] == ["runs"] * 2 + [
        "runs-faster"
    ] * 2
    assert names["scores"]["seed"].unique().tolist() == [0, 1, 5, 6]
    assert Path("cat.png").stat().st_size > 0


def test_it_writes_what_the_command_writes(
    micro: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    runs = db.run(method="d3po", objective="incompress", out=tmp_path, quiet=True, **quick(micro))
    assert "done in" not in capsys.readouterr().err
    assert runs.folders == (seed_folder(tmp_path, micro),)
    assert written(runs.folders[0]) == written(finished)
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_frames_hold_the_numbers_of_report_and_of_the_run_folders(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, method="ddpo", seed=seed, gain=0.05)
    runs = db.load_runs(tmp_path)
    assert len(runs.folders) == 6
    for row, record in zip(
        runs.table().to_dict("records"), records(read_groups([tmp_path])), strict=True
    ):
        assert row.keys() == record.keys()
        np.testing.assert_equal(row, record)
    curves = runs.curves("images")
    own = curves[(curves["method"] == "d3po") & (curves["seed"] == 1)]
    np.testing.assert_allclose(own["score"], [7.1, 7.6, 8.1])
    assert own["x"].tolist() == [0, 320, 640]
    rows = runs.rows()
    assert len(rows) == 6 * 3 * 2 * 4  # runs, evaluations, samplers, images
    assert list(rows.columns[:8]) == [
        "model", "objective", "method", "seed", "round", "sampler", "prompt", "index",
    ]  # fmt: skip


def test_runs_that_have_not_ended_are_shown_as_far_as_they_are(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(metrics[:7]))
    runs = db.load_runs(str(folder))
    assert runs.curves()["round"].tolist() == [0, 5]
    with pytest.raises(db.UserError, match="has not ended: 7 of 10 rounds"):
        runs.table()


def test_the_pipeline_draws_as_diffusers_with_the_lora_does(micro: Path, finished: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def drawn(pipeline: Any) -> Any:
        rng = torch.Generator().manual_seed(0)
        return pipeline("cat", num_inference_steps=3, generator=rng, output_type="np").images

    stock = StableDiffusionPipeline.from_pretrained(micro)
    base = drawn(stock)
    stock.load_lora_weights(finished / "lora")
    ours = db.load_pipeline(finished, device="cpu")
    assert isinstance(ours, StableDiffusionPipeline)
    np.testing.assert_allclose(drawn(ours), drawn(stock), atol=1e-5)
    ours.disable_lora()
    np.testing.assert_allclose(drawn(ours), base, atol=1e-5)
    assert np.abs(drawn(stock) - base).max() > 1e-4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: db.run(method="d3p", objective="incompress"), "Did you mean 'd3po'?"),
        (lambda: db.run(objective="incompres"), "Did you mean 'incompress'?"),
        (lambda: db.run(objective="compress", model="tinny"), "Did you mean 'tiny'?"),
        (lambda: db.run(objective="compress", seeds=0), "seeds=0 are no seeds. Give a number"),
        (lambda: db.run(objective="compress", seeds=range(-1, 2)), r"range\(-1, 2\) are no seeds"),
        (lambda: db.run(objective="compress", seeds=cast(Any, [0, 1])), r"\[0, 1\] are no seeds"),
        (
            lambda: db.run(objective="compress", rounds=cast(Any, 2.5)),
            "rounds=2.5 is not a whole",
        ),
        (lambda: db.run(objective="compress", jobs=0), "jobs=0 is not a number from 1"),
        (lambda: db.run(objective="compress", out=cast(Any, None)), "out=None is not a folder"),
        (lambda: db.run(objective="compress", settings=cast(Any, ["a=1"])), "is not a mapping"),
        (lambda: db.run(objective="compress", scorers="animl"), "Did you mean 'animal'?"),
        (lambda: db.run(objective="compress", rounds=0), "rounds must be from 1"),
        (lambda: db.run(objective="compress", settings={"lr": 1}), "No setting is called 'lr'"),
        (lambda: db.run(objective="compress", settings={"steps": None}), "are no settings"),
        (lambda: db.run(objective="compress", track="mlflow"), "No tracker is called 'mlflow'"),
        (lambda: db.load_runs("nowhere"), "no run folders .* below nowhere"),
        (lambda: db.load_pipeline("nowhere"), "nowhere/config.json cannot be read"),
    ],
)
def test_bad_input_raises_a_line_and_writes_nothing(
    call: Callable[[], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(db.UserError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_pipeline_of_a_run_that_has_not_ended_or_was_changed(
    command: Command, micro: Path, half: Path
) -> None:
    folder = seed_folder(half, micro)
    with (folder / "lora" / "pytorch_lora_weights.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(db.UserError, match="was changed after the run had ended"):
        db.load_pipeline(folder)
    (folder / "lora").rename(folder / "elsewhere")
    with pytest.raises(db.UserError, match="the run has not ended"):
        db.load_pipeline(folder)


def test_a_failed_run_is_a_run_error(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.Trainer, "train_round", lambda *given: 1 / 0)
    with pytest.raises(db.RunError, match="ZeroDivision"):
        db.run(objective="incompress", out=tmp_path, **quick(micro))


def test_what_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sweep'"):
        _ = db.sweep
