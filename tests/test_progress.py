"""How far a command is: what is counted, what the time left is made of, and what is printed."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from d3po_bench.config import RunConfig
from d3po_bench.launch import progress as shown
from d3po_bench.launch.estimate import Estimate
from d3po_bench.launch.progress import LATE, SOON, Board, Level
from d3po_bench.training import progress
from d3po_bench.training.progress import IMAGE, ROUND, START, Counted, Progress, planned
from tests.commands import Command, run_of


def config(**settings: Any) -> RunConfig:
    return RunConfig(method="d3po", objective="incompress", **settings)


# ---- what is counted


@pytest.mark.parametrize(
    ("rounds", "every", "evaluations"), [(12, 4, 4), (12, 5, 4), (3, 10, 2), (1, 1, 2), (12, 0, 0)]
)
def test_a_run_is_loading_rounds_and_evaluation_images(
    rounds: int, every: int, evaluations: int
) -> None:
    own = config(rounds=rounds, eval_every=every, eval_prompts=7, eval_images=3)
    left = planned(own).left
    assert (left[START], left[ROUND]) == (1, rounds)
    assert left.get(IMAGE, 0) == evaluations * 2 * 7 * 3
    few = config(rounds=rounds, eval_every=every, eval_prompts=1000, eval_images=1)
    assert planned(few).left.get(IMAGE, 0) == evaluations * 2 * 45


# ---- the time left


def at(name: str, *, rounds: float, images: float, seconds: dict[str, float],
       done: float = 0, like: str = "") -> Progress:  # fmt: skip
    left = {ROUND: rounds, IMAGE: images}
    return Progress(run=name, like=like, done={ROUND: done}, left=left, seconds=seconds)


def test_the_time_left_weighs_rounds_and_evaluations_by_what_they_took() -> None:
    estimate = Estimate()
    estimate.expect([at("a", rounds=10, images=20, seconds={})], 1)
    assert estimate.whole().left is None
    estimate.work["a"] = at("a", rounds=4, images=10, seconds={ROUND: 3, IMAGE: 0.5}, done=6)
    whole = estimate.whole()
    assert whole.left == 4 * 3 + 10 * 0.5
    assert whole.share == 18 / (18 + 17)
    assert estimate.of("a") == whole


def test_runs_that_wait_take_what_their_like_take() -> None:
    estimate, took = Estimate(), {ROUND: 2.0, IMAGE: 1.0}
    waiting = [at(n, rounds=10, images=0, seconds={}, like=k) for n, k in (("b", "x"), ("c", "y"))]
    running = at("a", rounds=5, images=0, seconds=took, done=5, like="x")
    estimate.expect([running, *waiting], 1)
    assert estimate.whole().left == 10 + 20 + 20
    estimate.work["c"] = at("c", rounds=10, images=0, seconds={ROUND: 7}, like="y")
    assert estimate.whole().left == 10 + 20 + 70
    estimate.expect([at("scoring", rounds=0, images=30, seconds={})], 1)
    assert estimate.whole().left == 10 + 20 + 70 + 30


def test_runs_side_by_side_share_the_time_but_none_is_cut_in_two() -> None:
    estimate = Estimate()
    parts = [at(n, rounds=r, images=0, seconds={ROUND: 1}) for n, r in (("a", 10), ("b", 2))]
    estimate.expect(parts, 2)
    assert estimate.whole().left == 10
    estimate.expect([at("c", rounds=8, images=0, seconds={ROUND: 1})], 4)
    assert estimate.whole().left == 18


def test_work_of_an_earlier_process_counts_but_tells_nothing_of_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    told: list[Progress] = []
    counted = Counted("evaluation", IMAGE, told.append)
    counted(80, 100)
    clock.now += 4
    counted(82, 100)
    first, second = told
    assert (first.done, first.left, first.seconds) == ({IMAGE: 80}, {IMAGE: 20}, {})
    assert (second.text, second.seconds) == ("82 of 100 images", {IMAGE: 2})


# ---- what is printed


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shown, "time", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("seed 0", "seed 1")
    waiting = [at(run, rounds=100, images=0, seconds={}, like="d3po") for run in runs]
    with Board() as board:
        board.expect(waiting, 1)
        for n in range(101):
            now = at("seed 0", rounds=100 - n, images=0, seconds={ROUND: 2}, done=n, like="d3po")
            now = replace(now, text=f"round {n}/100", gain=n / 100, unit="kB")
            board.report(now)
            clock.now += 2
        clock.now += LATE
        board.report(now)
    found = lines(capsys)
    assert found[0] == "[0:00:02] 0 %, 0:06:38 left; 0 of 2 runs done, held-out gain +0.010 kB " \
                       "(mean of 1); seed 0: round 1/100"  # fmt: skip
    assert len(found) < 202 / SOON
    assert found[-2].startswith("[0:08:22] 50 %, 0:03:20 left; 1 of 2 runs done")
    assert found[-1] == "done in 0:08:22"
    assert not [line for line in found if "100 %" in line]


def test_nothing_is_100_percent_before_it_is_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board().__enter__()
    board.report(at("a", rounds=0, images=0, seconds={ROUND: 1}, done=3))
    board.__exit__(KeyError)
    assert [line.split(";")[0] for line in lines(capsys)] == ["[0:00:00] 99 %, 0:00:00 left"]


@pytest.mark.parametrize("level", Level)
def test_levels(level: Level, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Board(level) as board:
        for _ in range(2):
            board.report(Progress(run="a", note="mind the step"))
        board.report(
            Progress(run="a", done={ROUND: 1}, left={ROUND: 1}, text="now", detail="a round in 3 s")
        )
    expected = ["note: mind the step", "[0:00:00] a: a round in 3 s", "[0:00:00] a: now",
                "done in 0:00:00"]  # fmt: skip
    wanted = {Level.QUIET: [], Level.NORMAL: [0, 2, 3], Level.VERBOSE: [0, 1, 2, 3]}[level]
    assert lines(capsys) == [expected[n] for n in wanted]


def test_a_terminal_has_a_bar_for_all_and_one_for_each_run_at_work() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Board(console=console) as board:
        work = [at(n, rounds=9, images=0, seconds={ROUND: 60}, like="d3po") for n in "abc"]
        board.expect(work, 1)
        board.report(at("a", rounds=8, images=0, seconds={ROUND: 60}, done=1, like="d3po"))
        board.report(at("b", rounds=0, images=0, seconds={ROUND: 60}, done=9, like="d3po"))
        view = board.view
        assert isinstance(view, shown._Bars)
        tasks = {task.fields["name"]: task for task in view.bars.tasks}
        assert [*tasks] == ["all", "a"]
        assert tasks["all"].fields["percent"] == "37 %"
        assert tasks["a"].fields["percent"] == "11 %"
        view.bars.refresh()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0:16:59 left" in output or "0:17:00 left" in output
    assert "1 of 3 runs done" in output


# ---- runs


def test_a_run_tells_what_it_does_and_what_it_took(command: Command, micro: Path) -> None:
    done = command(*run_of(micro, "-v", "--seeds", "2", "--jobs", "1"))
    told = [line.partition("] ")[2] for line in done.err.splitlines() if line.startswith("[")]
    for seed in (0, 1):
        stages = [line for line in told if re.match(rf"seed {seed}: .* \d+\.\d s\b", line)]
        names = [re.split(" in |: ", line.removeprefix(f"seed {seed}: "))[0] for line in stages]
        assert names == ["loaded", "evaluated after round 0", "round 1/2",
                         "evaluated after round 2", "round 2/2"]  # fmt: skip
        assert "held-out gain" not in stages[2]
        assert "held-out gain" in stages[4]
        assert "reward" in stages[4]
    assert "\ndone in 0:00:" in done.err


def test_what_was_kept_or_has_just_begun_tells_nothing_of_the_time_left(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second seed finds the base evaluation of the first, and has no round behind it yet."""
    told: list[Progress] = []
    monkeypatch.setattr(Board, "report", lambda self, progress: told.append(progress))
    assert command(*run_of(micro, "--seeds", "2", "--jobs", "1")).code == 0
    second = [p for p in told if p.run.endswith("seed 1")]
    first_round = [p for p in second if p.text.startswith("round 1/2") and p.done[ROUND] < 1]
    assert first_round[0].done[ROUND] == 0
    assert not {ROUND, IMAGE} & first_round[0].seconds.keys()
    # Half of a round in no time would be a round in no time.
    assert all(p.seconds[ROUND] > 0.01 for p in first_round if p.done[ROUND] > 0)
    assert IMAGE not in first_round[-1].seconds
    assert second[-1].seconds[IMAGE] > 0


def test_a_quiet_run_prints_its_result_alone(command: Command, micro: Path) -> None:
    done = command(*run_of(micro, "-q", rounds=1))
    assert done.err == ""
    assert done.out.splitlines()[0].startswith("method  objective")


def test_a_resumed_run_begins_where_it_was(
    command: Command, micro: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Progress] = []
    monkeypatch.setattr(Board, "report", lambda self, progress: told.append(progress))
    assert command(*run_of(micro, rounds=3)).code == 0
    first = next(p for p in told if not p.left[START])
    assert (first.done[ROUND], first.left[ROUND], first.left[IMAGE]) == (2, 1, 4)
    assert set(first.seconds) == {START, ROUND, IMAGE}
    assert first.gain is not None
    assert told[-1].finished
