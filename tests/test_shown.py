"""What is shown of runs that are made up: at equal drift, beyond the reward, and in words.

`write_run` has score 7 + seed / 10 + gain * round at rounds 0, 5 and 10, with 0.5 to both sides.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from eval.analysis import worded
from eval.analysis.fronts import by_step, fronts
from eval.analysis.gains import gains
from eval.analysis.gap import gap
from eval.analysis.runs import read_groups
from eval.analysis.statistics import difference, paired_difference
from eval.analysis.windows import windows
from eval.figures.curves import plot
from results import coverage
from tests.made_up import add_columns, write_run


def written(root: Path, method: str, gain: float, drift: float, more: float = 0) -> Path:
    """Two seeds, with so much more drift in every round; of the second seed, `more` on top."""
    for seed in (0, 1):
        folder = write_run(root, method=method, seed=seed, gain=gain)
        add_columns(folder, {}, kl=drift + more * seed)
    return root


# ---- at equal drift


def test_gains_at_equal_drift_by_hand(tmp_path: Path) -> None:
    # D3PO gains 1 with a drift of 1 or 1.5, DDPO 0.8 with 0.5, and DPOK 0.7 with 0.5
    written(tmp_path, "d3po", 0.1, 0.1, 0.05)
    written(tmp_path, "ddpo", 0.08, 0.05)
    written(tmp_path, "dpok", 0.07, 0.05)
    (table,) = fronts(read_groups([tmp_path]))
    assert list(table.columns)[2:] == [
        "KL, all steps, at the end", "recognised at the end", "gain at the end", "on the front",
        "gain where it was 0.5", "recognised there",
    ]  # fmt: skip
    shown = {row[0]: row[2:] for row in table.cells()[1:]}
    # At 0.5: half of the first seed's way and a third of the second's.
    assert [shown["d3po"][k] for k in (0, 3, 5)] == ["1.25", "yes", "0.80"]
    assert shown["d3po"][4].startswith(f"{(1 / 2 + 1 / 3) / 2:+.3f} (")
    assert shown["ddpo"][2:5] == ["+0.800 (+0.800 to +0.800)", "yes", "+0.800 (+0.800 to +0.800)"]
    assert shown["dpok"][3] == "", "DDPO gains more with the same drift"


def test_who_loses_is_behind_the_base_model(tmp_path: Path) -> None:
    written(tmp_path, "d3po", 0.1, 0.1)
    written(tmp_path, "ddpo", -0.01, 0.05)
    (table,) = fronts(read_groups([tmp_path]))
    assert {r["method"]: r["front"] for r in table.records} == {"d3po": True, "ddpo": False}


@pytest.mark.parametrize(
    ("columns", "measure"),
    [({}, "KL, all steps"), ({f"kl_{i}": "0.1" for i in range(1, 21)}, "KL, steps trained on"),
     ({"drift": "0.1"}, "drift")],
)  # fmt: skip
def test_the_drift_that_says_most_is_taken(
    columns: dict[str, str], measure: str, tmp_path: Path
) -> None:
    add_columns(write_run(tmp_path), {}, kl=0.1, **columns)
    (table,) = fronts(read_groups([tmp_path]))
    assert f"{measure}, at the end" in table.columns


def test_runs_of_unknown_drift_have_no_front(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert fronts(read_groups([tmp_path])) == []
    assert by_step(read_groups([tmp_path])).cells()[0] == ["objective", "method", "seeds"]


def test_the_drift_of_each_step(tmp_path: Path) -> None:
    for seed, last in enumerate(("4", "8")):
        folder = write_run(tmp_path, seed=seed, sampling_steps=2, skip_steps=1)
        add_columns(folder, {}, kl_1="0.01", kl_2=last)
    assert by_step(read_groups([tmp_path])).cells() == [
        ["objective", "method", "seeds", "step 1", "step 2"],
        ["incompress", "d3po", "2", "0.01", "6*"],
    ]


def test_curves_over_drift(tmp_path: Path) -> None:
    written(tmp_path / "runs", "d3po", 0.1, 0.1)
    assert [path.name for path in plot([tmp_path / "runs"], tmp_path / "out", "kl")] == [
        "curves.png", "curves.svg",
    ]  # fmt: skip


# ---- beyond the reward


def test_the_gap_to_what_was_not_trained_on(tmp_path: Path) -> None:
    """Files grow by 1 kB, sqrt(3) standard deviations; the animal is lost by half as many."""
    folder = write_run(tmp_path, animal=False, eval_scorers=("animal", "vendi"))
    head, *rows = (folder / "eval.csv").read_text().splitlines()
    sizes = [f"{head},animal,vendi"]
    for row in rows:
        number, sampler, _, index, _ = row.split(",")
        # standard deviation of 0.1 and 0.3, twice each: 0.2 / sqrt(3)
        known = 0.5 + 0.2 * int(index) - 0.01 * int(number) * (sampler == "eta1")
        sizes.append(f"{row},{known},{number}")
    (folder / "eval.csv").write_text("\n".join(sizes) + "\n")
    (run,) = next(iter(read_groups([tmp_path]).values()))
    spread = np.std([0, 1, 0, 1], ddof=1)
    assert gap(run) == pytest.approx(1 / spread - (-0.1 / (0.2 * spread)))


def test_no_gap_without_another_scorer(tmp_path: Path) -> None:
    write_run(tmp_path, eval_scorers=())
    (run,) = next(iter(read_groups([tmp_path]).values()))
    assert math.isnan(gap(run))


# ---- rates


def test_a_window_of_rates_by_hand() -> None:
    def tries(lr: float, gains: list[float], recognised: float = 0.9) -> list[dict[str, object]]:
        row = {"method": "d3po", "lr": lr, "recognised": recognised}
        return [{**row, "gain": gain} for gain in gains]

    rows = [
        *tries(1e-4, [0.1, -0.1, 0.1]), *tries(1e-3, [1.0, 1.1, 1.2]), *tries(3e-3, [2, 2.1, 2]),
        *tries(1e-2, [3, 3.1, math.nan]), *tries(0.1, [4, 4.1, 4], recognised=0.1),
    ]  # fmt: skip
    table = windows(rows, floor=0.5)
    assert table.cells()[1:] == [
        ["d3po", "0.0001, 0.001, 0.003, 0.01, 0.1", "2 or 3", "0.001 to 0.01", "1.00"]
    ]
    assert windows(rows, sign=-1).records[0]["window"] == "none shown"


# ---- in words

WORDS = worded.Words("Gains", "Loses", "Not shown")


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({"a": (1, 0.01), "b": (2, 0.001), "c": (-1, 0.02), "d": (1, 0.3), "e": (-1, 0.06)},
         "Gains: a, b (p at most 0.01). Loses: c (p = 0.02). Not shown: d, e (p at least 0.06)."),
        ({"a": (1, math.nan)}, "Not shown: a."),
    ],
)  # fmt: skip
def test_sentences_follow_the_tests(means: dict[str, tuple[float, float]], said: str) -> None:
    assert worded.said(means, WORDS) == said


def test_sentences_of_power_and_equivalence() -> None:
    same = {"a": paired_difference([1.0, 1.01, 0.99], [1.0, 1.0, 1.0])}
    p = worded.within({"a": (same["a"], 0.1)})
    assert worded.equivalent(p, 0.1, "kB", "d3po") == "Shown to be within 0.1 kB of d3po: a."
    # a, which alone would be shown, is adjusted for b, which is not spoken of
    apart = paired_difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.0])
    few = worded.within({"a": (same["a"], 0.02), "b": (apart, 0.02)})
    assert few["a"] == pytest.approx(2 * worded.within({"a": (same["a"], 0.02)})["a"])
    assert few["a"] / 2 < worded.LEVEL < few["a"]
    said = worded.equivalent({"a": few["a"]}, 0.02, "", "d3po")
    assert said == "Shown to be within 0.02 of d3po: none."
    # the standard error is 0.01 / sqrt(3), and t(2) = 4.303 shows 5.65 of them
    assert worded.power(same, "kB", 1) == "A difference of 0.033 kB would be shown with 80 % power."
    # at 1 % for each of five tests: t(2) = 9.925
    assert worded.power(same, "kB", 5) == "A difference of 0.073 kB would be shown with 80 % power."
    assert worded.power({"a": difference([1.0], [2.0])}, "kB", 1) == ""


def test_the_table_of_gains_says_what_would_be_shown(tmp_path: Path) -> None:
    for seed, gain in enumerate((0.1, 0.11, 0.12)):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, method="ddpo", seed=seed, gain=gain)
    record = gains(read_groups([tmp_path])).records[1]
    # 0, 0.1 and 0.2 apart
    assert record["smallest"] == pytest.approx(0.1 / 3**0.5 * 5.653489, rel=1e-5)


# ---- how often intervals hold the truth


def test_published_coverage_is_what_intervals_promise() -> None:
    rows = coverage.table().records
    assert {(row["interval"], row["seeds"]) for row in rows} == {
        (name, str(count)) for name in coverage.INTERVALS for count in (5, 20)
    }
    assert all(0.94 <= float(row["normal"]) <= 0.96 for row in rows)


@pytest.mark.slow
def test_coverage_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = coverage.FILE.read_bytes()
    monkeypatch.setattr(coverage, "FILE", tmp_path / "coverage.csv")
    coverage.measure()
    assert coverage.FILE.read_bytes() == published
