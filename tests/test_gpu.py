"""The GPU report: a part that fails costs no other, tables by hand, and the dry run whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.config import make
from results import gpu as tables
from tests.commands import ROOT
from tests.gpu import METHODS, Report, main

NO_CARD: dict[str, Any] = {"card": "CPU", "dry": True, "steps": [2, 3],
                           "parts": {"bf16 round": {"skipped": "no time"}}}  # fmt: skip

CARD: dict[str, Any] = {
    "card": "Card A", "dry": False, "steps": [20, 50],
    "parts": {
        "bf16 sampling": {"images_per_s_20": 8.0, "images_per_s_50": 3.25, "sampling_gb": 20.5},
        "bf16 update": {"rows_per_s": 51.26, "update_gb": None},
        "fp16 sampling": {"failed": "RuntimeError: no"},
        # 80 pairs in 100 s, and 5 s for each in the plain loop: 4 times as fast.
        "bf16 round": {"pairs": 80, "round_s": 100.0, "update_s": 60.0, "inside": 0.9512},
        "bf16 plain loop": {"pair_s": 5.0},
        "methods": {"d3po fp32": 0.69, "ddpo fp32": 0.1, "d3po fp16": 0.69, "seconds": 9.0},
        "equal bytes twice": {"equal": True},
    },
}  # fmt: skip


def raises() -> dict[str, Any]:
    raise ValueError("two\nlines")


@pytest.mark.slow
def test_a_part_that_fails_or_finds_no_time_costs_no_other(tmp_path: Path) -> None:
    report = Report(tmp_path / "card.json", 100, {"card": "A"})
    report.part("one", 1, raises)
    assert json.loads(report.file.read_text())["parts"]["one"]["failed"] == "ValueError: two lines"
    report.part("two", 101, lambda: {"x": 1})
    report.part("three", 1, lambda: {"x": 2})
    found = json.loads(report.file.read_text())
    assert found["card"] == "A"
    assert found["parts"]["two"]["skipped"].startswith("needs 101 s, and ")
    assert found["parts"]["three"]["x"] == 2
    assert report.failed == ["one", "two"]
    again = Report(report.file, 100, {"card": "A"}, ["one"])
    for name in ("one", "three"):
        again.part(name, 1, lambda: {"x": 3})
    parts = again.parts()
    assert [parts[name].get("x") for name in ("one", "two", "three")] == [3, None, 2]
    assert again.failed == []
    Report(report.file, 100, {"card": "A"}).part("two", 1, lambda: {"x": 4})  # all anew
    assert again.parts().keys() == {"two"}


def test_tables_show_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "dry-run.json").write_text(json.dumps(NO_CARD))
    assert tables.rounds().cells()[1][0] == "CPU"
    assert tables.hours().cells()[1][4:7] == ["-", "-", "-"]
    (tmp_path / "card-a.json").write_text(json.dumps(CARD))
    first, compiled, half = tables.speed().cells()[1:]
    assert first == ["Card A", "bf16", "20, 50", "8.00", "3.25", "51.3", "20.5", "-"]
    assert compiled[3:] == half[3:] == ["-"] * 5
    (paper,) = tables.rounds().cells()[1:]  # without the dry run's
    assert paper == ["Card A", "80", "100.0", "-", "-", "-", "60.0", "95.1%", "-", "-", "4.00"]
    (checked,) = tables.checks().cells()[1:]
    assert checked == ["Card A", "yes", "-", "2 of 5", "0 of 5", "1 of 5"]


def test_hours_by_hand() -> None:
    # 0.1 s to draw an image, 0.05 s to score it, 0.4 s to learn from it
    measured = {"pairs": 80, "sample_s": 16.0, "score_s": 8.0, "update_s": 64.0}
    small = {"rounds": "2", "prompts_per_round": "5", "eval_every": "1", "eval_images": "1",
             "eval_prompts": "5"}  # fmt: skip

    def seconds(method: str) -> float:
        return tables.seconds(make(method, "incompress", "paper", small)[0], measured)

    # Three evaluations of ten images, half of them drawn a second time, are 6 s.
    assert seconds("d3po") == pytest.approx(6 + 20 * (0.15 + 0.4 + 0.1))
    assert seconds("ddpo") == pytest.approx(6 + 10 * (0.15 + 0.4))
    assert seconds("reward_weighted") == pytest.approx(6 + 20 * (0.15 + 0.2))


def test_every_cell_of_the_published_grids_can_be_run() -> None:
    rows = tables.hours().cells()[1:]
    runs = {("anchor.toml", "9"), ("paper.toml", "75")}  # 3 x 1 x 3, 5 x 3 x 5
    assert {(grid, count) for grid, _, count, *_ in rows} == runs


@pytest.mark.slow
def test_the_dry_run_measures_every_part(tmp_path: Path) -> None:
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "dry-run.json").read_text())["parts"]
    published = json.loads((ROOT / "results" / "gpu" / "dry-run.json").read_text())["parts"]
    assert len(parts) == 9
    for name, found in published.items():
        assert found.keys() == parts[name].keys()
    assert parts["equal bytes twice"]["equal"]
    assert parts["equal bytes resumed"]["equal"]
    assert 0.2 < parts["bf16 round"]["inside"] < 1
    assert sum(name.partition(" ")[0] in METHODS for name in parts["methods"]) == 15
