"""`verify`: what is published agrees with itself, and tampering shows."""

from __future__ import annotations

import json
import os
import py_compile
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d3po_bench.cli import cli
from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.prompts import digest
from d3po_bench.runs.packed import PACKED
from d3po_bench.runs.run import RunFolder, content, find_runs
from eval.verify import folder as verify
from eval.verify.folder import GRIDS
from results import measure as measuring
from tests.commands import TINY
from tests.damage import listed

ROOT = Path(__file__).parent.parent
SEED = Path("tiny", "incompress", "d3po", "seed-1")
NAME = SEED.as_posix()

GRID = 'methods = ["d3po"]\nobjectives = ["incompress"]\nseeds = 5\n'
MAKE = """
import sys
from pathlib import Path

from eval.analysis import documents
from eval.analysis.gains import gains
from eval.analysis.runs import read_groups

home = Path(__file__).parent
path = home.parent / "README.md"
block = lambda name: gains(read_groups([home / "tiny"])).markdown()
text, changed = documents.made(path.read_text(), block, str)
print("\\n".join(changed))
if "--check" in sys.argv:
    sys.exit(bool(changed))
path.write_text(text)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with D3PO's runs on incompress alone, and a README that a make.py writes."""
    home = tmp_path_factory.mktemp("project")
    shutil.copytree(TINY.joinpath(*SEED.parent.parts[1:]), home / "results" / SEED.parent)
    (home / "results" / "tiny" / "grid.toml").write_text(GRID)
    (home / "results" / "make.py").write_text(MAKE)
    (home / "results" / "statistics.py").write_text("raise SystemExit('a script of the folder')")
    (home / "README.md").write_text("<!-- made: gains -->\n<!-- /made -->\n")
    text = (home / "README.md").read_text().splitlines()
    text.insert(1, table_of(home))
    (home / "README.md").write_text("\n".join(text) + "\n")
    verify.record(home / "results")
    return home


def table_of(home: Path) -> str:
    done = CliRunner().invoke(cli, ["report", str(home / "results"), "--table", "gains"])
    return done.output.strip()


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "project")
    return tmp_path / "project"


def found(home: Path) -> dict[str, list[str]]:
    """What the checks of runs and of sets say; the manifest agrees, as a careful forger's would."""
    results = home / "results"
    runs = find_runs([results])
    checks = {
        "runs": [f"{r.place.relative_to(results)}: {p}" for r in runs for p in verify.check_run(r)],
        "sets": [*verify.check_sets(runs, results), *verify.check_grids(runs, results)],
    }
    return {name: problems for name, problems in checks.items() if problems}


def edit(path: Path, pattern: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    changed = re.sub(pattern, new, text, count=count, flags=re.MULTILINE)
    assert changed != text
    path.write_text(changed)


def put_content_on_record(run: Path) -> None:
    """Digests of the files as they are, as at the end of a run."""
    facts(run, content=content(run))


def facts(run: Path, **changes: Any) -> None:
    """Provenance changed."""
    path = run / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_config(run: Path, **changes: Any) -> None:
    """Settings changed, with a run_id and digests that fit."""
    config = RunConfig.from_json(json.loads((run / "config.json").read_text()) | changes)
    (run / "config.json").write_text(config.to_json())
    put_content_on_record(run)


# ---- what is published, and what was changed with and without a manifest to match


def test_the_published_results_agree_with_themselves() -> None:
    """All but the tables, which a step of CI compares."""
    results = ROOT / "results"
    assert list(verify.check_manifest(results)) == []
    assert found(ROOT) == {}


def test_the_trials_of_a_search_are_checked_too(home: Path) -> None:
    run = find_runs([home / "results"])[0].folder
    search = home / "results" / "tune"
    shutil.copytree(run, search / "trial-000" / "seed-0")
    (search / "trials.log").touch()
    (search / "trial-000" / "seed-0" / "metrics.jsonl").unlink()
    assert "tune/trial-000/seed-0" in str(verify.verify(home / "results")["runs"])


def test_an_untouched_copy_is_fine(home: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(home / "results")])
    assert done.output.splitlines() == [
        "manifest: fine",
        "runs: fine",
        "sets: fine",
        "tables: fine",
    ]
    assert done.exit_code == 0


def test_packed_runs_are_checked_as_their_folders(home: Path) -> None:
    """Against two grids, which share the seeds."""
    tiny, before = home / "results" / "tiny", table_of(home)
    words = ["publish", str(tiny), str(tiny), "--no-sheets", "--pack"]
    assert CliRunner().invoke(measuring.main, words).exit_code == 0
    (tiny / "grid.toml").write_text(GRID.replace("5", "[0, 1, 2]"))
    (tiny / "further.toml").write_text(GRID.replace("5", "[3, 4]"))
    assert [path.name for path in sorted(tiny.rglob("*.*"))] == [*sorted(GRIDS), PACKED]
    assert (found(home), table_of(home)) == ({}, before)
    (tiny / "grid.toml").write_text(GRID)
    (tiny / "further.toml").write_text(GRID.replace("5", "[7, 8]"))  # a plan
    assert found(home) == {}
    (tiny / "grid.toml").write_text(GRID.replace("5", "[0, 1, 2]"))
    (tiny / "further.toml").write_text(GRID.replace("5", "[3, 5]\n[set]\nrounds = 3"))
    assert found(home) == {
        "sets": [
            "no grid of tiny asks for incompress/d3po/seed-4, which is there",
            "incompress/d3po/seed-3 has another rounds than tiny/further.toml makes",
            "tiny/further.toml asks for incompress/d3po/seed-5, which is missing",
        ]
    }


def test_what_the_manifest_shows(home: Path) -> None:
    results = home / "results"
    timing = results / SEED / "timing.jsonl"
    timing.write_bytes(timing.read_bytes()[:-1])
    (results / SEED / "eval.csv").rename(results / SEED / "more.csv")
    assert list(verify.check_manifest(results)) == [
        f"{NAME}/eval.csv is missing",
        f"{NAME}/more.csv is not in the manifest",
        f"{NAME}/timing.jsonl has changed since the manifest was written",
    ]


# What a folder hides, or only points at.
def a_compiled_file(results: Path) -> None:
    (results / "rows.pyc").touch()


def a_hidden_file(results: Path) -> None:
    (results / ".rows").touch()


def a_hidden_folder(results: Path) -> None:
    (results / ".runs").mkdir()
    (results / ".runs" / "rows").touch()


def a_link_to_a_folder(results: Path) -> None:
    (results / "runs").symlink_to(results.parent)


def a_link_to_a_file(results: Path) -> None:
    (results / "tiny" / "grid.toml").rename(results.parent / "grid.toml")
    (results / "tiny" / "grid.toml").symlink_to(results.parent / "grid.toml")


HIDDEN: dict[str, Callable[[Path], None]] = {
    "rows.pyc is not in the manifest": a_compiled_file,
    ".rows is not in the manifest": a_hidden_file,
    ".runs/rows is not in the manifest": a_hidden_folder,
    "runs is a link": a_link_to_a_folder,
    "tiny/grid.toml is a link": a_link_to_a_file,
}


@pytest.mark.parametrize("said", HIDDEN)
def test_what_is_hidden_is_listed(said: str, home: Path) -> None:
    HIDDEN[said](home / "results")
    problems = list(verify.check_manifest(home / "results"))
    assert any(problem.startswith(said) for problem in problems), problems
    if "link" in said:
        with pytest.raises(UserError, match="is a link"):
            verify.record(home / "results")


TELLS = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import rows
print(rows.SAID, Path("matplotlibrc").exists())
sys.exit(1)
"""


def test_what_verify_runs_is_the_source_and_nothing_from_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled file of other code fits its source by size and time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matplotlibrc").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "make.py").write_text(TELLS)
    source = tmp_path / "results" / "rows.py"
    source.write_text("SAID = 'forged'")
    py_compile.compile(str(source))
    time = source.stat()
    source.write_text("SAID = 'source'")
    os.utime(source, ns=(time.st_atime_ns, time.st_mtime_ns))
    before = listed(tmp_path)
    assert list(verify.check_tables(Path("results"))) == ["source False"]
    assert listed(tmp_path) == before


def test_a_failed_check_is_told_and_exits_with_1(home: Path) -> None:
    (home / "results" / SEED / "timing.jsonl").unlink()
    done = CliRunner().invoke(cli, ["verify", str(home / "results")])
    assert "manifest: 1 problems" in done.output
    assert f"  {NAME}: has no timing.jsonl" in done.output
    assert isinstance(done.exception, RunError)
    assert done.exception.exit_code == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_manifest_is_refused(there: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json in .*verify --record"):
        verify.verify(tmp_path)
    with pytest.raises(UserError, match="no folder, or is empty"):
        verify.record(tmp_path if there else tmp_path / "x")


# ---- tables


@pytest.mark.slow
def test_a_changed_row_of_a_document_or_of_a_run(home: Path) -> None:
    results = home / "results"
    edit(home / "README.md", r"\+29%", "+39%")
    assert list(verify.check_tables(results)) == ["table gains has changed"]
    edit(home / "README.md", r"\+39%", "+29%")
    edit(results / SEED / "eval.csv", r"^(12,eta1,ant,0),[\d.]+", r"\1,3.5")
    # As long as the digests of the run's end stand, no table takes it.
    (problem,) = verify.check_tables(results)
    assert "make.py --check failed: " in problem
    assert "eval.csv" in problem
    put_content_on_record(results / SEED)
    assert list(verify.check_tables(results)) == ["table gains has changed"]


def test_a_folder_whose_script_fails_or_that_has_none(home: Path) -> None:
    script = home / "results" / "make.py"
    script.write_text("raise SystemExit('broken')")
    assert list(verify.check_tables(home / "results")) == [f"{script} --check failed: broken"]
    script.unlink()
    assert list(verify.check_tables(home / "results")) == []


# ---- one run that was tampered with, with a manifest and digests to match

Change = Callable[[Path], Any]


def edited(name: str, pattern: str, new: str, count: int = 1) -> Change:
    return lambda run: edit(run / name, pattern, new, count)


def doubled(run: Path) -> None:
    text = (run / "eval.csv").read_text()
    (run / "eval.csv").write_text(text + text.splitlines()[-1] + "\n")


def shortened(run: Path) -> None:
    lines = (run / "eval.csv").read_text().splitlines()
    (run / "eval.csv").write_text("\n".join(lines[:-3]) + "\n")


def without(name: str) -> Change:
    return edited("metrics.jsonl", rf', "{name}": [^,}}]+', "", 0)


def valued(value: str) -> Change:
    """Another value of three numbers of round 3."""

    def change(run: Path) -> None:
        for name in ("loss", "accuracy", "updates"):
            edit(run / "metrics.jsonl", rf'("round": 3,.*"{name}": )[^,}}]+', rf"\g<1>{value}")

    return change


def rows(pattern: str, new: str, count: int = 1) -> Change:
    return edited("eval.csv", pattern, new, count)


def on_record(name: str, value: Any) -> Change:
    return lambda run: facts(run, **{name: value})


STRANGE: tuple[Any, ...] = ([], "x", None, 5)
OTHERS = "are not those that its config asks for"
ANT = "^(12,eta1,ant,0"
TAMPERED: Mapping[str, tuple[Change, str]] = {
    "a row twice": (doubled, "two rows of one image"),
    "rows left out": (shortened, "42 of 45 images"),
    "half a line": (rows(r"\n\Z", ""), "half a line"),
    "an endless row": (rows("^12,eta1,ant,.*", f"12,eta1,{'ant' * 50_000}"), "cannot be read"),
    "an evaluation left out": (rows(r"^8,.*\n", "", 0), f"of round 8 (eta0), 8 (eta1) {OTHERS}"),
    "an evaluation that is not due": (rows("^8,", "7,", 0), "of round 7 (eta0), 7 (eta1), 8"),
    "a prompt left out": (rows(r"^\d+,eta\d,ant,.*\n", "", 0), "0 (eta0), 0 (eta1), 4 (eta0)"),
    "a prompt of no list": (rows(",ant,", ",unicorn,", 0), OTHERS),
    "no score": (rows(rf"{ANT}),[\d.]+", r"\1,"), "an evaluation image has no score"),
    "a score that is NaN": (rows(rf"{ANT}),[\d.]+", r"\1,nan"), "has no score"),
    "no drift": (rows(rf"{ANT},.*),[\d.]+$", r"\1,"), "an evaluation image has no kl"),
    "an infinite value": (rows(rf"{ANT},[\d.]+),[\d.]+", r"\1,inf"), "an infinite animal"),
    "a word": (rows(rf"{ANT}),[\d.]+", r"\1,x"), "'x'"),
    "a round left out": (edited("metrics.jsonl", r'^{"round": 5,.*\n', ""), "round"),
    "a count that goes back": (edited("metrics.jsonl", r'"images": 1280', '"images": 1'), "images"),
    **{f"a round's {value}": (valued(value), "round 3 has no finite loss, accuracy, updates")
       for value in ('"0.69"', "null", "[0.69]", "true", "NaN", "-Infinity", "1e999")},
    **{f"no {name}": (without(name), f"has no {name}")
       for name in verify.NUMBERS if name not in ("round", "pairs", "images")},
    "no images": (without("images"), "images"),
    "no metrics": (edited("metrics.jsonl", r"(?s).*", "{"), "metrics.jsonl"),
    "the config of another seed": (
        lambda run: shutil.copy(run.parent / "seed-2" / "config.json", run),
        "belongs in incompress/d3po/seed-2",
    ),
    "fewer rounds": (edited("config.json", '"rounds": 12', '"rounds": 10'), "12 of 10 rounds"),
    "another setting": (edited("config.json", '"passes": 1', '"passes": 2'), "its settings make"),
    "not ended": (edited("provenance.json", '"ended"', '"began"'), "has not ended"),
    "a file less": (lambda run: (run / "timing.jsonl").unlink(), "has no timing.jsonl"),
    **{f"{name} of {strange!r}": (on_record(name, strange), name)
       for name in ("content", "plugins") for strange in STRANGE},
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_run_that_was_tampered_with(name: str, home: Path) -> None:
    change, said = TAMPERED[name]
    run = home / "results" / SEED
    change(run)
    if not name.startswith("content"):
        put_content_on_record(run)
    problems = list(verify.check_run(RunFolder(run)))
    assert any(said in problem for problem in problems), problems


def test_a_number_that_need_not_be_there(home: Path) -> None:
    """A further scorer may have nothing to say about an image; older runs lack some provenance."""
    run = home / "results" / SEED
    edit(run / "eval.csv", r"^(12,eta1,ant,0,[\d.]+),[\d.]+", r"\1,")
    put_content_on_record(run)
    facts(run, inputs={})
    assert list(verify.check_run(RunFolder(run))) == []


def test_a_number_changed_after_the_run(home: Path) -> None:
    """Rounds that agree with each other and with the manifest, but not with the run's own word."""
    run = home / "results" / SEED
    put_content_on_record(run)
    assert found(home) == {}
    edit(run / "metrics.jsonl", r'"reward_mean": [\d.]+', '"reward_mean": 9.5')
    (problem,) = found(home)["runs"]
    assert problem.startswith(NAME)
    assert "metrics.jsonl" in problem


@pytest.mark.parametrize(
    ("other", "said"), [({}, None), ({"threads": 9, "gpu": "A"}, "round 3 with other threads, gpu")]
)
def test_a_run_that_was_resumed_elsewhere(
    other: dict[str, Any], said: str | None, home: Path
) -> None:
    first = {"started": "a", "after_round": 0, "threads": 1}
    facts(home / "results" / SEED, sessions=[first, {**first, "after_round": 3, **other}])
    where = f"{NAME}: was made in several environments: from "
    assert found(home) == ({"runs": [where + said]} if said else {})


@pytest.mark.parametrize("there", ["gone", "another", "the one", "of votes"])
def test_evaluations_of_a_users_own_prompts(
    there: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that cannot be read names no prompts; rows of each are counted all the same."""
    monkeypatch.chdir(home)
    run = home / "results" / SEED
    own = {"objective": "feedback"} if there == "of votes" else {"prompts": "own.txt"}
    rewrite_config(run, **own, eval_prompts=2, eval_images=2)
    if there in ("another", "the one"):
        Path("own.txt").write_text("a hat\n" + ("a cat\n" if there == "the one" else "a mat\n"))
    facts(run, inputs={"prompts": digest(["a hat", "a cat"])})

    def wrong(*images: tuple[str, int]) -> bool:
        lines = ["round,sampler,prompt,index,score"]
        for number in (0, 4, 8, 12):
            lines += [f"{number},{s},{p},{i},1.0" for s in ("eta1", "eta0") for p, i in images]
        (run / "eval.csv").write_text("\n".join(lines) + "\n")
        put_content_on_record(run)
        return any("evaluations" in problem for problem in verify.check_run(RunFolder(run)))

    whole = [("a hat", 0), ("a hat", 1), ("a cat", 0), ("a cat", 1)]
    assert not wrong(*whole)
    assert wrong(*whole[:3])
    assert wrong(*whole, ("a mat", 0), ("a mat", 1)), "more prompts than eval_prompts"
    assert wrong(*whole[:2]) is (there == "the one")


# ---- sets of runs


def copied(run: Path) -> None:
    """Another seed that is a copy, and says otherwise."""
    shutil.rmtree(run.parent / "seed-4")
    shutil.copytree(run, run.parent / "seed-4")
    rewrite_config(run.parent / "seed-4", seed=4)


def copied_numbers(name: str) -> Change:
    """Written in other bytes: with a blank, another number of zeros, a column of its own."""

    def change(run: Path) -> None:
        text = (run.parent / "seed-0" / name).read_text()
        other = text.replace('"loss": ', '"loss":  ').replace("}\n", ', "own": 1}\n')
        other = re.sub(r"(?m)^(\d+,.*),([\d.]+),[\d.]+,([\d.]*)$", r"\1,\g<2>0,0.5,\3", other)
        assert other != text
        (run / name).write_text(other)
        put_content_on_record(run)

    return change


def every_seed(**changes: Any) -> Change:
    def change(run: Path) -> None:
        for seed in run.parent.iterdir():
            rewrite_config(seed, **changes)

    return change


ALIKE = "differ in more than the seed"
SETS: Mapping[str, tuple[Change, list[str]]] = {
    "a copy": (copied, ["have the same rounds", "have the same evaluations"]),
    "rounds of another": (copied_numbers("metrics.jsonl"), ["have the same rounds"]),
    "evaluations of another": (copied_numbers("eval.csv"), ["have the same evaluations"]),
    "another setting": (lambda run: rewrite_config(run, learning_rate=1e-4), [ALIKE, "another"]),
    "a seed twice": (lambda run: rewrite_config(run, seed=0), ["have the same seed", "another"]),
    "a version": (edited("provenance.json", '"pillow": "[^"]+"', '"pillow": "1"'), [ALIKE]),
    "another model": (on_record("inputs", {"model": "0" * 12}), [ALIKE]),
    "other prompts": (on_record("inputs", {"prompts": "0" * 12}), [ALIKE]),
    "no inputs": (on_record("inputs", {}), [ALIKE]),
    "a plug-in": (on_record("plugins", {"scorer mine": "my-scorers 0.2"}), [ALIKE]),
    # What tables and figures, made again, do not show.
    "a seed less": (
        lambda run: shutil.rmtree(run.parent / "seed-4"),
        ["tiny/grid.toml asks for incompress/d3po/seed-4, which is missing"],
    ),
    "a grid of less": (
        lambda run: edit(run.parents[2] / "grid.toml", "seeds = 5", "seeds = [0, 2, 3, 4]"),
        ["no grid of tiny asks for incompress/d3po/seed-1, which is there"],
    ),
    "another setting of all": (
        every_seed(learning_rate=1e-3),
        ["has another learning_rate than tiny/grid.toml makes"] * 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_was_tampered_with(name: str, home: Path) -> None:
    change, said = SETS[name]
    change(home / "results" / SEED)
    problems = found(home)["sets"]
    assert len(problems) == len(said), problems
    assert all(s in problem for s, problem in zip(said, problems, strict=True)), problems


def test_a_run_that_cannot_be_read_is_named_once(home: Path) -> None:
    (home / "results" / SEED / "provenance.json").write_text("{")
    problems = found(home)
    assert list(problems) == ["runs"]
    assert len(problems["runs"]) == 1
