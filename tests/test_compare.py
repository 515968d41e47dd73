"""`compare`: made-up runs whose differences can be worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t

from eval.analysis.compare import compare
from eval.analysis.gains import records
from eval.analysis.runs import read_groups
from eval.analysis.statistics import difference
from eval.figures.compare import comparison_figure
from eval.figures.style import own_style
from tests.commands import Command, files, refused
from tests.made_up import write_run


def side(root: Path, method: str, gains: Sequence[float], objective: str = "incompress") -> Path:
    """A folder of runs that gain so much over their ten rounds, seeds 0, 1 and so on."""
    for seed, gain in enumerate(gains):
        write_run(root, objective, method, seed, gain=gain / 10)
    return root / "tiny" / objective / method


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """D3PO gains 0.5, 0.6 and 0.4 more than DDPO."""
    return side(tmp_path, "d3po", (1, 1.5, 2)), side(tmp_path, "ddpo", (0.5, 0.9, 1.6))


PAIRED = "95 % interval +0.252 to +0.748, p = 0.013, 3 seeds each, paired"


def test_a_verdict_by_hand(sides: tuple[Path, Path], command: Command) -> None:
    # s = 0.1, so 0.5 -+ 4.30265 * 0.1 / sqrt(3)
    done = command("compare", *sides)
    assert done.out == (
        f"d3po gains 0.500 kB more than ddpo on incompress (difference +0.500, {PAIRED}): "
        "shown to be better.\n"
    )
    assert (done.code, done.err) == (0, "")
    done = command("compare", *reversed(sides))
    assert "ddpo gains 0.500 kB less than d3po" in done.out
    assert done.out.endswith("shown to be worse.\n")
    assert (done.code, done.err) == (1, "")


def test_where_smaller_is_better(tmp_path: Path, command: Command) -> None:
    ours = side(tmp_path, "d3po", (-1, -1.5, -2), "compress")
    theirs = side(tmp_path, "ddpo", (-0.5, -0.9, -1.6), "compress")
    done = command("compare", ours, theirs)
    assert "d3po lowers the score 0.500 kB more than ddpo on compress (difference -0.5" in done.out
    assert "interval -0.748 to -0.252" in done.out
    assert done.out.endswith("shown to be better.\n")
    assert command("compare", theirs, ours).code == 1


def test_what_is_not_shown_is_no_fault_unless_better_is_required(
    tmp_path: Path, command: Command
) -> None:
    ours = side(tmp_path, "d3po", (1, 2, 1))
    theirs = side(tmp_path, "ddpo", (2, 1, 1.1))
    for a, b in ((ours, theirs), (theirs, ours), (ours, ours)):
        done = command("compare", a, b)
        assert done.out.endswith("): no difference is shown.\n")
        assert done.code == 0
        assert command("compare", a, b, "--require", "better").code == 1
    assert "p = 1, 3 seeds each, paired" in command("compare", ours, ours).out


@pytest.mark.parametrize(("margin", "shown"), [(0.2, True), (0.05, False)])
def test_equivalence_within_a_margin(
    margin: float, shown: bool, tmp_path: Path, command: Command
) -> None:
    """0.01, -0.03 and 0.05 apart: mean 0.01, s = 0.04."""
    ours = side(tmp_path, "d3po", (1.01, 1.47, 2.05))
    done = command("compare", ours, side(tmp_path, "ddpo", (1, 1.5, 2)), "--margin", margin)
    said = "shown to be equivalent" if shown else "no difference is shown"
    assert f"p = {t.sf((margin - 0.01) / (0.04 / 3**0.5), 2):.2g} of being {margin:g}" in done.out
    assert done.out.endswith(f": {said}.\n")
    assert done.code == 0
    found = json.loads(command("compare", ours, ours, "--margin", margin, "--json").out)
    assert (found["verdict"], found["p_equivalent"], found["margin"]) == ("equivalent", 0, margin)


def test_better_that_is_required_and_shown(sides: tuple[Path, Path], command: Command) -> None:
    assert command("compare", *sides, "--require", "better").code == 0


def test_further_seeds_of_one_side_do_not_count_and_other_seeds_are_not_paired(
    sides: tuple[Path, Path],
) -> None:
    """As in `report`."""
    ours, theirs = sides
    known = compare(ours, theirs).difference
    write_run(theirs.parents[2], method="ddpo", seed=3, gain=0.13)
    found = compare(ours, theirs)
    assert found.difference == known
    assert "3 and 4 seeds, paired over the 3 of both): shown to be better" in found.sentence()
    (row,) = (r for r in records(read_groups([ours.parent])) if r["method"] == "ddpo")
    assert row["difference"] == pytest.approx(-known.mean)
    assert row["seeds_compared"] == "3"
    lines = [line.get_ydata() for line in comparison_figure(found).axes[0].lines[:3]]
    np.testing.assert_allclose(np.array(lines), [[1, 0.5], [1.5, 0.9], [2, 1.6]])
    shutil.rmtree(theirs / "seed-0")
    found = compare(ours, theirs)
    assert found.difference == pytest.approx(difference([1, 1.5, 2], [0.9, 1.6, 1.3]))
    assert found.sentence().endswith(", 3 seeds each): no difference is shown.")


def test_other_images_are_not_paired(sides: tuple[Path, Path]) -> None:
    for path in sides[1].rglob("eval.csv"):
        path.write_text(path.read_text().replace("sea horse", "dog"))
    found = compare(*sides)
    assert found.difference == pytest.approx(difference([1, 1.5, 2], [0.5, 0.9, 1.6]))
    assert (
        "3 seeds each, evaluated on different images): no difference is shown." in found.sentence()
    )


def test_one_seed_shows_nothing(sides: tuple[Path, Path]) -> None:
    found = compare(sides[0] / "seed-1", sides[1] / "seed-1")
    assert found.sentence() == (
        "d3po gains 0.600 kB more than ddpo on incompress (difference +0.600, no interval without "
        "two seeds of each: run more, 1 seed each, paired): no difference is shown."
    )


def test_one_method_with_other_settings_is_told_apart_by_its_folder(tmp_path: Path) -> None:
    ours, theirs = (side(tmp_path / name, "d3po", (1, 1.5)) for name in "ab")
    assert compare(ours, theirs).sentence().startswith(f"{ours} gains 0.000 kB more than {theirs}")


def test_json_has_the_numbers_of_report(sides: tuple[Path, Path], command: Command) -> None:
    found = json.loads(command("compare", *sides, "--json").out)
    shown = {r["method"]: r for r in records(read_groups([sides[0].parent]))}
    for name, method in (("a", "d3po"), ("b", "ddpo")):
        own: dict[str, Any] = found[name]
        assert own["seeds"] == [0, 1, 2]
        for key in ("base", "end", "gain", "low", "high"):
            assert own[key] == shown[method][key]
    assert -found["difference"] == pytest.approx(shown["ddpo"]["difference"])
    assert (found["verdict"], found["paired"], found["unit"]) == ("better", True, "kB")
    assert found["a"]["kl"] is None


def test_the_plot_shows_every_seed_and_the_difference(
    sides: tuple[Path, Path], command: Command, tmp_path: Path
) -> None:
    command("compare", *sides, "--plot", tmp_path / "figures" / "both.png")
    with Image.open(tmp_path / "figures" / "both.png") as image:
        assert min(image.size) > 400
    (tmp_path / "file").touch()
    done = command("compare", *sides, "--plot", tmp_path / "file" / "both.png")
    refused(done, "both.png cannot be written", "Give another --plot that can be written")
    left, right = comparison_figure(compare(*sides)).axes
    pairs = [np.asarray(line.get_ydata()) for line in left.lines[:3]]
    np.testing.assert_allclose(pairs, [[1, 0.5], [1.5, 0.9], [2, 1.6]])
    assert [label.get_text() for label in left.get_xticklabels()] == ["d3po", "ddpo"]
    assert right.get_ylabel() == "difference (kB)"
    assert left.figure.get_suptitle() == "d3po is better on incompress (↑ better)"


def test_long_folder_names_stay_apart_in_the_plot(tmp_path: Path) -> None:
    names = ("a_WIDE_NAME_of_the_first_runs", "A-WIDE-NAME-of-the-other-runs")
    gains = ((1, 1.5, 2), (0.5, 0.9, 1.6))
    ours, theirs = (
        side(tmp_path / name, "d3po", own) for name, own in zip(names, gains, strict=True)
    )
    with own_style():
        figure = comparison_figure(compare(ours, theirs))
        figure.draw_without_rendering()
    one, other = (x.get_window_extent() for x in figure.axes[0].get_xticklabels())
    assert one.x1 < other.x0
    (title,) = figure.texts
    assert title.get_window_extent().x0 > 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nowhere d3po", "no run folders (with config.json and eval.csv) below nowhere"),
        ("tiny/incompress tiny/incompress/d3po", "holds d3po on incompress, ddpo on incompress."),
        ("tiny/incompress/d3po tiny/compress/d3po", "Compare runs on one objective."),
        ("tiny/incompress/d3po other/incompress/d3po", "share the base model"),
        ("tiny/incompress/d3po tiny/incompress/ddpo --plot both.gif", "no .png or .svg"),
        ("tiny/incompress/d3po tiny/incompress/ddpo --require best", "'best' is not one of"),
        ("tiny/incompress/d3po", "Missing argument 'B'"),
        ("tiny/incompress/d3po ''", "it is empty"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(
    line: str, said: str, sides: tuple[Path, Path], command: Command, tmp_path: Path
) -> None:
    side(tmp_path, "d3po", (1, 2), "compress")
    write_run(tmp_path, model="other")
    before = files(tmp_path)
    refused(command("compare", *(part.strip("'") for part in line.split())), said)
    assert files(tmp_path) == before
