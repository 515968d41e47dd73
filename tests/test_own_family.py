"""A family of models of one's own is one file: it goes through run, evaluate and plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from d3po_bench.cli import main

POINTS = Path(__file__).parent / "points.py"


def command(*arguments: str | Path) -> None:
    main([str(a) for a in arguments])


@pytest.mark.parametrize("method", ["d3po", pytest.param("ddpo", marks=pytest.mark.slow)])
def test_points_run_evaluate_and_plot(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "points.py").write_text(POINTS.read_text())
    (tmp_path / "prompts.txt").write_text("one\nthree\nseven\n")
    settings = [
        "dtype=fp32", "rounds=3", "prompts_per_round=3", "images_per_prompt=4",
        "sampling_steps=8", "skip_steps=2", "units_per_update=4", "learning_rate=0.01",
        "eval_every=1", "eval_images=1", "prompts=prompts.txt", "guidance=1",
    ]  # fmt: skip
    command(
        "run", "--method", method, "--objective", "compress", "--model", "points.py",
        "--preset", "official_code", *(part for s in settings for part in ("--set", s)),
    )  # fmt: skip
    run = tmp_path / "runs" / "points.py" / "compress" / method / "seed-0"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [12, 24, 36]
    assert all(line["grad_norm"] > 0 for line in lines)

    command("evaluate", run, "--out", "scores")  # by the scorers that the run had
    with (tmp_path / "scores" / "rows.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sampler"] == "eta1"]
    with (run / "eval.csv").open() as file:
        last = [r for r in csv.DictReader(file) if (r["round"], r["sampler"]) == ("3", "eta1")]
    found = {row["prompt"]: row["jpeg_size"] for row in rows}
    assert found == {row["prompt"]: row["score"] for row in last}
    assert float(last[0]["kl"]) > 0

    capsys.readouterr()
    command("plot", run)
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {p.suffix for p in drawn} == {".png", ".svg"}
    assert all(p.stat().st_size > 1000 for p in drawn)
