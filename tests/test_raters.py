"""What simulated raters left, on its way to what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from d3po_bench.runs.files import read_csv
from results import feedback, raters


def test_rounds_and_choices_go_to_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    monkeypatch.setattr(feedback, "HERE", home)
    monkeypatch.setattr(raters, "HERE", home)
    for name in ("normalcy", "normalcy-kto", "safety2"):
        rates = runs / name / "error-0.2" / "seed-3" / "rates.csv"
        rates.parent.mkdir(parents=True)
        rates.write_text("round,good\n0,0.5\n")
    for of in ("error-0", "error-0.2", "error-0-by-geneval_second-at-0.25"):
        choices = runs / "preference" / of / "choices" / "seed-0.csv"
        choices.parent.mkdir(parents=True)
        choices.write_text(of)
        choices.parents[1].joinpath("seed-0.csv").write_text(f"model,share\n{of},1\n")

    CliRunner().invoke(raters.collect, [str(runs)], catch_exceptions=False)

    found = {h: [r["experiment"] for r in read_csv(home / h / "feedback" / "rounds.csv")]
             for h in ("tiny", "tiny2")}  # fmt: skip
    assert found == {"tiny": ["normalcy", "normalcy-kto"], "tiny2": ["safety2"]}
    shares = read_csv(home / "tiny" / "feedback" / "preference.csv")
    assert [(row["error"], row["model"]) for row in shares] == [
        ("0", "error-0"),
        ("0.2", "error-0.2"),
    ]
    chosen = {h: (home / h / "table1" / "choices" / "seed-0.csv").read_text()
              for h in ("tiny", "alignment")}  # fmt: skip
    assert chosen == {"tiny": "error-0", "alignment": "error-0-by-geneval_second-at-0.25"}
