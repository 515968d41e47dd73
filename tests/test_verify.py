"""`verify`: what is published agrees with itself, and tampering shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d3po_bench import cli
from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.store import content
from eval import verify

ROOT = Path(__file__).parent.parent
SEED = Path("tiny", "incompress", "d3po", "seed-1")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with D3PO's runs on incompress alone, its README and its figure."""
    home = tmp_path_factory.mktemp("project")
    published = ROOT / "results"
    (home / "results" / "tiny" / "incompress").mkdir(parents=True)
    shutil.copytree(
        published / "tiny" / "incompress" / "d3po",
        home / "results" / "tiny" / "incompress" / "d3po",
    )
    shutil.copy(published / "summary.py", home / "results")
    claims = {
        "tables": [
            {"document": "README.md", "command": ["results/summary.py", "results/tiny"]},
        ],
        "curves": [
            {"figure": "results/figures/curves.svg", "runs": "results/tiny", "x": "pairs"},
        ],
    }
    (home / "results" / "claims.json").write_text(json.dumps(claims))
    figures = home / "results" / "figures"
    runner = CliRunner()
    plotted = ["plot", str(home / "results" / "tiny"), "--out", str(figures)]
    assert runner.invoke(cli.cli, plotted).exit_code == 0
    (home / "README.md").write_text(printed(home))
    verify.record(home / "results")
    return home


def printed(home: Path) -> str:
    command = [sys.executable, "results/summary.py", "results/tiny"]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "project")
    return tmp_path / "project"


def found(home: Path, check: str) -> list[str]:
    """What one check says; the manifest agrees, as a careful forger's would."""
    verify.record(home / "results")
    runs = sorted(p.parent for p in (home / "results").rglob("config.json"))
    claims = json.loads((home / "results" / "claims.json").read_text())
    parts: dict[str, Callable[[], Any]] = {
        "runs": lambda: verify._each(runs, home / "results", whole=True),
        "sets": lambda: verify.check_sets(runs, home / "results"),
        "tables": lambda: verify._of_claims(claims["tables"], home / "results", verify.check_table),
        "curves": lambda: verify._of_claims(
            claims["curves"], home / "results", verify.check_curves
        ),
    }
    assert list(verify.check_manifest(home / "results")) == []
    return list(parts[check]())


def edit(path: Path, pattern: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    changed = re.sub(pattern, new, text, count=count, flags=re.MULTILINE)
    assert changed != text
    path.write_text(changed)


def put_content_on_record(run: Path) -> None:
    """Digests of the files as they are, as at the end of a run."""
    facts = json.loads((run / "provenance.json").read_text()) | {"content": content(run)}
    (run / "provenance.json").write_text(json.dumps(facts))


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Settings changed, with a run_id and digests that fit."""
    config = json.loads((folder / "config.json").read_text()) | changes
    del config["run_id"]
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    (folder / "config.json").write_text(RunConfig(**kept).to_json())
    put_content_on_record(folder)


# ---- what is published


def test_the_published_results_agree_with_themselves() -> None:
    assert {k: v for k, v in verify.verify(ROOT / "results").items() if v} == {}


def test_an_untouched_copy_is_fine(home: Path) -> None:
    done = CliRunner().invoke(cli.cli, ["verify", str(home / "results")])
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "manifest: fine", "runs: fine", "tries: fine", "sets: fine", "tables: fine", "curves: fine"
    ]  # fmt: skip


# ---- tampering that the manifest shows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "has changed since"),
        (lambda p: p.unlink(), "is in the manifest and not in"),
        (lambda p: shutil.copy(p, p.with_name("more.csv")), "is not in the manifest"),
    ],
)
def test_the_manifest_shows_it(change: Callable[[Path], Any], said: str, home: Path) -> None:
    change(home / "results" / SEED / "timing.jsonl")
    problems = list(verify.check_manifest(home / "results"))
    assert len(problems) == 1
    assert said in problems[0]


# ---- tampering with a manifest to match


def test_a_changed_score(home: Path) -> None:
    edit(home / "results" / SEED / "eval.csv", r"^(12,eta1,ant,0),[\d.]+", r"\1,3.5")
    problems = found(home, "tables")
    assert any("README.md lacks a line" in p for p in problems)
    assert any("README.md has a line that no row supports" in p for p in problems)
    assert found(home, "curves") != []


def test_a_dropped_seed(home: Path) -> None:
    shutil.rmtree(home / "results" / SEED)
    assert any("| 4 |" in p for p in found(home, "tables"))


def test_a_seed_that_is_a_copy(home: Path) -> None:
    target = home / "results" / SEED.parent / "seed-4"
    shutil.rmtree(target)
    shutil.copytree(home / "results" / SEED, target)
    rewrite_config(target, seed=4)
    assert found(home, "runs") == []
    assert any("the same rounds, number for number" in p for p in found(home, "sets"))


def test_a_duplicated_row(home: Path) -> None:
    path = home / "results" / SEED / "eval.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    problems = found(home, "runs")
    assert any("has two rows" in p for p in problems)


def test_rows_left_out(home: Path) -> None:
    path = home / "results" / SEED / "eval.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-3]) + "\n")
    assert any("evaluations have [42, 45] images" in p for p in found(home, "runs"))


def test_an_evaluation_left_out(home: Path) -> None:
    edit(home / "results" / SEED / "eval.csv", r"^8,.*\n", "", count=0)
    assert any("its evaluations are of" in p for p in found(home, "runs"))


def test_a_swapped_config(home: Path) -> None:
    shutil.copy(home / "results" / SEED.parent / "seed-2" / "config.json", home / "results" / SEED)
    assert any("belongs into incompress/d3po/seed-2" in p for p in found(home, "runs"))


def test_a_setting_changed_in_the_config(home: Path) -> None:
    edit(home / "results" / SEED / "config.json", '"rounds": 12', '"rounds": 10')
    problems = found(home, "runs")
    assert any("its settings make" in p for p in problems)
    assert any("12 rounds of 10" in p for p in problems)


def test_a_setting_changed_with_its_run_id(home: Path) -> None:
    rewrite_config(home / "results" / SEED, learning_rate=1e-4)
    assert found(home, "runs") == []
    assert any("differ in more than the seed" in p for p in found(home, "sets"))


def test_rounds_left_out(home: Path) -> None:
    edit(home / "results" / SEED / "metrics.jsonl", r'^{"round": 5,.*\n', "")
    problems = found(home, "runs")
    assert any("its rounds are [1, 2, 3, 4, 6" in p for p in problems)


def test_a_number_that_is_none(home: Path) -> None:
    edit(home / "results" / SEED / "eval.csv", r"^(12,eta1,ant,0),[\d.]+", r"\1,nan")
    assert any("no finite score" in p for p in found(home, "runs"))


def test_a_number_changed_after_the_run(home: Path) -> None:
    """Rounds that agree with each other and with the manifest, but not with the run's own word."""
    put_content_on_record(home / "results" / SEED)
    assert found(home, "runs") == []
    edit(home / "results" / SEED / "metrics.jsonl", r'"reward_mean": [\d.]+', '"reward_mean": 9.5')
    said = "tiny/incompress/d3po/seed-1: its metrics.jsonl is not the one that it ended with"
    assert found(home, "runs") == [said]


@pytest.mark.parametrize("strange", [[], "x", None, 5])
def test_content_that_is_none(strange: Any, home: Path) -> None:
    path = home / "results" / SEED / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content": strange}))
    assert any("Expected names and values as content" in p for p in found(home, "runs"))


def test_a_try_that_was_kept_in_part_is_not_changed(home: Path) -> None:
    run = home / "results" / SEED
    put_content_on_record(run)
    (run / "timing.jsonl").unlink()
    assert list(verify.check_run(run, whole=False)) == []
    assert list(verify.check_run(run)) == ["lacks timing.jsonl"]


@pytest.mark.parametrize("package", ["pillow", "torch"])
def test_a_run_of_other_versions(package: str, home: Path) -> None:
    other = rf'"{package}": "1.0"'
    edit(home / "results" / SEED / "provenance.json", rf'"{package}": "[^"]+"', other)
    assert any("differ in more than the seed" in p for p in found(home, "sets"))


@pytest.mark.parametrize("changed", [{"model": "0" * 12}, {"prompts": "0" * 12}, None])
def test_a_run_of_other_inputs(changed: dict[str, str] | None, home: Path) -> None:
    path = home / "results" / SEED / "provenance.json"
    facts = json.loads(path.read_text())
    facts["inputs"] = None if changed is None else {**facts["inputs"], **changed}
    path.write_text(json.dumps(facts))
    assert any("differ in more than the seed" in p for p in found(home, "sets"))


@pytest.mark.parametrize(
    ("other", "said"), [({}, []), ({"threads": 9, "gpu": "A"}, ["threads, gpu"])]
)
def test_a_run_that_went_on_elsewhere(other: dict[str, Any], said: list[str], home: Path) -> None:
    path = home / "results" / SEED / "provenance.json"
    facts = json.loads(path.read_text())
    first = {"started": "a", "after_round": 0, "threads": 1}
    facts["sessions"] = [first, {**first, "started": "b", "after_round": 3, **other}]
    path.write_text(json.dumps(facts))
    where = "tiny/incompress/d3po/seed-1: was made in several environments: from round 3 with other"
    assert found(home, "runs") == [f"{where} {names}" for names in said]


def test_an_unreadable_run(home: Path) -> None:
    (home / "results" / SEED / "metrics.jsonl").write_text("{")
    assert any("cannot be read" in p for p in found(home, "runs"))
    (home / "results" / SEED / "timing.jsonl").unlink()
    assert any("lacks timing.jsonl" in p for p in found(home, "runs"))


def test_an_edited_number_in_the_readme(home: Path) -> None:
    edit(home / "README.md", r"\+29%", "+39%")
    problems = found(home, "tables")
    assert len(problems) == 2, "the right line is missing, and the wrong one is stray"


def test_an_added_line_in_the_readme(home: Path) -> None:
    edit(home / "README.md", r"^(\| incompress \| d3po \|.*)$", r"\1\n| incompress | best | 5 |")
    assert any("no row supports: | incompress | best" in p for p in found(home, "tables"))


def test_a_second_table_in_the_readme(home: Path) -> None:
    """Below the right one, with other numbers."""
    text = (home / "README.md").read_text()
    (home / "README.md").write_text(text + "\n\n" + text.replace("+29%", "+39%"))
    problems = found(home, "tables")
    assert len(problems) == 1
    assert "+39%" in problems[0]


def test_an_edited_figure(home: Path) -> None:
    edit(home / "results" / "figures" / "curves.svg", r"\d\.\d{3,}", "9.125")
    assert any("is not what `d3po-bench plot" in p for p in found(home, "curves"))


def test_an_edited_picture_of_a_figure(home: Path) -> None:
    from PIL import Image

    path = home / "results" / "figures" / "curves.png"
    with Image.open(path) as image:
        edited = image.convert("RGB")
    edited.paste((0, 0, 0), (200, 200, 203, 203))
    edited.save(path)
    said = "results/figures/curves.png is not what `d3po-bench plot results/tiny` draws"
    assert found(home, "curves") == [said]


@pytest.mark.parametrize("how", ["pale parts erased", "transparent", "smaller"])
def test_a_figure_that_shows_less(how: str, home: Path) -> None:
    import numpy as np
    from PIL import Image

    path = home / "results" / "figures" / "curves.png"
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGBA"))
    if how == "pale parts erased":
        pixels[(pixels[..., :3] > 255 - verify.MOST_APART).all(-1)] = 255
    elif how == "transparent":
        pixels[..., 3] = 0
    Image.fromarray(pixels if how != "smaller" else pixels[:-1]).save(path)
    assert any("curves.png is not what" in p for p in found(home, "curves"))


def test_a_script_that_fails_is_a_problem(home: Path) -> None:
    (home / "results" / "summary.py").write_text("raise SystemExit('broken')")
    assert any("fails: ['broken']" in p for p in found(home, "tables"))


def test_a_failed_check_is_told_and_exits_with_1(home: Path) -> None:
    (home / "results" / SEED / "timing.jsonl").unlink()
    done = CliRunner().invoke(cli.cli, ["verify", str(home / "results")])
    assert "manifest: 1 problems" in done.output
    assert isinstance(done.exception, RunError)
    assert done.exception.exit_code == 1


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected manifest.json in .*verify --record"):
        verify.verify(tmp_path)
