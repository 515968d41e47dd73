"""--json: stdout is one JSON document, whichever command it is, and says what the text says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from d3po_bench.cli import cli
from d3po_bench.cli.options import Answering, Result, Working
from eval.analysis.report import report
from tests.commands import PUBLISHED, TINY, Command, run_of, seed_folder
from tests.made_up import add_columns, write_run

SILENT = {"feedback serve"}
"""Commands that go on until they are stopped."""


def leaves(group: click.Group, path: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = isinstance(command, click.Group)
        found |= leaves(command, f"{path}{name} ") if inner else {path + name: command}  # type: ignore[arg-type]
    return found


def test_every_command_answers_in_json_and_those_that_take_time_can_be_quiet() -> None:
    found = leaves(cli)
    options = {n: {o for p in c.params for o in p.opts} for n, c in found.items()}
    assert {name for name, known in options.items() if "--json" not in known} == SILENT
    busy = {name for name, known in options.items() if {"-q", "--quiet", "-v"} <= known}
    assert busy == {"run", "sweep", "evaluate", "table1", "verify", "feedback new",
                    "feedback train", "feedback simulate", "feedback agreement",
                    "tune"}  # fmt: skip
    assert busy == {name for name, command in found.items() if isinstance(command, Working)}


def asked(command: Command, *line: str | Path, code: int = 0) -> Any:
    done = command(*line, "--json")
    assert done.code == code, done
    return json.loads(done.out)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for method in ("d3po", "ddpo"):
        for seed in range(2):
            folder = write_run(tmp_path / "runs", method=method, seed=seed, gain=0.1 + seed / 100)
            add_columns(folder, {}, kl=0.02)
    return tmp_path / "runs"


def test_results_of_runs(command: Command, runs: Path) -> None:
    assert asked(command, "report", runs) == json.loads(report([runs], form="json"))
    place = runs / "tiny" / "incompress"
    verdict = asked(command, "compare", place / "d3po", place / "ddpo")
    assert (verdict["verdict"], verdict["difference"]) == ("not shown", 0)
    drawn = asked(command, "plot", runs)
    assert drawn
    assert all(Path(path).is_file() for path in drawn)


def test_a_failed_comparison_still_prints_its_document(command: Command, runs: Path) -> None:
    place = runs / "tiny" / "incompress"
    line = ("compare", place / "d3po", place / "ddpo", "--require", "better")
    assert asked(command, *line, code=1)["paired"] is True


def test_what_is_known_of_things(command: Command) -> None:
    listed = asked(command, "list")
    assert listed["presets"]["paper"]
    assert (
        "learning_rate=3e-05" in asked(command, "list", "--settings")["run (a preset changes some)"]
    )
    assert asked(command, "show", PUBLISHED)["run"]["rounds"] == "12 of 12"
    assert asked(command, "weights", "list")["clip"]["bytes"] > 10**9


def test_a_run_and_an_evaluation(command: Command, micro: Path, tmp_path: Path) -> None:
    found = asked(command, *run_of(micro, "--seeds", "2", "--jobs", "1", rounds=1))
    assert found["runs"] == [str(seed_folder(Path("runs"), micro, seed)) for seed in (0, 1)]
    assert found["tables"]["gains"][0]["seeds"] == 2
    again = ("evaluate", found["runs"][0], "--scorers", "jpeg_size", "--prompts", "animals")
    scored = asked(command, *again, "--count", "2", "-q")
    assert [m["sampler"] for m in scored["means"] if m["column"] == "jpeg_size"] == ["eta1", "eta0"]
    assert Path(scored["rows"]).is_file()
    nothing = asked(command, *run_of(micro, "--out", "other", rounds=1, eval_every=0))
    assert nothing["tables"] is None


def test_a_damaged_result_fails_after_its_document(command: Command, tmp_path: Path) -> None:
    place = tmp_path / "results"
    shutil.copytree(TINY / "incompress" / "d3po", place / "d3po")
    assert command("verify", place, "--record").code == 0
    next(place.rglob("metrics.jsonl")).unlink()
    checks = {check["check"]: check["verdict"] for check in asked(command, "verify", place, code=1)}
    assert checks["manifest"] == "1 problems"


def test_json_has_no_nan_and_functions_are_called_once_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    called = list[int]()

    def data() -> dict[str, Any]:
        called.append(1)
        return {"a": float("nan"), "b": (Path("x"), 1.5)}

    def answer() -> Result:
        return Result(["text"], data)

    command = Answering("name", callback=answer)
    command.main([], standalone_mode=False)
    assert (capsys.readouterr().out, called) == ("text\n", [])
    command.main(["--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": ["x", 1.5]}
