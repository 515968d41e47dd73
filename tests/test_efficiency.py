"""Equal budgets by hand: `write_run` has score 7 + seed / 10 + gain * round, 64 images a round."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3po_bench.errors import UserError
from eval.analysis.efficiency import efficiency
from eval.analysis.runs import read_groups
from tests.made_up import add_columns, write_run


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """Method -> heading -> cell, of the only objective."""
    (table,) = efficiency(read_groups([folder]))
    assert table.markdown().startswith(f"`{table.records[0]['objective']}`:\n\n| method |")
    shown = [{name: show(r) for name, show in table.columns.items()} for r in table.records]
    return {cells.pop("method"): cells for cells in shown}


@pytest.fixture
def two_methods(tmp_path: Path) -> Path:
    """D3PO with 100 UNet passes a round, DDPO with 200."""
    for seed in range(3):
        add_columns(write_run(tmp_path, seed=seed), {"unet_forwards": 100})
        folder = write_run(tmp_path, method="ddpo", seed=seed, gain=0.06 * seed)
        add_columns(folder, {"unet_forwards": 200})
    return tmp_path


def test_equal_budgets_by_hand(two_methods: Path) -> None:
    found = rows(two_methods)
    # D3PO gains 0.1 in every round; DDPO 0, 0.06 and 0.12, and has half its rounds at 1,000 passes.
    assert found["d3po"] == {
        "gain after 320 pairs or single images": "+1.000 (+1.000 to +1.000)",
        "gain after 640 images": "+1.000 (+1.000 to +1.000)",
        "gain after 1,000 UNet passes": "+1.000 (+1.000 to +1.000)",
        "mean gain over the images drawn": "+0.500 (+0.500 to +0.500)",
        "images to half of d3po's gain": "320",
        "probability to end better than d3po": "",
    }
    ddpo = found["ddpo"]
    # halves of the intervals: 4.30265 * 0.6 / sqrt(3), and 4.30265 * 0.3 / sqrt(3)
    assert ddpo["gain after 640 images"] == "+0.600 (-0.890 to +2.090)"
    assert ddpo["gain after 1,000 UNet passes"] == "+0.300 (-0.445 to +1.045)"
    assert ddpo["mean gain over the images drawn"] == "+0.300 (-0.445 to +1.045)"
    # The seed that stands still never gets there: no mean without it.
    assert ddpo["images to half of d3po's gain"] == "2 of 3 seeds"
    # One of three seeds beats all of D3PO's.
    assert ddpo["probability to end better than d3po"] == "0.33 (0.08 to 0.76)"


def test_where_smaller_is_better(tmp_path: Path) -> None:
    for seed in range(2):
        for method, gain in (("d3po", -0.1), ("ddpo", -0.2)):
            folder = write_run(tmp_path, "compress", method, seed, gain=gain)
            add_columns(folder, {"unet_forwards": 100})
    found = rows(tmp_path)["ddpo"]
    assert found["gain after 640 images"] == "-2.000 (-2.000 to -2.000)"
    assert found["images to half of d3po's gain"] == "160"
    assert found["probability to end better than d3po"] == "1.00 (0.39 to 1.00)"


def test_without_the_rival(tmp_path: Path) -> None:
    add_columns(write_run(tmp_path, method="ddpo"), {"unet_forwards": 100})
    found = rows(tmp_path)["ddpo"]
    # one seed: no interval
    assert found["gain after 640 images"] == "+1.000"
    assert found["images to half of d3po's gain"] == ""


def test_half_of_a_loss_is_no_gain(tmp_path: Path) -> None:
    for method, gain in (("d3po", -0.1), ("ddpo", 0.1)):
        add_columns(write_run(tmp_path, method=method, gain=gain), {"unet_forwards": 100})
    assert {row["images to half of d3po's gain"] for row in rows(tmp_path).values()} == {""}


def test_runs_that_did_not_count_passes(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    with pytest.raises(UserError, match=rf"{folder}/metrics.jsonl .*unet_forwards of round"):
        rows(tmp_path)
