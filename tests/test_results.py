"""Tables of made-up runs by hand, `report`, and what make.py writes into documents."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy.stats import ttest_rel

from d3po_bench import config
from d3po_bench.cli import cli
from d3po_bench.config import RunConfig, method_of
from d3po_bench.errors import UserError
from d3po_bench.launch import grid
from d3po_bench.runs.files import read_csv
from d3po_bench.runs.run import RunFolder, find_runs
from eval.analysis import documents, tries
from eval.analysis.gains import contrast, cost, flat_size, gains
from eval.analysis.pictures import crossed, measure
from eval.analysis.report import report
from eval.analysis.runs import Run, read_groups
from eval.analysis.settings import settings
from eval.analysis.tables import Table
from eval.tools import TOOLS
from eval.verify.folder import FILES
from results import grids, make, search, steps, tuning
from results import measure as measuring
from tests.commands import PUBLISHED, TINY
from tests.made_up import add_columns, write_run

ROOT = Path(__file__).parent.parent
DIFFERENCE = "difference to d3po (95 % interval)"

Cells = dict[str, str]


def cells(table: Table) -> dict[str, Cells]:
    """Heading -> cell of every row, by the words on its left."""
    found = [{name: show(r) for name, show in table.columns.items()} for r in table.records]
    return {" ".join(row.pop(name) for name in table.left): row for row in found}


def gained(folder: Path) -> dict[str, Cells]:
    return cells(gains(read_groups([folder])))


def paid(folder: Path) -> dict[str, Cells]:
    return cells(cost(read_groups([folder])))


@pytest.fixture
def two_methods(tmp_path: Path) -> Path:
    """D3PO that gains 0.1 in every round, and DDPO that gains 0, 0.05 and 0.1."""
    for seed in range(3):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, method="ddpo", seed=seed, gain=0.05 * seed)
    return tmp_path


# ---- gains and cost: `write_run` has score 7 + seed / 10 + gain * round


def test_gains_by_hand(two_methods: Path) -> None:
    found = gained(two_methods)
    # d3po: 7.0, 7.1, 7.2 at first and 0.1 * 10 = 1 more at the end, with both samplers
    assert found["incompress d3po"] == {
        "seeds": "3",
        "base": "7.100",
        "end": "8.100",
        "gain (95 % interval)": "+1.000 (+1.000 to +1.000)",
        "worst seed": "+1.000",
        "share of excess": f"{1 / (7.1 - flat_size(32)):+.0%}",
        DIFFERENCE: "",
        "seeds compared": "",
        "p, Holm": "",
        "shown with 80 % power from": "",
        "gain, eta 0": "+1.000",
    }
    ddpo = found["incompress ddpo"]
    assert ddpo["gain (95 % interval)"] == "+0.500 (-0.742 to +1.742)"  # 4.30265 * 0.5 / sqrt(3)
    assert ddpo["worst seed"] == "+0.000"
    # ends 7.0, 7.6, 8.2 against 8.0, 8.1, 8.2, seed by seed
    test = ttest_rel([7.0, 7.6, 8.2], [8.0, 8.1, 8.2])
    low, high = test.confidence_interval()
    assert ddpo[DIFFERENCE] == f"-0.500 ({low:+.3f} to {high:+.3f})"
    assert ddpo["p, Holm"] == f"{test.pvalue:.2g}"  # the only comparison


def test_reward_and_drift_are_told_apart(tmp_path: Path) -> None:
    # gains of 1, 1.5 and 2 on larger files, of 0.2 each on smaller ones, and a seed without partner
    for seed, gain in enumerate((0.1, 0.15, 0.2)):
        write_run(tmp_path, seed=seed, gain=gain)
        write_run(tmp_path, "compress", seed=seed, gain=0.02)
    write_run(tmp_path, seed=3)
    # S = 0.4, 0.65, 0.9 and D = 0.6, 0.85, 1.1: halves of 4.30265 * 0.25 / sqrt(3); of the two
    # p-values, 2 * 0.0276 and, as it is no less, 0.0459
    assert cells(contrast(read_groups([tmp_path]))) == {
        "incompress, compress d3po": {
            "seeds": "3",
            "S, by the reward (95 % interval)": "+0.650 (+0.029 to +1.271)",
            "p of S, Holm": "0.055",
            "D, whichever way (95 % interval)": "+0.850 (+0.229 to +1.471)",
            "p of D, Holm": "0.055",
        }
    }


def test_the_difference_is_of_the_training_sampler_and_of_scored_images(two_methods: Path) -> None:
    before = gained(two_methods)["incompress ddpo"]
    for path in two_methods.glob("*/*/ddpo/*/eval.csv"):
        path.write_text(re.sub(r"(eta0,.*),[\d.]+,", r"\1,99,", path.read_text()))
    path = two_methods / "tiny" / "incompress" / "ddpo" / "seed-0" / "eval.csv"
    path.write_text(path.read_text().replace("10,eta1,cat,0,6.500000", "10,eta1,cat,0,"))
    after = gained(two_methods)["incompress ddpo"]
    assert after[DIFFERENCE] == before[DIFFERENCE]
    assert after["gain, eta 0"] == "+0.000"


def test_methods_judged_on_other_images_are_not_compared(two_methods: Path) -> None:
    for path in two_methods.glob("*/*/ddpo/*/eval.csv"):
        path.write_text(path.read_text().replace("sea horse", "dog"))
    with pytest.raises(UserError, match=r"ddpo.* and .*d3po.* not evaluated on the same images"):
        gained(two_methods)


def test_other_models_and_objectives_that_want_less(tmp_path: Path) -> None:
    for seed, gain in enumerate((-0.1, 0.02, -0.3)):
        write_run(tmp_path / "a", "compress", seed=seed, gain=gain)
    assert gained(tmp_path / "a")["compress d3po"]["worst seed"] == "+0.200"
    write_run(tmp_path / "b", model="hub/other")
    found = gained(tmp_path / "b")["incompress d3po"]
    assert found["share of excess"] == ""
    # one seed: no interval
    assert found["gain (95 % interval)"] == "+1.000"


ABSENT = dict.fromkeys([
    "recognised", "diversity", "Vendi score", "base model covered",
    "proxy-gold gap (95 % interval)", "drift", "KL, steps trained on", "KL, all steps",
    "pairs (or single images)", "images", "images scored", "UNet passes", "backward passes",
    "seconds a seed", "CPU seconds a seed",
], "")  # fmt: skip


def test_a_column_that_no_run_knows_is_left_out(two_methods: Path) -> None:
    head = cost(read_groups([two_methods])).cells()[0]
    assert "images" in head
    assert not {"drift", "UNet passes"} & {*head}


def test_processor_seconds_are_no_stage_of_training(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "timing.jsonl"
    path.write_text(path.read_text().replace('"sample"', '"cpu": 7.5, "sample"'))
    found = paid(tmp_path)["incompress d3po"]
    assert (found["seconds a seed"], found["CPU seconds a seed"]) == ("30", "75")


def test_costs_by_hand(two_methods: Path, tmp_path: Path) -> None:
    # 10 rounds of 32 pairs, 64 images and 3 s; UNet passes, drift and diversity are not there. Of
    # the steps trained on, the last line of metrics.jsonl has the KL, as in earlier versions.
    ddpo = paid(two_methods)["incompress ddpo"]
    assert ddpo == {
        **ABSENT, "recognised": "0.80 -> 0.80", "KL, steps trained on": "0.100",
        "pairs (or single images)": "320", "images": "640", "seconds a seed": "30",
    }  # fmt: skip
    folder = write_run(tmp_path / "more", animal=False)
    steps = {f"kl_{i}": f"{i / 100}" for i in range(1, 21)}  # of 20 steps, the last is not trained
    edit(folder / "config.json", '"skip_steps": 0', '"skip_steps": 1')
    add_columns(folder, {"unet_forwards": 200}, kl=0.025, diversity="0.5", **steps)
    (folder / "timing.jsonl").unlink()
    assert paid(tmp_path / "more")["incompress d3po"] == {
        **ABSENT, "diversity": "0.50 -> 0.50", "KL, steps trained on": "0.100",
        "KL, all steps": "0.250", "pairs (or single images)": "320", "images": "640",
        "UNet passes": "2,000",
    }  # fmt: skip


# ---- what models draw, beside their objective

BESIDE = """objective,method,seed,diversity,aesthetic,jpeg_size
incompress,d3po,0,0.2,5.5,1.2
incompress,d3po,1,0.3,5.9,1.4
incompress,no-fine-tune,,0.5,5.0,1.0
"""


def test_diversity_and_other_scores_by_hand(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed=seed)
    with pytest.raises(UserError, match=r"no .*diversity.csv.* --measure"):
        crossed(read_groups([tmp_path]))
    (tmp_path / "tiny" / "diversity.csv").write_text(BESIDE)
    # The folder of one method is enough: the file lies beside its objective.
    folder = tmp_path / "tiny" / "incompress" / "d3po"
    assert paid(folder)["incompress d3po"]["diversity"] == "0.50 -> 0.25"
    assert cells(crossed(read_groups([folder]))) == {
        "d3po incompress": {
            "seeds": "2",
            "JPEG size, kB": "+0.300 (-0.971 to +1.571)",
            "aesthetic score, points": "+0.700 (-1.841 to +3.241)",
        }
    }
    # one run was not measured: no mean over the others
    write_run(tmp_path, seed=2)
    assert paid(folder)["incompress d3po"]["diversity"] == ""


@pytest.mark.parametrize("prompts", [2, pytest.param(45, marks=pytest.mark.slow)])
def test_models_are_measured_once(prompts: int, tmp_path: Path) -> None:
    """With all prompts, the base model about as it was published, from half as many pictures."""
    run = tmp_path / "tiny" / "incompress" / "d3po" / "seed-0"
    published = ROOT / "results" / "tiny"
    shutil.copytree(PUBLISHED, run)
    edit(run / "config.json", '"eval_prompts": 45', f'"eval_prompts": {prompts}')
    runs = [Run(RunFolder(run), pd.DataFrame(), {})]
    with pytest.raises(UserError, match="does not say what lora was"):
        measure(runs)
    beside, told = tmp_path / "tiny" / "diversity.csv", list[str]()
    head, *rows = (published / "diversity.csv").read_text().splitlines()
    own, base = (next(r for r in rows if r.startswith(f"incompress,{name},")) for name in NAMES)
    beside.write_text(f"{head}\n{own}\n")
    measure(runs, told.append)
    assert len(told) == 1
    lines = beside.read_text().splitlines()
    assert lines[:2] == [f"{head},of,vendi", f"{own},,"]
    now, then = (np.array(line.split(",")[3:6], float) for line in (lines[2], base))
    assert np.abs(now / then - 1).max() < (0.1 if prompts == 45 else 0.5)
    measure(runs, told.append)
    assert len(told) == 1, "what is there is not measured again"


NAMES = ("d3po", "no-fine-tune")


# ---- settings, and a row for each run


def test_settings_by_hand(tmp_path: Path) -> None:
    for seed, most in enumerate((0.2, 0.4)):
        folder = write_run(
            tmp_path, seed=seed, timestep_fraction=0.8, skip_steps=5, learning_rate=0.0025,
            options={"clip_range": 0.2, "pairs": "all"},
        )  # fmt: skip
        add_columns(folder, {"saturated": most / 10})
    # D3PO compares all pairs unless told otherwise; of ten rounds the mean is 5.5 tenths
    assert cells(settings(read_groups([tmp_path]))) == {
        "d3po `clip_range=0.2`": {
            "learning rate": "0.0025", "pairs or images an update": "1",
            "steps trained on": "80% of 15",
            "ratios clipped, most in a round (mean)": "40.0% (16.5%)",
        }
    }  # fmt: skip
    write_run(tmp_path, "compress", learning_rate=0.1)
    with pytest.raises(UserError, match="d3po was run with 2 different settings"):
        settings(read_groups([tmp_path]))


def test_a_row_of_a_run_by_hand(tmp_path: Path) -> None:
    """Stopped after ten of twelve rounds, the last evaluation being that of round ten."""
    folder = write_run(tmp_path, "compress", gain=-0.1, learning_rate=0.001)
    add_columns(folder, {"score_mean": -0.5, "loss": 2.0, "grad_norm": 1.0}, kl=0.02)
    (row,) = tries.table([tmp_path]).records
    numbers = {
        "rounds": 10, "images_first": 64, "score_first": -0.5, "score_best": -5.0,
        "score_last": -5.0, "score_last_three": -4.5, "loss_first": 2.0, "grad_norm_first": 1.0,
        "training_kl_last": 0.1, "gain": -1.0, "kl": 0.2, "recognised": 0.8,
    }  # fmt: skip
    assert {name: row[name] for name in numbers} == pytest.approx(numbers)
    assert np.isnan(row["denoising_error_first"])
    assert row["run"] == "tiny/compress/d3po/seed-0"
    assert "learning_rate=0.001" in row["settings"].split()
    assert row["command"].endswith(f"--out {tmp_path}")
    given = tries.settings_of(row["command"])
    made, _ = config.make("d3po", "compress", "paper", given, seed=0, model="tiny")
    recorded = RunConfig.from_json(json.loads((folder / "config.json").read_text()))
    assert tries.settings(made) == tries.settings(recorded) == given


def test_runs_that_have_no_row(tmp_path: Path) -> None:
    (write_run(tmp_path) / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has finished a round"):
        tries.table([tmp_path])


def test_tries_that_were_kept_have_commands_that_make_them() -> None:
    groups = {name: search.rows(name) for name in ("d3po", "methods", "alignment", "fidelity")}
    assert {name: len(found) for name, found in groups.items()} == {
        "d3po": 84, "methods": 58, "alignment": 42, "fidelity": 48,
    }  # fmt: skip
    for found in groups.values():
        for row in found[::15]:
            made, _ = config.make(row["method"], row["objective"], "paper", row["set"])
            usual = tries.settings(made)
            assert row["set"].items() <= usual.items()
            words = f"run --method {row['method']} --objective {row['objective']} --preset quick "
            assert row["command"].startswith(f"d3po-bench {words}--seed-start {row['seed']:g} ")


# ---- the command


def called(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


def test_report_prints_gains_and_cost(two_methods: Path, tmp_path: Path) -> None:
    groups = read_groups([two_methods])
    done = called(two_methods)
    assert done.output == f"{gains(groups).markdown()}\n\n{cost(groups).markdown()}\n"
    out = tmp_path / "a" / "report.md"
    assert called(two_methods, "--out", out).output == f"{out}\n"
    assert out.read_text() == done.output


def test_report_as_csv_and_json_has_every_number(two_methods: Path) -> None:
    (d3po, ddpo) = csv.DictReader(io.StringIO(called(two_methods, "--format", "csv").output))
    assert float(ddpo["gain"]) == pytest.approx(0.5)
    assert float(ddpo["low"]) == pytest.approx(-0.742, abs=1e-3)
    assert (d3po["images"], d3po["kl"], d3po["difference"]) == ("640.0", "", "")
    found = json.loads(called(two_methods, "--format", "json", "--table", "cost").output)
    assert [row["method"] for row in found["cost"]] == ["d3po", "ddpo"]
    assert found["cost"][0]["kl"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        ([".", "--table", "gains", "--table", "settings", "--format", "csv"], "holds one table"),
        ([".", "--table", "crossed"], "no .*diversity.csv"),
    ],
)
def test_report_says_what_is_wrong(
    arguments: list[str], said: str, two_methods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_methods)
    with pytest.raises(UserError, match=said):
        raise called(*arguments).exception


def test_report_of_unfinished_runs_and_of_several_tables(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=(0, 5))
    add_columns(folder, {"score_mean": 1.0, "loss": 1.0, "grad_norm": 1.0})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rounds": 5', '"rounds": 9'))
    assert "| tiny/incompress/d3po/seed-0 |" in report([tmp_path], ["runs"])
    with pytest.raises(UserError, match="9"):
        report([tmp_path], ["runs", "gains"])


# ---- documents

TEXT = """It gains <!--n a.gain-->+0.198<!--/n--> kB.

<!-- made: gains -->
| a |
|--:|
| 1 |
<!-- /made -->
"""


def test_what_stands_between_markers_is_made() -> None:
    tables, numbers = {"gains": "| a |\n|--:|\n| 1 |"}, {"a.gain": "+0.198"}
    assert documents.made(TEXT, tables.__getitem__, numbers.__getitem__) == (TEXT, [])
    changed = TEXT.replace("+0.198", "+0.199").replace("| 1 |", "| 2 |\n| 3 |")
    assert documents.made(changed, tables.__getitem__, numbers.__getitem__) == (
        TEXT, ["table gains has changed", "number a.gain says +0.199, not +0.198"],
    )  # fmt: skip
    empty = TEXT.replace("+0.198", "").replace("| a |\n|--:|\n| 1 |\n", "")
    assert documents.made(empty, tables.__getitem__, numbers.__getitem__)[0] == TEXT


@pytest.mark.parametrize(
    "broken",
    [
        TEXT.replace("<!-- /made -->\n", ""),
        TEXT.replace("<!-- made: gains -->\n", ""),
        TEXT.replace("<!--/n-->", ""),
        TEXT.replace("<!--n a.gain-->", ""),
    ],
)
def test_a_marker_without_its_other_end(broken: str) -> None:
    with pytest.raises(UserError, match="has no other end"):
        documents.made(broken, lambda name: "", lambda name: "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("| a | b |\n|---|--:|\n| c | 1 |\n", "a table of numbers outside markers: | a | b |"),
        ("| a |\n|---|\n| 2 (1 to 3) |\n", "a table of numbers outside markers: | a |"),
        ("It gains +0.141 more.\n", "a measured number outside markers: +0.141"),
        ("It gains 0.2 kB.\n", "a measured number outside markers: 0.2 kB"),
        ("| a | from |\n|---|---|\n| b | 5 to 9 |\n", None),
        ("The range is 0.9 to 1.1, beta 0.1, see `+0.141` and 1.0.12.\n", None),
        (TEXT, None),
    ],
)
def test_numbers_outside_markers(text: str, said: str | None) -> None:
    assert list(documents.loose(text)) == ([said] if said else [])


def noise(path: Path, change: Callable[[Any], Any] = lambda pixels: pixels) -> Path:
    pixels = np.random.default_rng(0).integers(0, 200, (60, 80, 4), dtype=np.uint8)
    Image.fromarray(change(pixels)).save(path)
    return path


def one_pixel(pixels: Any) -> Any:
    pixels[3, 3, 0] += 30
    return pixels


def one_part(pixels: Any) -> Any:
    pixels[:4, :4, :3] = 0
    return pixels


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (one_pixel, True),
        (one_part, False),
        (lambda pixels: pixels[:-1], False),
        (lambda pixels: pixels[..., :3], False),
    ],
)
def test_figures_that_look_the_same(
    change: Callable[[Any], Any], same: bool, tmp_path: Path
) -> None:
    """Another rounding of edges is the same; a part, a row or transparency that is gone is not."""
    drawn, figure = noise(tmp_path / "a.png"), noise(tmp_path / "b.png", change)
    before = figure.read_bytes()
    assert documents.write(figure, drawn, check=True) is not same
    assert figure.read_bytes() == before
    documents.write(figure, drawn, check=False)
    assert (figure.read_bytes() == drawn.read_bytes()) is not same


def test_a_figure_that_is_missing_or_damaged_is_drawn(tmp_path: Path) -> None:
    drawn, figure = noise(tmp_path / "a.png"), tmp_path / "more" / "b.png"
    for damage in (lambda: None, lambda: figure.write_bytes(b"\x89PNG")):
        damage()
        assert documents.write(figure, drawn, check=False)
        assert not documents.write(figure, drawn, check=True)


# ---- make.py


def test_names_that_make_does_not_know() -> None:
    with pytest.raises(UserError, match=r"'gain'.*'gains'.*step-shares"):
        make.block("gain")
    with pytest.raises(UserError, match=r"incompress.d3po.gian.*'incompress.d3po.gain'.*--names"):
        make.inline("incompress.d3po.gian")
    with pytest.raises(UserError, match="no format"):
        make.inline("incompress.d3po.gain:x")
    assert make.inline("incompress.d3po.gain") == f"{make.numbers()['incompress.d3po.gain']:+.3f}"
    assert make.inline("incompress.d3po.images") == "1,536"
    assert make.inline("fidelity.two-images.gain:.1f") == "0.1"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with their page and the notes."""
    home = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "results", home / "results")
    shutil.copytree(ROOT / "docs" / "notes", home / "docs" / "notes")
    shutil.copy(ROOT / "docs" / "results.md", home / "docs")
    (home / "README.md").write_text("<!-- made: gains -->\n<!-- /made -->\n")
    return home


@pytest.mark.slow
def test_make_finds_everything_that_was_changed(project: Path) -> None:
    """A number, a row of a document, rows and seeds that were dropped, figures and files."""
    results, docs = project / "results", project / "docs"
    edit(docs / "results.md", r"(contrast.ddpo.seeds-->)20", r"\g<1>21")
    edit(docs / "notes" / "quick-preset.md", r"\| 0.983 \|", "| 0.893 |")
    edit(docs / "notes" / "fidelity.md", r"\Z", "\n| a |\n|--:|\n| 1 |\n")
    edit(results / "search.csv", r"(fidelity/no-clip/.*\n(?:.*\n))", r"")  # two of three seeds
    edit(results / "search.csv", r"confirm/.*/seed-112,.*\n", "")
    with Image.open(results / "tiny" / "feedback" / "rounds.png") as image:
        doctored = image.convert("RGB")
    doctored.paste((0, 0, 0), (200, 200, 210, 210))
    doctored.save(results / "tiny" / "feedback" / "rounds.png")
    shutil.copy(
        results / "tiny" / "feedback" / "rounds.png", results / "tiny" / "figures" / "b.png"
    )
    edit(results / "tiny" / "table1" / "table1.tex", "d3po", "dpo")
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    done = made(project, "--check")
    assert done.returncode == 1
    assert set(done.stdout.splitlines()) == {
        "README.md: table gains has changed",
        "docs/results.md: number v2.contrast.ddpo.seeds says 21, not 20",
        "docs/notes/quick-preset.md: table step-shares has changed",
        "docs/notes/quick-preset.md: table confirm has changed",
        "docs/notes/determinism.md: table rerun-power has changed",
        "docs/notes/fidelity.md: table fidelity has changed",
        "docs/notes/fidelity.md: a table of numbers outside markers: | a |",
        "results/tiny/feedback/rounds.png has changed",
        "results/tiny/table1/table1.tex has changed",
        "results/tiny/figures/b.png is drawn by nothing in results/make.py",
    }
    after = {p: p.read_bytes() for p in project.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert after == before


def made(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, project / "results" / "make.py", *arguments],
        cwd=project, capture_output=True, text=True, check=False,
    )  # fmt: skip


def edit(path: Path, pattern: str, new: str) -> None:
    text = path.read_text()
    assert re.search(pattern, text)
    path.write_text(re.sub(pattern, new, text, count=1))


# ---- measure.py


def test_new_runs_replace_published_ones(tmp_path: Path) -> None:
    """Their text alone."""
    own = TINY / "incompress" / "d3po"
    shutil.copytree(own / "seed-0", tmp_path / "runs" / "incompress" / "d3po" / "seed-0")
    (tmp_path / "runs" / "incompress" / "d3po" / "seed-0" / "weights").touch()
    shutil.copytree(own / "seed-1", tmp_path / "target" / "incompress" / "d3po" / "seed-1")
    (tmp_path / "runs" / "diversity.csv").write_text("a\n")
    words = ["publish", str(tmp_path / "runs"), str(tmp_path / "target"), "--no-sheets"]
    assert CliRunner().invoke(measuring.main, words).exit_code == 0
    files = [path.relative_to(tmp_path / "target") for path in (tmp_path / "target").rglob("*.*")]
    assert sorted(str(path) for path in files) == ["diversity.csv"] + [
        f"incompress/d3po/seed-0/{name}" for name in sorted(FILES)
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "tiny2").glob("*.toml")))
def test_all_rows_of_the_comparison_have_one_budget(path: Path) -> None:
    configs = grid.configs(grid.read(path), TOOLS)
    images = {c.prompts_per_round * (c.images_per_prompt or method_of(c).images_per_prompt)
              for c in configs}  # fmt: skip
    assert (images, {config.rounds for config in configs}) == ({32}, {16})


def test_the_grids_are_what_the_rule_makes_of_the_search(tmp_path: Path) -> None:
    published = ROOT / "results" / "tiny2"
    of = grid.read(published / "grid.toml")
    part = ["--seeds", str(len(of.seeds)), *(p for o in of.objectives for p in ("--objective", o))]
    said = CliRunner().invoke(grids.main, [str(published / "trials.csv"), str(tmp_path), *part])
    assert said.exit_code == 0, said.output
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in published.glob("*.toml")}


@pytest.mark.parametrize("name", ["grid", "further"])
def test_the_preset_of_version_2_has_the_settings_of_the_search_but_for_the_steps(
    name: str,
) -> None:
    of = grid.read(ROOT / "results" / "tiny2" / f"{name}.toml")
    kept = [f.name for f in fields(RunConfig) if f.name not in (
        "options", "prompts", "eval_list", "eval_noise", "eval_every", "units_per_update",
        "skip_steps", "step_weight",
    )]  # fmt: skip
    for method in of.methods:
        given = of.settings_of(method, "incompress")
        searched, _ = config.make(method, "incompress", "quick", given)
        preset, _ = config.make(method, "incompress", "weighted", {})
        assert {n: getattr(preset, n) for n in kept} == {n: getattr(searched, n) for n in kept}
        assert vars(method_of(preset)) == vars(method_of(searched))


def test_the_table_of_steps_says_what_its_runs_showed() -> None:
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in find_runs([ROOT / "results" / "steps"]):
        way, c = run.place.parts[-5].rpartition("-")[0], run.config
        key = (way, c.method, f"{c.learning_rate:.3g}", str(c.seed))
        seen.setdefault(key, {})[c.objective] = tries.ends(run.folder)
    rows = read_csv(steps.FILE)
    assert len(rows) == len(seen) == 60
    for row in rows:
        way = row["steps"].replace(" ", "-").replace("/", "-")
        own = seen[way, row["method"], f"{float(row['rate']):.3g}", row["seed"]]
        up, down = own["incompress"], own["compress"]
        found = (
            (up["gain"] - down["gain"]) / 2, (up["gain"] + down["gain"]) / 2,
            min(up["recognised"], down["recognised"]), max(up["drift"], down["drift"]),
        )  # fmt: skip
        names = ("s", "d", "recognised", "drift")
        assert found == pytest.approx([float(row[name]) for name in names], abs=1e-6)


def test_table_1_has_the_settings_that_its_search_chose() -> None:
    home = ROOT / "results" / "alignment"
    of, rows = grid.read(home / "table1.toml"), read_csv(home / "trials.csv")
    for method in of.methods:
        _, found = tuning.chosen_of([row for row in rows if row["method"] == method])
        said = of.settings | of.method[method]
        assert {k: float(v) if v[0].isdigit() else v for k, v in found.items()} == {
            k: float(said[k]) if v[0].isdigit() else said[k] for k, v in found.items()
        }


@pytest.mark.parametrize(("part", "count"), [("trials", 6 * 12), ("main", 47)])
def test_the_table_of_the_search_says_what_its_trials_showed(part: str, count: int) -> None:
    """Those of the main rows were made again: they show the same, to the last digit."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for run in find_runs([ROOT / "results" / "search2" / part]):
        trial = str(int(run.place.parts[-5].removeprefix("trial-")))
        own = seen.setdefault((run.config.method, trial), {"rate": run.config.learning_rate})
        own[run.config.objective] = tries.ends(run.folder)
    table = read_csv(ROOT / "results" / "tiny2" / "trials.csv")
    rows = [row for row in table if (row["method"], row["trial"]) in seen]
    assert len(rows) == len(seen) == count
    for row in rows:
        own = seen[row["method"], row["trial"]]
        up, down = own["incompress"], own["compress"]
        found = (
            own["rate"], (up["gain"] - down["gain"]) / 2,
            min(up["recognised"], down["recognised"]), max(up["drift"], down["drift"]),
        )  # fmt: skip
        names = ("learning_rate", "gain, seed 901", "recognised", "drift")
        assert found == tuple(float(row[name]) for name in names)
