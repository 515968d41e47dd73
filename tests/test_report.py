"""Figures from made-up runs whose numbers can be checked by hand."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from d3po_bench.errors import UserError
from d3po_bench.runs.run import RunFolder
from eval.analysis import tries
from eval.analysis.runs import Run, averages, curves, evaluated, read_groups
from eval.analysis.runs import read_run as read
from eval.analysis.scores import scores_of
from eval.analysis.statistics import interval
from eval.figures import curves as figure_of
from eval.figures import sheets, style
from tests.made_up import ROUNDS, write_run


def write_samples(folder: Path, rounds: Sequence[int] = ROUNDS, side: int = 64) -> None:
    for n, (i, name) in itertools.product(rounds, enumerate(("cat", "sea-horse"))):
        path = folder / "samples" / f"round-{n:05d}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (n * 20, 100, i * 200)).save(path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """2 objectives x 2 methods x 3 seeds; the second method gains nothing."""
    for objective, method in itertools.product(("compress", "incompress"), ("d3po", "ddpo")):
        for seed in range(3):
            gain = {"d3po": 0.1, "ddpo": 0.0}[method]
            folder = write_run(tmp_path / "runs", objective, method, seed, gain=gain)
        write_samples(folder)
    return tmp_path / "runs"


def table(root: Path, x: str = "pairs") -> Any:
    return curves(map(read, evaluated([root])), x)


def drawn(root: Path, x: str = "pairs") -> Any:
    """The figure of the runs below a folder."""
    return figure_of.curves_figure(table(root, x), x, scores_of(evaluated([root])))


def read_run(folder: Path) -> Run:
    return read(RunFolder(folder))


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---- the command


def test_files_written(runs: Path) -> None:
    files = figure_of.plot([runs])
    names = ["curves.png", "curves.svg"] + [
        f"samples-tiny-{objective}-{method}.png"
        for objective, method in itertools.product(("compress", "incompress"), ("d3po", "ddpo"))
    ]
    assert files == [runs / "plots" / name for name in names]
    for file in files:
        start = b"<?xml" if file.suffix == ".svg" else b"\x89PNG"
        assert file.read_bytes().startswith(start)
    assert sorted(path.name for path in (runs / "plots").iterdir()) == sorted(names)


def test_a_legend_of_many_methods_stays_in_its_figure(tmp_path: Path) -> None:
    for objective in ("compress", "incompress"):
        for n, seed in itertools.product(range(5), (0, 1)):
            write_run(tmp_path, objective, f"preferred_images_{n}", seed)
    figure = drawn(tmp_path)
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width


def test_ticks_over_drift_are_round_and_not_too_close() -> None:
    # The root of 0.011 is 0.105, a quarter of it 0.026: roots 0, 0.032, 0.071, 0.1.
    assert figure_of.root_ticks(0.011) == pytest.approx([0, 0.001, 0.005, 0.01])
    assert figure_of.root_ticks(1.4) == pytest.approx([0, 0.1, 0.5])
    assert figure_of.root_ticks(0) == [0]


def test_same_runs_same_bytes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write_samples(write_run(runs, seed=seed))
    first, second = (figure_of.plot([runs], tmp_path / name) for name in "ab")
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]
    assert b"date" not in first[1].read_bytes()
    with Image.open(first[0]) as image:
        assert "Software" not in image.info


def test_matplotlibrc_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs")
    before = figure_of.plot([run], tmp_path / "a")[1].read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["serif"])
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    assert figure_of.plot([run], tmp_path / "b")[1].read_bytes() == before


def test_one_run_by_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path, animal=False)
    names = [file.name for file in figure_of.plot([folder], tmp_path / "figures")]
    assert names == ["curves.png", "curves.svg"]


def test_import_is_cheap() -> None:
    heavy = "{'matplotlib', 'numpy', 'pandas', 'PIL', 'scipy', 'torch'}"
    code = f"import sys, eval.figures.curves; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# ---- the numbers


@pytest.mark.parametrize(
    ("x", "expected"),
    # 5 rounds of 32 pairs and 64 images; 2 s of sampling + 1 s of learning, evaluation left out
    [("pairs", [0, 160, 320]), ("images", [0, 320, 640]), ("seconds", [0, 15, 30])],
)
def test_x(tmp_path: Path, x: str, expected: list[float]) -> None:
    write_run(tmp_path, seed=1)
    assert table(tmp_path, x)["x"].tolist() == expected


def test_curve_by_hand(tmp_path: Path) -> None:
    write_run(tmp_path, seed=1)
    found = table(tmp_path)
    assert list(found.columns[:5]) == ["model", "objective", "method", "seed", "round"]
    assert found["round"].tolist() == [0, 5, 10]
    # 7 + 1 / 10 + 0.1 * round; rows of eta0 are 1 kB higher and must not count
    np.testing.assert_allclose(found["score"], [7.1, 7.6, 8.1])
    np.testing.assert_allclose(found["animal"], 0.8)


def test_averages_by_hand(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, seed=seed)
    found = averages(table(tmp_path))
    assert found["seeds"].tolist() == [3, 3, 3]
    np.testing.assert_allclose(found["mean"], [7.1, 7.6, 8.1])
    half = 4.30265 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    np.testing.assert_allclose(found["low"], found["mean"] - half, rtol=1e-6)
    np.testing.assert_allclose(found["high"], found["mean"] + half, rtol=1e-6)


def test_running_seeds_meet_at_shared_rounds(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, rounds=(0, 5))
    found = table(tmp_path)
    assert len(found) == 5
    assert averages(found)["round"].tolist() == [0, 5]


def test_evaluated_but_not_logged_round_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:9]) + "\n")
    assert table(tmp_path)["round"].tolist() == [0, 5]


def test_images_of_no_animal_do_not_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(re.sub(r"(cat,0,.*),0.8", r"\1,nan", text))
    np.testing.assert_allclose(table(tmp_path)["animal"], 0.8)
    assert tries.ends(folder)["recognised"] == pytest.approx(0.8)


def test_interval_holds_the_mean_and_narrows() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(5, 4)), rng.normal(size=(200, 4))
    low, high = interval(few)
    assert low.shape == high.shape == (4,)
    assert ((low < few.mean(0)) & (few.mean(0) < high)).all()
    # normal approximation: 2 * 1.96 / sqrt(200) = 0.277
    low, high = interval(many)
    np.testing.assert_allclose(high - low, 0.277 * many.std(0), rtol=0.1)


def test_interval_of_equal_seeds_is_their_value() -> None:
    np.testing.assert_array_equal(interval(np.full((3, 2), 5.0)), np.full((2, 2), 5.0))


def test_one_seed_has_no_interval() -> None:
    assert np.isnan(interval([[1.0, 2.0]])).all()


@pytest.mark.parametrize("values", [[], 3.0])
def test_no_seed(values: Any) -> None:
    with pytest.raises(ValueError, match="S >= 1 seeds"):
        interval(values)


# ---- the figure


def test_panels_and_legend(runs: Path) -> None:
    figure = drawn(runs)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["compress (↓ better)", "incompress (↑ better)"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["held-out score (kB)", "recognised\n(probability)"] * 2
    methods = ["d3po (3 seeds)", "ddpo (3 seeds)"]
    assert legend_of(figure) == [*methods, "base model", "95 % interval over seeds"]


def points(line: Line2D) -> Any:
    """[R, 2] points of a line."""
    return np.column_stack([line.get_xdata(), line.get_ydata()])


def test_lines_of_a_panel(runs: Path) -> None:
    axes = drawn(runs, "images").axes[0]
    base, seeds, means = axes.lines[0], axes.lines[1:7], axes.lines[7:]
    np.testing.assert_allclose(points(base)[:, 1], 7.1)
    assert [len(points(line)) for line in seeds] == [3] * 6
    assert [line.get_color() for line in means] == ["#0072B2", "#D55E00"]
    np.testing.assert_allclose(points(means[0]), [[0, 7.1], [320, 7.6], [640, 8.1]])


# Of 7.0, 7.1 and 7.2 at first, and 1 more at the end: mean -+ 4.30265 * 0.1 / sqrt(3)
@pytest.mark.parametrize(("seeds", "expected"), [(1, []), (3, [6.851586, 8.348414])])
def test_band(tmp_path: Path, seeds: int, expected: list[float]) -> None:
    for seed in range(seeds):
        write_run(tmp_path, seed=seed)
    figure = drawn(tmp_path)
    paths = figure.axes[0].collections[0].get_paths()
    heights = [np.asarray(path.vertices)[:, 1] for path in paths]
    found = [end for height in heights for end in (height.min(), height.max())]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert ("95 % interval over seeds" in legend_of(figure)) == (seeds > 1)


def test_one_seed_in_legend(tmp_path: Path) -> None:
    write_run(tmp_path)
    figure = drawn(tmp_path)
    assert legend_of(figure) == ["d3po (1 seed)", "base model"]


def test_animals_of_one_objective_only(tmp_path: Path) -> None:
    write_run(tmp_path, "compress", animal=False)
    write_run(tmp_path, "incompress")
    below = drawn(tmp_path).axes[1::2]
    assert [np.isfinite(points(line)).all() for axes in below for line in axes.lines[1:]] == [
        False, True, True
    ]  # fmt: skip


def test_unequal_numbers_of_seeds(tmp_path: Path) -> None:
    for objective, seed in (("compress", 0), ("compress", 1), ("incompress", 0)):
        write_run(tmp_path, objective, seed=seed)
    assert figure_of.seeds_label(table(tmp_path), "d3po") == "d3po (1-2 seeds)"


def test_bands_of_many_methods_are_not_crossed_by_seeds(tmp_path: Path) -> None:
    methods = ("d3po", "ddpo", "dpok", "reward_weighted")
    for method, seed in itertools.product(methods, (0, 1)):
        write_run(tmp_path, method=method, seed=seed)
    axes = drawn(tmp_path).axes[0]
    assert len(axes.lines) == 1 + 4  # the base model, and a mean for each method
    assert len(axes.collections) == 4


@pytest.mark.parametrize("x", [pytest.param("pairs", marks=pytest.mark.slow), "images"])
@pytest.mark.parametrize("objectives", [("compress",), ("compress", "incompress")])
def test_nothing_of_a_full_figure_overlaps(
    tmp_path: Path, objectives: tuple[str, ...], x: str
) -> None:
    # seed 4 of some only: the longest labels, "reward_weighted (4-5 seeds)"
    for i, objective in enumerate(objectives):
        for method, seed in itertools.product(style.LOOKS, range(5 - i)):
            write_run(tmp_path, objective, method, seed)
    with style.own_style():
        figure = drawn(tmp_path, x)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box is not None and box.y1 <= legend.y0 for box in boxes)
    assert not any(
        one is not None and other is not None and one.overlaps(other)
        for one, other in itertools.combinations(boxes, 2)
    )


SUM = "press-1-image_reward-0.5-aesthetic-0.25"


@pytest.mark.parametrize("others", [("incom" + SUM,), ("incom" + SUM, "my_reward-1-compress-0.05")])
def test_titles_of_sums_stay_apart_and_inside(tmp_path: Path, others: tuple[str, ...]) -> None:
    for objective in ("com" + SUM, *others):
        write_run(tmp_path, objective)
    with style.own_style():
        figure = drawn(tmp_path)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert titles[-1].x1 <= figure.bbox.x1
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(titles))


@pytest.mark.parametrize(
    ("letters", "lines"),
    [
        (23, "incompress-1-|image_reward-0.5-|aesthetic-0.25|(↑ better)"),
        (33, "incompress-1-image_reward-0.5-|aesthetic-0.25 (↑ better)"),
        (12, "incompress-|1-image_|reward-0.5-|aesthetic-|0.25|(↑ better)"),
    ],
)
def test_lines_end_where_names_do(letters: int, lines: str) -> None:
    words = f"incom{SUM} (↑ better)"
    assert style.wrapped(words, letters) == lines.replace("|", "\n")
    assert style.wrapped(words, 100) == words


def test_colours_stay_with_methods(tmp_path: Path) -> None:
    write_run(tmp_path, "compress", "ddpo")
    write_run(tmp_path, "incompress", "d3po")
    write_run(tmp_path, "incompress", "stranger")
    figure = drawn(tmp_path)
    above = [axes for axes in figure.axes if axes.get_title()]
    assert above[0].lines[-1].get_color() == "#D55E00"
    assert [line.get_color() for line in above[1].lines[-2:]] == ["#0072B2", "#56B4E9"]


def test_unknown_objective_has_no_arrow(tmp_path: Path) -> None:
    write_run(tmp_path, "my_objective", animal=False)
    axes = drawn(tmp_path).axes[0]
    assert axes.get_title() == "my_objective"
    assert axes.get_ylabel() == "held-out score"


# ---- the sheets


def sheet(folder: Path) -> Image.Image:
    found = sheets.samples_sheet([read_run(folder)])
    assert found is not None
    return Image.open(io.BytesIO(found))


def test_sheet_shows_first_middle_and_last_round(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    write_samples(folder, (0, 3, 5, 8, 10))
    image = sheet(folder)
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(n * 20, 100, blue) for n in (0, 5, 10) for blue in (0, 200)} <= colours
    assert not {(n * 20, 100, 0) for n in (3, 8)} & colours


@pytest.mark.parametrize(("side", "shown"), [(64, 128), (40, 120), (100, 100), (512, 160)])
def test_pictures_have_a_readable_size(tmp_path: Path, side: int, shown: int) -> None:
    folder = write_run(tmp_path)
    write_samples(folder, (0,), side)
    pixels = np.asarray(sheet(folder))
    assert (pixels == (0, 100, 0)).all(-1).sum() == shown**2


def test_upscaling_keeps_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = np.asarray(sheets._picture(tmp_path / "a.png"))
    np.testing.assert_array_equal(shown, pixels.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    ("round_", "spent", "label"),
    [
        (0, {"pairs": 0.0, "images": 0.0}, "base model"),
        (9, {"pairs": 1600.0, "images": 3200.0}, "after 1,600 pairs"),
        (9, {"pairs": 3200.0, "images": 3200.0}, "after 3,200 images"),
        (9, {}, "after round 9"),
    ],
)
def test_row_labels(round_: int, spent: dict[str, float], label: str) -> None:
    assert sheets._when(round_, spent) == label


def test_mean_beside_pictures_is_of_their_sampler(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    write_samples(folder)
    # 7 + 0.1 * 10, and 1 kB more with eta0
    strip = sheets._strip(read_run(folder), 10)
    assert strip.label == "after 320 pairs\nmean 9.00 kB"


def test_columns_of_a_sheet_are_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = Mock(return_value="")
    monkeypatch.setattr(sheets, "_wrapped", wrapped)
    folder = write_run(tmp_path)
    rows = (folder / "eval.csv").read_text().replace("sea horse", "Cat!")
    (folder / "eval.csv").write_text(rows)
    write_samples(folder)
    for path in folder.rglob("sea-horse.png"):
        path.rename(path.with_stem("cat-2"))
    sheet(folder)
    assert [call.args[0] for call in wrapped.call_args_list] == ["Cat!", "cat"]


def test_prompts_of_wide_letters_stay_over_their_pictures() -> None:
    font = sheets._font("DejaVuSans", 20)
    lines = sheets._wrapped("WWWWWW MMM", font, 102).split("\n")
    assert max(map(font.getlength, lines)) <= 102 < font.getlength("WWWWWW")


def test_lowest_seed_with_samples(runs: Path) -> None:
    # only seed 2 has any
    members = [read(run) for run in evaluated([runs / "tiny" / "compress" / "d3po"])]
    assert sheets.samples_sheet(members) == sheets.samples_sheet(members[2:])
    assert sheets.samples_sheet(members[:2]) is None


# ---- errors


def refused(call: Any) -> str:
    """What an error says, in one line."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_nothing_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / name) in refused(lambda: figure_of.plot([tmp_path / name]))


def test_no_path_at_all() -> None:
    refused(lambda: figure_of.plot([]))


def test_run_cut_short_before_its_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0)
    folder = write_run(tmp_path, seed=1)
    (folder / "eval.csv").unlink()
    text = refused(lambda: figure_of.plot([tmp_path]))
    assert f"The run in {folder} has no eval.csv" in text
    assert "Remove that folder and run it again" in text
    (folder / "config.json").write_text("{")
    assert str(folder) in refused(lambda: figure_of.plot([tmp_path]))


def test_run_that_asks_for_no_evaluation_is_passed_over(tmp_path: Path) -> None:
    (write_run(tmp_path, seed=1, eval_every=0) / "eval.csv").unlink()
    assert "was evaluated, since all have the setting eval_every=0" in refused(
        lambda: figure_of.plot([tmp_path])
    )
    folder = write_run(tmp_path, seed=0)
    assert [run.folder for run in evaluated([tmp_path])] == [folder]


# 3 rounds x 2 samplers x 2 prompts x 2 images, and the header
@pytest.mark.parametrize("characters", range(1, 30, 4))
def test_half_a_line_at_the_end(tmp_path: Path, characters: int) -> None:
    folder = write_run(tmp_path)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(text[:-characters])
    message = refused(lambda: figure_of.plot([tmp_path]))
    assert f"{folder / 'eval.csv'} cannot be read: half a line at its end" in message


@pytest.mark.parametrize("lines", [1, 3, 4, 5])
def test_evaluation_cut_between_lines(tmp_path: Path, lines: int) -> None:
    folder = write_run(tmp_path)
    text = (folder / "eval.csv").read_text().splitlines(keepends=True)
    (folder / "eval.csv").write_text("".join(text[:-lines]))
    message = refused(lambda: figure_of.plot([tmp_path]))
    assert str(folder) in message
    assert "of 4 images of round" in message


def test_half_a_round_of_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])
    said = refused(lambda: figure_of.plot([tmp_path]))
    assert f"{folder / 'metrics.jsonl'} cannot be read" in said


def test_several_base_models(tmp_path: Path) -> None:
    one = write_run(tmp_path, model="tiny")
    other = write_run(tmp_path, "compress", "ddpo", model="hub/some-model")
    text = refused(lambda: figure_of.plot([tmp_path]))
    assert f"share the base model: it is 'hub/some-model' in {other} and 'tiny' in {one}" in text
    assert figure_of.plot([tmp_path / "tiny"])


def test_overlapping_paths_count_once(runs: Path) -> None:
    assert len(evaluated([runs, runs / "tiny", runs / "tiny" / "compress"])) == 12


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"model": "tiny", "objective": null, "method": "d3po", "seed": 0}'),
        ("config.json", '{"model": "tiny", "objective": "a", "method": "d3po", "seed": "0"}'),
        ("eval.csv", ""),
        ("eval.csv", "\n"),
        ("eval.csv", "round,sampler,prompt,index\n0,eta1,cat,0\n"),
        ("eval.csv", "round,sampler,prompt,index,score\n0,eta1,cat,0,big\n"),
        ("eval.csv", "round,sampler,prompt,index,score\n,eta1,cat,0,1\n"),
        ("eval.csv", "round,prompt,index,score\n0,cat,0,1\n"),
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"round": 1}\n'),
        ("metrics.jsonl", '{"round": 1, "pairs": "x", "images": 2}\n'),
        ("timing.jsonl", '{"round": 1, "sample": "x"}\n'),
        ("timing.jsonl", '{"sample": 1.0}\n'),
    ],
)
def test_unreadable(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path)
    (folder / name).write_text(content)
    assert str(folder) in refused(lambda: figure_of.plot([tmp_path]))


def test_not_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "eval.csv").write_bytes(b"\xff\xfe\x00")
    refused(lambda: figure_of.plot([tmp_path]))


@pytest.mark.parametrize(
    "rows", ["", "0,eta0,cat,0,7.0\n", "0,eta1,cat,0,\n", "99,eta1,cat,0,7.0\n"]
)
def test_no_evaluation_rows(tmp_path: Path, rows: str) -> None:
    folder = write_run(tmp_path)
    (folder / "eval.csv").write_text("round,sampler,prompt,index,score\n" + rows)
    assert str(folder / "eval.csv") in refused(lambda: figure_of.plot([tmp_path]))


def test_seconds_without_timing(tmp_path: Path) -> None:
    (write_run(tmp_path) / "timing.jsonl").unlink()
    assert "--x pairs" in refused(lambda: figure_of.plot([tmp_path], x="seconds"))
    assert figure_of.plot([tmp_path], x="pairs")


@pytest.mark.parametrize(
    "x", ["scorer_calls", pytest.param("unet_forwards", marks=pytest.mark.slow)]
)
def test_over_further_counts(tmp_path: Path, x: str) -> None:
    folder = write_run(tmp_path)
    assert "metrics.jsonl" in refused(lambda: figure_of.plot([tmp_path], x=x))
    path = folder / "metrics.jsonl"
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(m | {x: 7 * m["round"]}) + "\n" for m in logged))
    table = curves([read_run(folder)], x)
    assert (table["x"] == 7 * table["round"]).all()
    svg = (tmp_path / "plots" / "curves.svg") if figure_of.plot([tmp_path], x=x) else None
    assert svg is not None
    assert figure_of.X_LABELS[x] in svg.read_text()


@pytest.mark.parametrize("logged", [0, 5])
def test_a_run_that_was_stopped_is_no_end(tmp_path: Path, logged: int) -> None:
    """Averaged with others, its last scores would pass for what the method reaches."""
    write_run(tmp_path, seed=0)
    stopped = write_run(tmp_path, seed=1)
    for name in ("metrics.jsonl", "timing.jsonl"):
        text = (stopped / name).read_text().splitlines(keepends=True)
        (stopped / name).write_text("".join(text[:logged]))
    rows = (stopped / "eval.csv").read_text().splitlines(keepends=True)
    kept = [row for row in rows if not row.startswith("10,")]
    (stopped / "eval.csv").write_text("".join(kept))
    said = refused(lambda: figure_of.plot([tmp_path]))
    assert f"The run in {stopped} has not ended: {logged} of 10 rounds" in said
    (group,) = read_groups([tmp_path], unfinished=True).values()
    means = averages(curves(group, "pairs"))
    assert means["round"].max() == logged
    assert figure_of.plot([tmp_path], unfinished=True)


def test_same_seed_twice(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert "Seed 0 of d3po is there twice" in refused(lambda: figure_of.plot([tmp_path]))


def test_seeds_with_other_settings(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, learning_rate=1e-3)
    write_run(tmp_path, seed=1, learning_rate=3e-3)
    said = refused(lambda: figure_of.plot([tmp_path]))
    assert "share the setting learning_rate: it is 0.001 in" in said


def test_damaged_sample(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    write_samples(folder)
    path = folder / "samples" / "round-00010" / "cat.png"
    path.write_bytes(path.read_bytes()[:60])
    assert str(path) in refused(lambda: figure_of.plot([tmp_path]))


def test_strange_sample_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    write_samples(folder)
    (folder / "samples" / "round-00010").rename(folder / "samples" / "round-last")
    assert "round-last" in refused(lambda: figure_of.plot([tmp_path]))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = write_run(tmp_path / "runs")
    with pytest.raises(UserError, match=r"curves\.png cannot be written: .* --out"):
        figure_of.plot([folder], tmp_path / "file" / "figures")


def test_seeds_of_other_inputs_are_not_averaged(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, seed=seed) for seed in range(3)]

    def put(number: int, **inputs: str) -> None:
        (folders[number] / "provenance.json").write_text(json.dumps({"inputs": inputs}))

    put(1, model="m1", prompts="p1")  # seed 0 has none on record
    put(2, model="m1", prompts="p1")
    assert len(read_groups([tmp_path])) == 1
    for name, value in {"model": "m2", "prompts": "p2"}.items():
        put(2, **{"model": "m1", "prompts": "p1"} | {name: value})
        said = refused(lambda: read_groups([tmp_path]))
        assert all(str(folder) in said for folder in folders[1:])
        assert f"{name}: it is '{name[0]}1' in" in said


def test_methods_on_other_weights_of_a_model_are_not_compared(tmp_path: Path) -> None:
    for method, model in {"d3po": "m1", "ddpo": "m2"}.items():
        facts = {"inputs": {"model": model}}
        (write_run(tmp_path, method=method) / "provenance.json").write_text(json.dumps(facts))
    refused(lambda: read_groups([tmp_path]))


def test_unknown_x(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="pairs, images, scorer_calls, unet_forwards, unet_backwards, seconds"
    ):
        figure_of.plot([tmp_path], x="epochs")
