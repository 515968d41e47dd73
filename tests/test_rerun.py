"""`verify --rerun`: the same bytes, other rounding, and another learning rate."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from d3po_bench.cli import cli, main
from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs.run import RunFolder, find_runs
from eval.analysis.statistics import another_seed, same_seed
from eval.verify import folder as verify
from eval.verify import rerun
from results import measure as measuring
from tests.commands import run_of

SEEDS = 5
TEXT = ("config.json", "provenance.json", "metrics.jsonl", "eval.csv", "timing.jsonl")


@pytest.fixture(scope="module")
def made(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with five seeds of a run of a second, as they are published."""
    home = tmp_path_factory.mktemp("made")
    more = {"prompts_per_round": 4, "eval_prompts": 8, "eval_images": 2, "micro_batch": 32}
    place = ("--seeds", str(SEEDS), "--jobs", "1", "--out", home / "runs")
    main(run_of(micro, *place, rounds=3, **more))
    for config in sorted((home / "runs").rglob("config.json")):
        target = home / "results" / config.parent.relative_to(home / "runs")
        target.mkdir(parents=True)
        for name in TEXT:
            shutil.copy(config.parent / name, target)
    verify.record(home / "results")
    return home / "results"


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "results")
    return tmp_path / "results"


def cells(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.rglob("config.json"))


def again(results: Path, *more: str) -> Result:
    verify.record(results)
    return CliRunner().invoke(cli, ["verify", str(results), "--rerun", "1", *more])


def edit(path: Path, **changes: Any) -> None:
    """Values of a JSON file changed; ... removes one."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


# ---- the verdict of the command


def test_the_same_command_gives_the_same_bytes(results: Path, tmp_path: Path) -> None:
    """Of runs that were published as one file."""
    words = ["publish", str(results), str(results), "--no-sheets", "--pack"]
    assert CliRunner().invoke(measuring.main, words).exit_code == 0
    verify.record(results)
    before = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    kept = ("--out", str(tmp_path / "again"))
    done = CliRunner().invoke(cli, ["verify", str(results), "--rerun", "2", *kept])
    assert done.exit_code == 0, done.output
    assert done.output.count(": reproduced, same bytes") == 2
    assert {p: p.read_bytes() for p in results.rglob("*") if p.is_file()} == before
    assert len(list((tmp_path / "again").rglob("eval.csv"))) == 2


@pytest.mark.slow
def test_two_threads_reproduce(results: Path) -> None:
    done = again(results, "--set", "threads=2")
    assert done.exit_code == 0, done.output
    assert ": reproduced" in done.output


@pytest.mark.slow
def test_another_split_reproduces_with_other_bytes(results: Path) -> None:
    done = again(results, "--set", "micro_batch=5", "--set", "sample_batch=3")
    assert done.exit_code == 0, done.output
    assert re.search(r"seed-\d: reproduced$", done.output, re.MULTILINE)
    assert "micro_batch 32 -> 5" in done.output
    assert re.search(r"first round off by score_mean [\d.e-]+ %, loss .*is allowed", done.output)
    assert "log kl" in done.output


@pytest.mark.parametrize("factor", [10, pytest.param(0.1, marks=pytest.mark.slow)])
def test_another_learning_rate_does_not_reproduce(results: Path, factor: float) -> None:
    """The runs were made with 3e-3; their configs say something else."""
    for run in cells(results):
        config = json.loads((run / "config.json").read_text()) | {"learning_rate": 3e-3 * factor}
        del config["run_id"]
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
        }
        (run / "config.json").write_text(RunConfig(**kept).to_json())
        edit(run / "provenance.json", platform="another")
    done = again(results)
    assert isinstance(done.exception, RunError), done.output
    assert done.exception.exit_code == 1
    assert re.search(r"not reproduced: .*log kl [+-][\d.]+, as another seed", done.output)


def test_other_bytes_in_the_same_place_do_not_reproduce(results: Path) -> None:
    for run in cells(results):
        text = (run / "eval.csv").read_text()
        (run / "eval.csv").write_text(text.replace(",eta0,", ",eta0,", 1).rstrip("\n") + "\n\n")
    done = again(results)
    assert "not reproduced: other bytes on the same platform with the same versions" in done.output
    assert isinstance(done.exception, RunError)


@pytest.mark.slow
def test_columns_that_were_not_measured_then_are_no_difference(results: Path) -> None:
    for run in cells(results):
        kept = [line.split(",")[:5] for line in (run / "eval.csv").read_text().splitlines()]
        (run / "eval.csv").write_text("".join(",".join(cells) + "\n" for cells in kept))
        edit(run / "provenance.json", content=..., run_id=...)
    done = again(results)
    assert "reproduced, same numbers, and more columns" in done.output
    assert done.exit_code == 0, done.output


def test_the_draw_follows_the_seed(made: Path) -> None:
    runs = find_runs([made])
    assert {path for seed in range(20) for path in rerun.drawn(runs, 1, seed)} == {*runs}
    assert rerun.drawn(runs, 2, 3) == rerun.drawn(runs, 2, 3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rerun", "6"), "There are 5 runs, fewer than --rerun 6"),
        (("--rerun", "1", "--set", "learning_rate=1"), "would change the numbers of a run"),
        (("--rerun", "1", "--set", "threads=-1"), "threads"),
        (("--set", "threads=1"), "--set and --out need --rerun"),
    ],
)
def test_what_cannot_be_run_again_is_refused(made: Path, more: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(cli, ["verify", str(made), *more])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)
    assert done.exception.exit_code == 2


# ---- the check itself, of files that are made up


def judged(made: Path, tmp_path: Path, change: Any, published: Any = None) -> rerun.Verdict:
    """The verdict on a copy of seed 0 that `change` has altered, from another platform."""
    shutil.copytree(made, tmp_path / "p")
    run = cells(tmp_path / "p")[0]
    shutil.copytree(run, tmp_path / "again")
    edit(tmp_path / "again" / "provenance.json", platform="another")
    if published:
        published(run)
    change(tmp_path / "again")
    return rerun.judge(RunFolder(run), RunFolder(tmp_path / "again"), "cell")


def scaled(column: int, by: float, rounds: str = "3") -> Any:
    """A change that multiplies a column of the evaluation at some rounds."""

    def change(folder: Path) -> None:
        head, *rows = [ln.split(",") for ln in (folder / "eval.csv").read_text().splitlines()]
        for row in rows:
            if row[0] in rounds and row[column]:
                row[column] = str(float(row[column]) * by)
        text = "\n".join(",".join(row) for row in [head, *rows]) + "\n"
        (folder / "eval.csv").write_text(text)

    return change


SCORE, KL = 4, 5


def test_a_little_rounding_is_reproduced(made: Path, tmp_path: Path) -> None:
    verdict = judged(made, tmp_path, scaled(SCORE, 1 + 1e-6, "03"))
    assert verdict.reproduced, verdict
    assert verdict.details[0].startswith("platform Linux")


@pytest.mark.parametrize("by", [2.0, 0.5])
def test_a_score_far_off_is_not_on_both_sides(made: Path, tmp_path: Path, by: float) -> None:
    """Better than published is as suspect as worse."""
    verdict = judged(made, tmp_path, scaled(SCORE, by))
    assert not verdict.reproduced
    assert "gain" in verdict.said


@pytest.mark.parametrize("by", [1e4, 1e-4, 0.0])
def test_a_drift_far_off_is_not_reproduced(made: Path, tmp_path: Path, by: float) -> None:
    verdict = judged(made, tmp_path, scaled(KL, by))
    assert not verdict.reproduced
    assert "log kl" in verdict.said


def first_round(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A run with another first round; the end of it is a little off, as by rounding."""
    scaled(SCORE, 1 + 1e-6)(folder)
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps(change(json.loads(first))), *rest]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def with_images(count: int) -> Callable[[Path], None]:
    """A change that has a run say that its first round drew so many images."""
    return lambda run: first_round(run, lambda found: {**found, "images": count})


@pytest.mark.parametrize(
    ("name", "by", "images", "fine"),
    [
        ("score_mean", 1 + 1e-4, 128, True),
        ("score_mean", 1 + 1e-3, 128, False),
        ("loss", 1 - 1e-3, 128, False),
        ("grad_norm", 1 + 1e-3, 128, False),
        ("loss", 1 + 1e-3, 32, True),
        ("grad_norm", 1 - 2e-3, 32, False),
        ("loss", 1 + 1e-3, 500, False),
        ("grad_norm", 1 + 1e-4, 500, True),
    ],
)
def test_the_first_round_is_near(
    made: Path, tmp_path: Path, name: str, by: float, images: int, fine: bool
) -> None:
    """A wrong rate moves it by a thousandth and more, rounding by far less."""
    verdict = judged(
        made, tmp_path,
        lambda run: first_round(run, lambda r: {**r, "images": images, name: r[name] * by}),
        with_images(images),
    )  # fmt: skip
    off = "" if fine else f"{name} of round 1 is"
    assert verdict.reproduced is fine, verdict
    assert off in verdict.said


def test_how_far_the_first_round_is_off_is_told(made: Path, tmp_path: Path) -> None:
    """Both with digits enough to be told apart."""
    verdict = judged(
        made, tmp_path,
        lambda run: first_round(run, lambda r: {**r, "images": 128, "loss": r["loss"] * 1.0005}),
        with_images(128),
    )  # fmt: skip
    assert verdict.said.endswith("was published: off by 0.05 %, 0.03 % is allowed")


def test_numbers_that_rounding_moves_in_steps_are_not_compared(made: Path, tmp_path: Path) -> None:
    """The spread of a few JPEG sizes, and how often something happened."""
    steps = {"score_std": 1 + 5e-4, "accuracy": 0.9}
    verdict = judged(
        made, tmp_path,
        lambda run: first_round(run, lambda r: r | {k: r[k] * by for k, by in steps.items()}),
    )  # fmt: skip
    assert verdict.reproduced, verdict


@pytest.mark.parametrize(
    ("value", "published"), [(..., True), (None, False), (math.nan, True), ("0.7", False)]
)
def test_a_first_round_that_lacks_a_number(
    made: Path, tmp_path: Path, value: Any, published: bool
) -> None:
    def gone(run: Path) -> None:
        first_round(run, lambda r: {k: v for k, v in {**r, "loss": value}.items() if v is not ...})

    changes = (gone, None) if not published else (scaled(SCORE, 1 + 1e-6), gone)
    verdict = judged(made, tmp_path, *changes)
    assert not verdict.reproduced
    assert "round 1 has no loss to compare" in verdict.said


def test_another_base_model_is_not_reproduced(made: Path, tmp_path: Path) -> None:
    verdict = judged(made, tmp_path, scaled(SCORE, 1.5, "03"))
    assert "the base model's scores differ" in verdict.said


def test_a_doctored_seed_does_not_widen_its_own_interval(made: Path, tmp_path: Path) -> None:
    """The published seed alone is odd: it must not hide behind the spread that it makes itself."""
    verdict = judged(made, tmp_path, lambda folder: None, published=scaled(SCORE, 2))
    assert not verdict.reproduced
    assert "as the same seed" in verdict.said


def test_other_inputs_are_named(made: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        scaled(SCORE, 1 + 1e-6)(folder)
        inputs = json.loads((folder / "provenance.json").read_text())["inputs"]
        edit(folder / "provenance.json", inputs={**inputs, "model": "000000000000"})

    assert "the model is another" in judged(made, tmp_path, change).said


def test_other_numbers_of_images_are_named(made: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(text.replace('"images": 24', '"images": 25'))

    assert "its counts differ: images ends at [24] and [25]" in judged(made, tmp_path, change).said


def test_too_few_seeds_cannot_be_judged(made: Path, tmp_path: Path) -> None:
    def published(run: Path) -> None:
        for other in cells(tmp_path / "p")[2:]:
            shutil.rmtree(other)

    verdict = judged(made, tmp_path, scaled(SCORE, 1 + 1e-6), published)
    assert "2 published seeds give no spread" in verdict.said


def test_what_is_not_on_record_is_not_the_same_platform(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "p")
    run = cells(tmp_path / "p")[0]
    shutil.copytree(run, tmp_path / "again")
    scaled(SCORE, 1 + 1e-6)(tmp_path / "again")
    assert not rerun.judge(RunFolder(run), RunFolder(tmp_path / "again"), "cell").reproduced
    edit(run / "provenance.json", cpu=...)
    verdict = rerun.judge(RunFolder(run), RunFolder(tmp_path / "again"), "cell")
    assert verdict.reproduced
    assert verdict.details[0] == "cpu is not on record"


# ---- the intervals


def test_intervals_by_hand() -> None:
    # mean 2, s = 1; t(2) at 97.5 % is 4.302653
    wide, wider = 4.302653 * math.sqrt(4 / 3), 4.302653 * math.sqrt(2)
    assert another_seed([1.0, 2.0, 3.0]) == pytest.approx((2 - wide, 2 + wide))
    assert same_seed(7.0, [1.0, 2.0, 3.0]) == pytest.approx((7 - wider, 7 + wider))
    with pytest.raises(ValueError, match="at least two seeds"):
        same_seed(1.0, [1.0])


@pytest.mark.parametrize("share", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_false_alarms_are_as_rare_as_stated(share: float) -> None:
    """Five normal seeds, one made again that shares so much of its variance with the first."""
    rng = np.random.default_rng(0)
    confidence, alarms, trials = 1 - rerun.FALSE_ALARM / 4, 0, 1500
    for _ in range(trials):
        values = rng.normal(size=(2, 5))  # of two columns
        new = share**0.5 * values[:, 0] + (1 - share) ** 0.5 * rng.normal(size=2)
        ends = [
            end
            for x, y in zip(values, new, strict=True)
            for end in [(y, *another_seed(x, confidence)), (y, *same_seed(x[0], x[1:], confidence))]
        ]
        alarms += any(not low <= y <= high for y, low, high in ends)
    # the standard error of 5 % in 1500 trials is 0.6 %
    assert alarms / trials < rerun.FALSE_ALARM + 0.015
    assert (share > 0) or alarms > 0
