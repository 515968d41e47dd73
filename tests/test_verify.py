"""`verify`: what is published agrees with itself, and tampering shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d3po_bench import cli
from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.prompts import digest
from d3po_bench.runs.run import content
from eval.verify import documents
from eval.verify import folder as verify

ROOT = Path(__file__).parent.parent
SEED = Path("tiny", "incompress", "d3po", "seed-1")

GRID = 'methods = ["d3po"]\nobjectives = ["incompress"]\nseeds = 5\n'
SENTENCE = "It gains 0.20 kB, or 29%."
DRAW = """
import sys
from pathlib import Path

from PIL import Image

rows = len(Path("results/tiny/incompress/d3po/seed-0/eval.csv").read_text().splitlines())
Image.new("RGB", (rows, 9)).save(Path(sys.argv[1], "rows.png"))
"""
"""Draws a figure that is as wide as a seed has rows."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with D3PO's runs on incompress alone, its README and its figures."""
    home = tmp_path_factory.mktemp("project")
    published = ROOT / "results"
    (home / "results" / "tiny" / "incompress").mkdir(parents=True)
    shutil.copytree(
        published / "tiny" / "incompress" / "d3po",
        home / "results" / "tiny" / "incompress" / "d3po",
    )
    shutil.copy(published / "summary.py", home / "results")
    (home / "results" / "draw.py").write_text(DRAW)
    (home / "results" / "tiny" / "grid.toml").write_text(GRID)
    (home / "results" / "claims.json").write_text(json.dumps(claimed()))
    figures = home / "results" / "figures"
    runner = CliRunner()
    plotted = ["plot", str(home / "results" / "tiny"), "--out", str(figures)]
    assert runner.invoke(cli.cli, plotted).exit_code == 0
    (figures / "sheet.png").write_bytes((figures / "curves.png").read_bytes())
    ran(home, "results/draw.py", "results/figures")
    (home / "README.md").write_text(
        f"{SENTENCE}\n\n" + ran(home, "results/summary.py", "results/tiny")
    )
    verify.record(home / "results")
    return home


def claimed() -> dict[str, Any]:
    """Where everything in the project comes from."""
    line, figures = "| incompress | d3po |", "results/figures"
    return {
        "grids": [{"grid": "results/tiny/grid.toml", "runs": "results/tiny"}],
        "tables": [{"document": "README.md", "command": ["results/summary.py", "results/tiny"]}],
        "numbers": [
            {"document": "README.md", "text": SENTENCE,
             "cells": [[line, "gain (95 % interval)"], [line, "share of excess"]]},
        ],
        "curves": [{"figure": f"{figures}/curves.svg", "runs": "results/tiny", "x": "pairs"}],
        "figures": [{"figures": [f"{figures}/rows.png"], "command": ["results/draw.py"]}],
        "unchecked": [{"figures": [f"{figures}/sheet.png"], "why": "pictures were not kept"}],
    }  # fmt: skip


def ran(home: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=home, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "project")
    return tmp_path / "project"


def found(home: Path, check: str) -> list[str]:
    """What one check says; the manifest agrees, as a careful forger's would."""
    verify.record(home / "results")
    runs = sorted(p.parent for p in (home / "results").rglob("config.json"))
    parts: dict[str, Callable[[], Any]] = {
        "runs": lambda: verify._each(runs, home / "results", whole=True),
        "sets": lambda: verify.check_sets(runs, home / "results"),
        **documents.checks(home / "results", runs),
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
        "manifest: fine", "runs: fine", "tries: fine", "sets: fine", "grids: fine", "tables: fine",
        "numbers: fine", "curves: fine", "figures: fine",
        "not made again: 1 figure (pictures were not kept)",
    ]  # fmt: skip


def test_a_table_that_was_moved_to_what_is_not_checked(home: Path) -> None:
    """It may be edited then, which must not go unsaid."""
    text = (home / "README.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("| objective |")]
    moved = {"tables": heads, "why": "takes long"}
    claims_ = {**claimed(), "tables": [], "unchecked": [*claimed()["unchecked"], moved]}
    (home / "results" / "claims.json").write_text(json.dumps(claims_))
    (home / "README.md").write_text(text.replace("+29%", "+29.4%"))
    verify.record(home / "results")
    done = CliRunner().invoke(cli.cli, ["verify", str(home / "results")])
    assert done.exit_code == 0, done.output
    said = f"not made again: 1 figure (pictures were not kept); {len(heads)} tables (takes long)"
    assert done.output.splitlines()[-1] == said


def test_all_is_made_again(home: Path) -> None:
    assert documents.not_made_again(ROOT / "results").startswith(
        "15 figures (sheets of samples need"
    )
    without(home, "unchecked")
    assert documents.not_made_again(home / "results") == ""


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
    # As long as the digests of the run's end stand, no script takes it.
    assert any("Expected eval.csv as the run in" in p for p in found(home, "tables"))
    put_content_on_record(home / "results" / SEED)
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


@pytest.mark.parametrize(
    ("name", "said"),
    [("metrics.jsonl", ["rounds"]), ("eval.csv", ["evaluations after round 0"])],
)
def test_numbers_that_are_a_copy(name: str, said: list[str], home: Path) -> None:
    """Written in other bytes: with a blank, another number of zeros, a column of its own."""
    seeds = home / "results" / SEED.parent
    text = (seeds / "seed-0" / name).read_text()
    other = text.replace('"loss": ', '"loss":  ').replace("}\n", ', "own": 1}\n')
    other = re.sub(r"(?m)^(\d+,.*),([\d.]+),[\d.]+,([\d.]*)$", r"\1,\g<2>0,0.5,\3", other)
    assert other != text
    (home / "results" / SEED / name).write_text(other)
    problems = found(home, "sets")
    copied = [re.findall("have the same (.*), number for number", p) for p in problems]
    assert copied == [said]


def test_a_try_has_no_more_than_rounds(home: Path) -> None:
    """What an older version did not measure yet."""
    run = home / "results" / SEED
    edit(run / "metrics.jsonl", r'"loss": [^,]+, ', "")
    put_content_on_record(run)
    assert list(verify.check_run(run, whole=False)) == []
    assert list(verify.check_run(run)) == ["its metrics.jsonl lacks loss"]


@pytest.mark.parametrize("name", [n for n in verify.NUMBERS if n != "round"])
def test_a_number_left_out_of_all_rounds(name: str, home: Path) -> None:
    edit(home / "results" / SEED / "metrics.jsonl", rf', "{name}": [^,}}]+', "", count=0)
    put_content_on_record(home / "results" / SEED)
    assert found(home, "runs") == [f"tiny/incompress/d3po/seed-1: its metrics.jsonl lacks {name}"]


@pytest.mark.parametrize("value", ['"0.69"', "null", "[0.69]", "true", "NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_value_of_a_round_that_is_no_number(value: str, whole: bool, home: Path) -> None:
    run = home / "results" / SEED
    for name in ("loss", "accuracy", "images"):
        edit(run / "metrics.jsonl", rf'("round": 3,.*"{name}": )[^,}}]+', rf"\g<1>{value}")
    put_content_on_record(run)
    (problem,) = verify.check_run(run, whole=whole)
    assert problem == "round 3 has no finite images, loss, accuracy"


@pytest.mark.parametrize("inputs", [None, {}])
def test_a_run_that_does_not_say_what_its_prompts_were(inputs: Any, home: Path) -> None:
    path = home / "results" / SEED / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": inputs}))
    assert found(home, "runs") == []


@pytest.mark.parametrize("inputs", ["x", [1], 5])
def test_inputs_that_are_none(inputs: Any, home: Path) -> None:
    path = home / "results" / SEED / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": inputs}))
    assert any("cannot be read" in p for p in found(home, "runs"))


def test_a_row_without_end(home: Path) -> None:
    edit(home / "results" / SEED / "eval.csv", r"^12,eta1,ant,", f"12,eta1,{'ant' * 50_000},")
    for check in ("runs", "sets"):
        assert any("cannot be read (Error('field larger" in p for p in found(home, check))


OF_OTHERS = "are not of the prompts that its config asks for, 1 of each"


def test_prompts_left_out_of_every_evaluation(home: Path) -> None:
    """Of all seeds, at all rounds: nothing differs from anything beside it."""
    for seed in (home / "results" / SEED.parent).iterdir():
        edit(seed / "eval.csv", r"^\d+,eta\d,(ant|dog),.*\n", "", count=0)
        put_content_on_record(seed)
    problems = found(home, "runs")
    assert len(problems) == 5
    assert all(OF_OTHERS in p and "0 (eta1), 0 (eta0), 4 (eta1)" in p for p in problems)


def test_prompts_that_the_list_has_not(home: Path) -> None:
    edit(home / "results" / SEED / "eval.csv", r",ant,", ",unicorn,", count=0)
    assert any(OF_OTHERS in p for p in found(home, "runs"))


@pytest.mark.parametrize("there", ["gone", "another", "the one", "of votes"])
def test_evaluations_of_a_users_own_prompts(
    there: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that cannot be read names no prompts; rows of each are counted all the same."""
    monkeypatch.chdir(home)
    config = {"objective": "incompress", "prompts": "", "eval_prompts": 2, "eval_images": 2}
    own = {"objective": "feedback"} if there == "of votes" else {"prompts": "own.txt"}
    recorded = {"inputs": {"prompts": digest(["a hat", "a cat"])}}
    if there in ("another", "the one"):
        Path("own.txt").write_text("a hat\n" + ("a cat\n" if there == "the one" else "a mat\n"))
    known = verify._prompts(config | own, recorded)
    assert known == (["a hat", "a cat"] if there == "the one" else None)

    def said(*images: tuple[str, int]) -> bool:
        rows = [{"round": "0", "sampler": "eta1", "prompt": p, "index": str(i)} for p, i in images]
        return bool(list(verify._check_prompts(rows, config | own, known)))

    whole = [("a hat", 0), ("a hat", 1), ("a cat", 0), ("a cat", 1)]
    assert not said(*whole)
    assert said(*whole[:3])
    assert said(*whole, ("a mat", 0), ("a mat", 1)), "more prompts than eval_prompts"
    assert said(*whole[:2]) is (there == "the one")


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
    path = home / "results" / SEED / "eval.csv"
    whole = path.read_text()
    for number, (column, value) in enumerate([("score", "nan"), ("animal", "inf"), ("kl", "nan")]):
        path.write_text(whole)
        edit(path, rf"^(12,eta1,ant,0(,[\d.]+){{{number}}}),[\d.]+", rf"\1,{value}")
        assert any(f"no finite {column}" in p for p in found(home, "runs"))


def test_a_number_that_was_not_measured(home: Path) -> None:
    """A further scorer may have nothing to say, the objective's must."""
    path = home / "results" / SEED / "eval.csv"
    edit(path, r"^(12,eta1,ant,0,[\d.]+),[\d.]+", r"\1,")
    assert not any("finite" in p or "cannot" in p for p in found(home, "runs"))
    edit(path, r"^(12,eta1,ant,0),[\d.]+", r"\1,")
    assert any("cannot be read" in p for p in found(home, "runs"))


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


def test_a_seed_with_another_version_of_a_plug_in(home: Path) -> None:
    for seed, version in enumerate(("0.1", "0.1", "0.2", "0.1", "0.1")):
        path = home / "results" / SEED.parent / f"seed-{seed}" / "provenance.json"
        plugins = {"plugins": {"scorer mine": f"my-scorers {version}"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | plugins))
    (problem,) = found(home, "sets")
    assert "seed-2 and " in problem
    assert "differ in more than the seed" in problem


@pytest.mark.parametrize("strange", [[], "x", None, 5])
def test_plug_ins_that_are_none(strange: Any, home: Path) -> None:
    path = home / "results" / SEED / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plugins": strange}))
    assert any("Expected names and values as plugins" in p for p in found(home, "runs"))


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
    (stray,) = [p for p in problems if "that no row supports" in p]
    assert "+39%" in stray
    assert all("more often than rows support" in p for p in problems if p != stray)


def test_a_line_of_the_readme_twice(home: Path) -> None:
    edit(home / "README.md", r"^(\| incompress \| d3po \|.*\n)", r"\1\1")
    (problem,) = found(home, "tables")
    assert problem.startswith("README.md has a line more often than rows support: | incompress |")


def test_a_line_that_its_script_prints_twice(home: Path) -> None:
    edit(home / "README.md", r"^(\| incompress \| d3po \|.*\n)", "")
    assert any("README.md lacks a line of" in p for p in found(home, "tables"))
    (home / "README.md").write_text("| a | b |\n|---|--:|\n| c | 1 |\n")
    text = "| a | b |\n|---|--:|\n| c | 1 |\n| c | 1 |"
    (home / "twice.py").write_text(f"print({text!r})")
    claim = {"document": "README.md", "command": ["twice.py"]}
    (problem,) = documents.check_table(claim, home, {})
    assert problem == "README.md lacks a line of `twice.py`: | c | 1 |"


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
        pixels[(pixels[..., :3] > 255 - documents.MOST_APART).all(-1)] = 255
    elif how == "transparent":
        pixels[..., 3] = 0
    Image.fromarray(pixels if how != "smaller" else pixels[:-1]).save(path)
    assert any("curves.png is not what" in p for p in found(home, "curves"))


def test_an_edited_figure_of_a_script(home: Path) -> None:
    from PIL import Image

    path = home / "results" / "figures" / "rows.png"
    with Image.open(path) as image:
        image.crop((0, 0, 200, 9)).save(path)
    said = "results/figures/rows.png is not what `results/draw.py` draws"
    assert found(home, "figures") == [said]
    path.unlink()
    assert any("No such file" in p for p in found(home, "figures"))


def test_a_figure_that_its_script_does_not_draw(home: Path) -> None:
    (home / "results" / "draw.py").write_text("")
    said = "results/figures/rows.png is not what `results/draw.py` draws"
    assert found(home, "figures") == [said]


def test_a_script_that_fails_is_a_problem(home: Path) -> None:
    for name in ("summary.py", "draw.py"):
        (home / "results" / name).write_text("raise SystemExit('broken')")
    for check in ("tables", "figures"):
        assert any("fails: ['broken']" in p for p in found(home, check))


# ---- claims that were taken out


def without(home: Path, kind: str) -> None:
    path = home / "results" / "claims.json"
    path.write_text(json.dumps({k: v for k, v in claimed().items() if k != kind}))


@pytest.mark.parametrize(
    ("kind", "check", "said"),
    [
        ("grids", "grids", ["which runs results/tiny/grid.toml asks for"]),
        ("tables", "tables", ["the table of README.md below | objective | method | seeds",
                              "the table of README.md below | objective | method | recognised"]),
        ("curves", "figures", ["where results/figures/curves.png comes from",
                               "where results/figures/curves.svg comes from"]),
        ("figures", "figures", ["where results/figures/rows.png comes from"]),
        ("unchecked", "figures", ["where results/figures/sheet.png comes from"]),
    ],
)  # fmt: skip
def test_a_claim_taken_out(kind: str, check: str, said: list[str], home: Path) -> None:
    without(home, kind)
    problems = found(home, check)
    assert len(problems) == len(said)
    assert all(
        s in p and p.startswith("no claim says") for s, p in zip(said, problems, strict=True)
    )


@pytest.mark.parametrize("rule", ["|---|--:|", "|---|---|"])
def test_a_table_of_a_document_that_no_claim_names(rule: str, home: Path) -> None:
    (home / "docs").mkdir()
    page = home / "docs" / "page.md"
    page.write_text(f"| method | gain |\n{rule}\n| d3po | +0.9 (+0.8 to +1.0) |\n")
    said = "no claim says what prints the table of docs/page.md below | method | gain |"
    assert found(home, "tables") == [said]
    path, kept = home / "results" / "claims.json", {"tables": ["| method | gain |"], "why": "slow"}
    path.write_text(json.dumps({**claimed(), "unchecked": [*claimed()["unchecked"], kept]}))
    assert found(home, "tables") == found(home, "figures") == []
    page.write_text("| method | what |\n|---|---|\n| d3po | pairs, 5 to 9 |\n")
    assert found(home, "tables") == []


@pytest.mark.parametrize("why", ["", None])
def test_a_figure_that_is_not_checked_has_a_reason_and_is_there(why: Any, home: Path) -> None:
    path, name = home / "results" / "claims.json", "results/figures/sheet.png"
    path.write_text(json.dumps({**claimed(), "unchecked": [{"figures": [name], "why": why}]}))
    (home / name).unlink()
    problems = found(home, "figures")
    assert "no reason is given" in problems[0]
    assert problems[1:] == [f"claims.json names {name}, which is not there"]


# ---- grids


def test_a_seed_dropped_everywhere(home: Path) -> None:
    """Tables and figures may be made again without it; the grid still asks for it."""
    shutil.rmtree(home / "results" / SEED.parent / "seed-4")
    said = "asks for incompress/d3po/seed-4, which is not in results/tiny"
    assert [said in p for p in found(home, "grids")] == [True]


def test_a_method_or_a_seed_that_the_grid_does_not_ask_for(home: Path) -> None:
    edit(home / "results" / "tiny" / "grid.toml", "seeds = 5", "seeds = [0, 2, 3, 4]")
    said = "results/tiny holds incompress/d3po/seed-1, which results/tiny/grid.toml does not"
    assert [said in p for p in found(home, "grids")] == [True]
    edit(home / "results" / "tiny" / "grid.toml", '"d3po"', '"d3po", "ddpo"')
    assert sum("asks for incompress/ddpo/seed-" in p for p in found(home, "grids")) == 4


def test_a_config_swapped_everywhere(home: Path) -> None:
    for seed in (home / "results" / SEED.parent).iterdir():
        rewrite_config(seed, learning_rate=1e-3)
    assert found(home, "runs") == found(home, "sets") == []
    problems = found(home, "grids")
    assert len(problems) == 5
    assert all("has another learning_rate, run_id than results/tiny/grid.toml" in p
               for p in problems)  # fmt: skip


def test_runs_called_tries_are_missed(home: Path) -> None:
    path = home / "results" / "claims.json"
    path.write_text(json.dumps({**claimed(), "tries": ["tiny"]}))
    verify.record(home / "results")
    assert len(verify.verify(home / "results")["grids"]) == 5


# ---- sentences


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("It gains 0.21 kB, or 29%.", ["README.md says 0.21 where README.md has '+0.198"]),
        ("It gains 0.20 kB, or -29%.", ["README.md says -29 where"]),
        ("It gains 0.2000 kB, or 29%.", ["README.md says 0.2000 where"]),
        ("It gains 0.20 kB.", ["Expected a cell for each of 1 numbers, got 2"]),
    ],
)
def test_an_edited_sentence(new: str, said: list[str], home: Path) -> None:
    """As it stands in the document, and also where the claim is edited to match."""
    edit(home / "README.md", re.escape(SENTENCE), new)
    assert found(home, "numbers") == [f"README.md does not say: {SENTENCE}"]
    text = json.dumps(claimed()).replace(SENTENCE, new)
    (home / "results" / "claims.json").write_text(text)
    problems = found(home, "numbers")
    assert [s in p for s, p in zip(said, problems, strict=True)] == [True]


def test_a_number_of_a_cell_that_is_not_there(home: Path) -> None:
    text = json.dumps(claimed()).replace("share of excess", "share of nothing")
    (home / "results" / "claims.json").write_text(text)
    problems = found(home, "numbers")
    assert [p.startswith("README.md has no one cell 'share of nothing'") for p in problems] == [
        True
    ]


def test_numbers_of_a_sentence() -> None:
    said = documents._numbers("D3PO draws 1,536 at 2.5e-3, from +0.5 (blip2) to -0.06.")
    assert said == [1536, Decimal("0.0025"), Decimal("0.5"), Decimal("-0.06")]


def test_a_failed_check_is_told_and_exits_with_1(home: Path) -> None:
    (home / "results" / SEED / "timing.jsonl").unlink()
    done = CliRunner().invoke(cli.cli, ["verify", str(home / "results")])
    assert "manifest: 1 problems" in done.output
    assert isinstance(done.exception, RunError)
    assert done.exception.exit_code == 1


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected manifest.json in .*verify --record"):
        verify.verify(tmp_path)
