"""A grid of runs: what is asked for, what is skipped, what fails, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.cli import main
from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch import job, local
from d3po_bench.launch.grid import configs, other, read
from d3po_bench.runs.run import RunFolder, find_runs
from d3po_bench.training import trainer
from d3po_bench.training.run import Job
from eval.tools import TOOLS
from tests.commands import Command, files, refused

GRID = """
methods = ["d3po", "reward_weighted"]
objectives = ["compress", "incompress"]
seeds = [3, 1]
model = "{model}"
preset = "official_code"
[set]
rounds = 2
sampling_steps = 2
prompts_per_round = 2
eval_prompts = 2
eval_images = 1
dtype = "fp32"
[method.reward_weighted]
skip_steps = 0
weight = "sparse"
[objective.compress]
learning_rate = 1e-3
[cell."d3po.compress"]
learning_rate = 2e-3
skip_ties = true
lora_targets = ["to_q", "to_k"]
"""


@pytest.fixture
def grid(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(model=micro))
    return path


@pytest.fixture
def small(grid: Path) -> Path:
    """The grid with one seed."""
    grid.write_text(grid.read_text().replace("[3, 1]", "[1]"))
    return grid


@pytest.fixture(scope="module")
def whole(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the small grid, for reading and comparing only."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(GRID.format(model=micro).replace("[3, 1]", "[1]"))
    assert sweep(folder / "grid.toml", "--out", folder / "runs") == 0
    return folder / "runs"


def sweep(*arguments: str | Path) -> int:
    try:
        main(["sweep", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def runs_of(out: Path = Path("runs")) -> dict[str, RunFolder]:
    return {"/".join(run.folder.parts[-3:]): run for run in find_runs([out])}


def contents(out: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "eval.csv", "pytorch_lora_weights.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for n in names for path in out.rglob(n)}


def test_a_byte_order_mark_is_no_fault(grid: Path) -> None:
    before = read(grid)
    grid.write_text("\ufeff" + grid.read_text(), encoding="utf-8")
    assert read(grid) == before


def test_the_special_beats_the_general(grid: Path) -> None:
    found = read(grid)
    assert (found.seeds, found.preset) == ([3, 1], "official_code")
    assert found.settings_of("d3po", "incompress")["rounds"] == "2"
    assert "learning_rate" not in found.settings_of("d3po", "incompress")
    assert found.settings_of("reward_weighted", "compress")["learning_rate"] == "0.001"
    own = found.settings_of("d3po", "compress")
    assert own["learning_rate"] == "0.002"
    assert (own["skip_ties"], own["lora_targets"]) == ("true", "to_q,to_k")


def test_runs_of_a_grid_begin_with_its_lora(grid: Path) -> None:
    grid.write_text('lora = "style.safetensors"\n' + grid.read_text())
    assert {config.lora for config in configs(read(grid), TOOLS)} == {"style.safetensors"}


def test_all_cells_run_and_finished_ones_are_skipped(
    small: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(runs_of(whole)) == [
        f"{objective}/{method}/seed-1"
        for objective in ("compress", "incompress")
        for method in ("d3po", "reward_weighted")
    ]
    assert all(run.finished for run in runs_of(whole).values())
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")}
    capsys.readouterr()
    assert sweep(small, "--out", whole, "-v") == 0
    told = capsys.readouterr().err.splitlines()
    assert sum(re.fullmatch(r"\[[^;]*: finished before", t) is not None for t in told) == 4
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")}


@pytest.mark.parametrize(
    ("part", "runs"),
    [
        (["--objective", "incompress", "--seeds", "1"],
         ["d3po incompress seed 3", "reward_weighted incompress seed 3"]),
        (["--method", "d3po", "--seeds", "9"],
         [f"d3po {o} seed {n}" for n in (3, 1) for o in ("compress", "incompress")]),
        (["--method", "ddpo"], "No method of this grid is called 'ddpo'. "),
        (["--objective", "aesthetic"], "No objective of this grid is called 'aesthetic'. "),
    ],
)  # fmt: skip
def test_a_part_of_a_grid(
    grid: Path, part: list[str], runs: list[str] | str, command: Command
) -> None:
    done = command("sweep", grid, "--status", "--json", *part)
    if isinstance(runs, str):
        refused(done, runs)
    else:
        assert [row["run"] for row in json.loads(done.out)["runs"]] == runs


def test_a_grid_on_another_model_with_further_settings(grid: Path, command: Command) -> None:
    """They win over those of the grid, of one of its cells, too."""
    part = ("--method", "d3po", "--objective", "compress", "--seeds", 1, "--status", "--json")
    sets = ("--set", "learning_rate=5e-3", "--set", "rounds=1")
    done = command("sweep", grid, *part, "--model", "tiny", *sets)
    assert [row["of"] for row in json.loads(done.out)["runs"]] == [1]
    asked = other(read(grid), "tiny", {"learning_rate": "5e-3"})
    own = asked.settings_of("d3po", "compress")
    assert (asked.model, own["learning_rate"], own["skip_ties"]) == ("tiny", "5e-3", "true")
    assert other(read(grid), None, {}).settings_of("d3po", "compress") == read(grid).settings_of(
        "d3po", "compress"
    )
    refused(command("sweep", grid, *part, "--set", "rate=1"), "rate")


@pytest.mark.usefixtures("grid")
def test_the_runs_are_those_of_the_run_command(whole: Path, micro: Path) -> None:
    sets = ["sampling_steps=2", "prompts_per_round=2", "eval_prompts=2", "eval_images=1",
            "dtype=fp32", "rounds=2"]  # fmt: skip
    main(["run", "--method", "d3po", "--objective", "incompress", "--model", str(micro),
          "--preset", "official_code", "--seed-start", "1", "--out", "again",
          *[part for s in sets for part in ("--set", s)]])  # fmt: skip
    again = contents(Path("again"))
    assert len(again) == 3
    assert again.items() <= contents(whole).items()


def test_a_sweep_that_was_cut_resumes_to_the_same_bytes(
    small: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = trainer.Trainer.train_round
    calls: list[int] = []

    def cut(self: trainer.Trainer, report: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second round of the third run
            raise KeyboardInterrupt
        return rounds(self, report)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_round", cut)
        assert sweep(small, "--out", "cut", "--jobs", "1") == 1
    assert sum(run.finished for run in runs_of(Path("cut")).values()) == 2
    assert sweep(small, "--out", "cut") == 0
    assert contents(Path("cut")) == contents(whole)


@pytest.mark.slow
def test_a_failed_cell_is_named_and_stops_no_other(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train_round = trainer.Trainer.train_round

    def broken(self: trainer.Trainer, working: Any) -> Any:
        if (self.config.method, self.config.objective, self.config.seed) == ("d3po", "compress", 3):
            raise UserError("told.")
        return train_round(self, working)

    monkeypatch.setattr(trainer.Trainer, "train_round", broken)
    assert sweep(grid, "--jobs", "1") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: 1 of 8 runs failed: d3po compress seed 3.")
    assert lines[-2] == "d3po compress seed 3: told."
    unfinished = [name for name, run in runs_of().items() if not run.finished]
    assert unfinished in ([], ["compress/d3po/seed-3"])
    assert sum(run.finished for run in runs_of().values()) == 7


FRAGILE = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

from d3po_bench.d3po import D3PO

def wait_for(name):
    end = time.monotonic() + 60
    while not Path(name).exists():
        assert time.monotonic() < end
        time.sleep(0.01)

@dataclass(frozen=True)
class Fragile(D3PO):
    does: str = ""

    def rows(self, rollout, rng):
        if self.does == "divide":
            return 1 / 0
        if self.does == "wait":
            Path("begun").touch()
            wait_for("killed")
        if self.does == "die" and rollout.history and not Path("killed").exists():
            wait_for("begun")
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rows(rollout, rng)
"""
"""A method of another package that goes wrong, in its first round or later, where it is told to."""


@pytest.fixture
def fragile(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a grid of that method on two objectives, from what it does on each."""
    metadata = tmp_path / "site" / "fragile-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata.parent / "fragile.py").write_text(FRAGILE)
    (metadata / "METADATA").write_text("Name: fragile\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[d3po_bench.methods]\nfragile = fragile:Fragile\n")
    monkeypatch.syspath_prepend(metadata.parent)  # spawned workers get the path, too

    def write(seeds: list[int], **does: str) -> Path:
        text, _, _ = grid.read_text().partition("[method.")
        text = text.replace('"d3po", "reward_weighted"', '"fragile"')
        text = text.replace("[3, 1]", str(seeds))
        lines = [f'[objective.{name}]\ndoes = "{what}"' for name, what in does.items()]
        grid.write_text("\n".join([text, *lines]))
        return grid

    return write


@pytest.mark.parametrize(
    ("jobs", "seeds"), [(1, [3, 1]), pytest.param(2, [3], marks=pytest.mark.slow)]
)
def test_a_mistake_in_a_plugin_stops_no_other_cell(
    jobs: int, seeds: list[int], fragile: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(fragile(seeds, compress="divide"), "--jobs", str(jobs)) == 1
    err = capsys.readouterr().err
    *before, last = err.splitlines()
    for seed, line in zip(seeds, before[-len(seeds) :], strict=True):
        said = "Failed with ZeroDivisionError: division by zero (traceback above)"
        assert line.startswith(f"fragile compress seed {seed}: {said}")
    assert f"{len(seeds)} of {2 * len(seeds)} runs failed: fragile compress seed 3" in last
    assert err.count("return 1 / 0") == 1  # the traceback, once for all
    finished = [name for name, run in runs_of().items() if run.finished]
    assert finished == [f"incompress/fragile/seed-{seed}" for seed in sorted(seeds)]


@pytest.mark.slow
def test_of_a_killed_worker_only_the_cell_is_blamed_and_resumed(
    fragile: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = fragile([3, 1], compress="die", incompress="wait")
    assert sweep(grid, "--jobs", "2", "--no-resume") == 1
    *_, line, last = capsys.readouterr().err.splitlines()
    assert line.startswith("fragile compress seed 3: The worker process was killed")
    assert "1 of 4 runs failed: fragile compress seed 3." in last
    killed = runs_of().pop("compress/fragile/seed-3")
    assert [row["round"] for row in killed.metrics] == [1]
    assert sum(run.finished for run in runs_of().values()) == 3
    assert sweep(grid, "--jobs", "1") == 0
    assert sweep(grid, "--jobs", "1", "--out", "whole") == 0
    assert contents(Path("runs")) == contents(Path("whole"))


def ended(problem: BaseException, monkeypatch: pytest.MonkeyPatch) -> job.End:
    """How a run ends that meets the problem."""

    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr("d3po_bench.launch.job.run_seed", fail)
    config = RunConfig(method="d3po", objective="compress")
    item = Job(config=config, execution=Execution(), folder=Path("run"), tools=TOOLS)
    return job.make_run(item, lambda progress: None)


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), local._Stopped()])
def test_what_stops_a_run_stops_all(
    problem: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(problem)):
        ended(problem, monkeypatch)


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UserError("one."), 2, "one."),
        (RunError("two."), 1, "two."),
        (MemoryError(), 1, "Out of memory."),
        (
            PermissionError(13, "Permission denied", "w.bin"),
            2,
            "w.bin cannot be read or written: Permission",
        ),
        (SystemExit(0), 1, "Failed with SystemExit: 0 (traceback above)"),
        (OSError("no file"), 1, "Failed with OSError: no file (traceback above)"),
        (TypeError("x\n" * 999), 1, f"Failed with TypeError: {'x ' * 143}... (traceback above)"),
    ],
)
def test_what_a_run_failed_with_is_told(
    problem: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = ended(problem, monkeypatch)
    assert end.problem is not None
    assert end.problem.exit_code == code
    assert said in str(end.problem)
    kept = end.problem.__traceback__, end.problem.__context__, end.problem.__cause__
    assert kept == (None, None, None)  # which would hold the run's frames, and its model
    assert ("Traceback" in end.trace) == ("(traceback above)" in said)


@pytest.mark.slow
def test_side_by_side_gives_the_same_bytes(grid: Path, whole: Path) -> None:
    text = grid.read_text().replace("seeds = [3, 1]", "seeds = [1]")
    grid.write_text(text.replace('["compress", "incompress"]', '["compress"]'))
    assert sweep(grid, "--jobs", "2", "--out", "two") == 0
    two = contents(Path("two"))
    assert len(two) == 6
    assert two.items() <= contents(whole).items()


GOOD = 'methods = ["d3po"]\nobjectives = ["compress"]\nseeds = 1\n'
NAMES, SEEDS, SETS = '["d3po"]', "seeds = 1", "a setting is text, a number, true, false, or a list"

REFUSED: dict[str | bytes, str] = {
    "methods = [": "grid.toml is not TOML",
    "a = " + "[" * 5000: "grid.toml is not TOML",
    b"\xff\xfe\x00": "grid.toml is not UTF-8 text",
    GOOD + "seeds = 3": "grid.toml is not TOML",  # a key twice
    "": "methods: it is missing",
    GOOD.replace('objectives = ["compress"]', ""): "objectives: it is missing",
    GOOD.replace(SEEDS, ""): "seeds: it is missing",
    GOOD + "rounds = 3": "No key of a grid is called 'rounds'. Known: methods, objectives, seeds",
    GOOD + "modle = 'tiny'": "Did you mean 'model'?",
    GOOD + "model = 3": "grid.toml, model: should be a valid string",
    GOOD + "preset = ['quick']": "grid.toml, preset: should be a valid string",
    GOOD.replace("d3po", "d3pp"): "No method is called 'd3pp'. Did you mean 'd3po'?",
    GOOD.replace("compress", "compres"): "No objective is called 'compres'.",
    GOOD.replace(NAMES, "[]"): "methods: List should have at least 1 item",
    GOOD.replace(NAMES, '"d3po"'): "methods: should be a valid list",
    GOOD.replace(NAMES, "[1]"): "methods.0: should be a valid string",
    GOOD.replace(NAMES, '["d3po", "d3po"]'): "methods: 'd3po' is there twice",
    GOOD.replace('"compress"', '"compress", "compress"'): "objectives: 'compress' is there twice",
    GOOD.replace(SEEDS, "seeds = [0, 1, 0]"): "seeds: 0 is there twice",
    GOOD.replace(SEEDS, "seeds = [0, -1]"): "seeds.1: should be greater than or equal to 0",
    GOOD.replace(SEEDS, "seeds = [0.5]"): "seeds.0: should be a valid integer",
    GOOD.replace(SEEDS, "seeds = [true]"): "seeds.0: should be a valid integer",
    GOOD.replace(SEEDS, "seeds = true"): "seeds: should be a valid list",
    GOOD.replace(SEEDS, "seeds = '2'"): "seeds: should be a valid list",
    GOOD.replace(SEEDS, "seeds = 0"): "seeds: a grid has 1 to 10000 seeds, not 0",
    GOOD.replace(SEEDS, "seeds = 1000000000000"): "a grid has 1 to 10000 seeds",
    GOOD.replace(SEEDS, "seeds = [99999999999]"): "seed must be from 0 to",
    GOOD + "[set]\nroundz = 2": "Did you mean 'rounds'?",
    GOOD + "[set]\nrounds = 'two'": "not 'two'. This is about d3po on compress, seed 0",
    GOOD + "[set]\nrounds = 0": "rounds must be from 1",
    GOOD + "[set]\nrounds = nan": "rounds must be a whole number",
    GOOD + "[set]\nrounds = {a = 1}": f"set.rounds: {SETS}",
    GOOD + "[set]\nrounds = 2026-01-01": f"set.rounds: {SETS}",
    GOOD + '[set]\nprompts = "a\\u0000b"': "prompt",
    GOOD + "set = 3": "grid.toml, set: should be a valid dictionary",
    GOOD + "method = 3": "grid.toml, method: should be a valid dictionary",
    GOOD + "cell = 3": "grid.toml, cell: should be a valid dictionary",
    GOOD + "[method]\nd3po = 3": "grid.toml, method.d3po: should be a valid dictionary",
    GOOD + "[cell.d3po.compress]\nrounds = 1": f"cell.d3po.compress: {SETS}",  # without quotes
    GOOD + "[method.ddpo]\nrounds = 2": "No method of this grid is called 'ddpo'",
    GOOD + "[objective.clip]\nrounds = 2": "No objective of this grid is called 'clip'",
    GOOD + "[cell.'d3po.incompress']\nrounds = 2": "No cell of this grid is called 'd3po.in",
    GOOD + "preset = 'quik'": "Did you mean 'quick'?",
    GOOD + "model = 'tinny'": "Did you mean 'tiny'?",
    GOOD + 'model = "a\\u0000b"': "No model is called 'a\\x00b'",
}
"""A grid that cannot be, and what is said of it."""


def test_grids_that_cannot_be_are_refused(command: Command) -> None:
    for content, said in REFUSED.items():
        data = content if isinstance(content, bytes) else content.encode()
        Path("grid.toml").write_bytes(data)
        refused(command("sweep", "grid.toml"), said)
    assert files(Path()) == {"grid.toml"}
    refused(command("sweep", "nowhere.toml"), "nowhere.toml cannot be read: No such file")
    refused(command("sweep", "."), "The grid . cannot be read: Is a directory")


def test_a_folder_of_another_config_is_refused_before_anything_runs(
    grid: Path, whole: Path, capsys: Any
) -> None:
    grid.write_text(grid.read_text().replace("rounds = 2", "rounds = 1"))
    before = contents(whole)
    capsys.readouterr()
    assert sweep(grid, "--out", whole) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a run of 2 rounds, and 1 are fewer" in line
    assert contents(whole) == before
