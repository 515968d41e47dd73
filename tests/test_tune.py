"""A search: as many trials for each method, one rule, resumed to the same bytes."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from d3po_bench import config as configs
from d3po_bench.errors import RunError, TryAgainError, UserError
from d3po_bench.launch import launch, tune
from d3po_bench.launch.launch import RunRequest
from d3po_bench.launch.progress import Board, Level
from d3po_bench.launch.rule import Rule, Seen
from d3po_bench.launch.space import (
    REFINED,
    SPREAD,
    Space,
    rescaled,
    settings_of,
    space_of,
    spread,
)
from d3po_bench.launch.state import State
from d3po_bench.launch.tune import TuneRequest
from d3po_bench.training.run import Job
from eval.tools import TOOLS
from tests.commands import Command, refused


def test_the_rule_is_the_mean_gain_within_bounds() -> None:
    seeds = [Seen(gain=0.25, recognised=0.9, drift=1.0), Seen(gain=0.75, recognised=0.8, drift=2.0)]
    assert Rule().worth(seeds) == 0.5
    assert Rule(recognised=0.8, drift=2.0).worth(seeds) == 0.5
    assert Rule(recognised=0.81).worth(seeds) is None
    assert Rule(drift=1.5).worth(seeds) is None
    assert Rule(recognised=0.81).broken(seeds[1]) == "recognised 0.800, below 0.81"
    nothing = Seen(gain=0.5, recognised=math.nan, drift=math.nan)
    assert Rule().broken(nothing) == ""
    assert Rule(recognised=0.5).broken(nothing) == "recognised nan, below 0.5"
    assert Rule().broken(replace(nothing, gain=math.nan)) == "no gain was measured"


def space(method: str, **given: str) -> Space:
    return space_of(configs.make(method, "incompress", "quick", {})[0], given)


def test_what_is_searched() -> None:
    assert space("ddpo") == {
        "learning_rate": (1e-4, 1e-2), "updates_per_round": [1, 2, 4, 8, 16],
        "images_per_prompt": [2, 4, 8], "skip_steps": [0, 2, 5], "shared_noise": [False, True],
        "clip_range": (1e-3, 0.5),
    }  # fmt: skip
    # What makes a variant itself stays; what the command line gives, too.
    assert space("ddpo").keys() - space("grpo").keys() == {"images_per_prompt", "shared_noise"}
    assert "skip_steps" not in space("ddpo", skip_steps="5")
    assert "timestep_fraction" in space("raft")
    assert "skip_steps" not in space("raft")
    # A range that only a variant has is searched.
    anchored = space("reward_weighted_anchor").keys() - space("reward_weighted").keys()
    assert anchored == {"anchor"}


def test_a_round_has_as_many_images_whatever_their_number_of_a_prompt() -> None:
    config = configs.make("d3po", "incompress", "quick", {})[0]
    found = settings_of({"images_per_prompt": 2, "learning_rate": 0.00123456}, config)
    expected = {"images_per_prompt": "2", "prompts_per_round": "64", "learning_rate": "0.00123"}
    assert found == expected
    for method, prompts in (("d3po_of_two", "16"), ("grpo", "4"), ("ddpo", "4")):
        config = configs.make(method, "incompress", "quick", {})[0]
        assert settings_of({}, config, images=32)["prompts_per_round"] == prompts


def test_the_first_trials_cover_the_space_at_the_same_rates_for_all_methods() -> None:
    for method in ("ddpo", "grpo", "reward_weighted_anchor", "raft"):
        trials = [spread(space(method), n, 0) for n in range(SPREAD)]
        rates = [10 ** (-4 + (place + 0.5) / 4) for place in range(SPREAD)]
        assert sorted(trial["learning_rate"] for trial in trials) == pytest.approx(rates)
        usual = [spread(space("ddpo"), n, 0) for n in range(SPREAD)]
        assert all(trial[name] == other[name] for trial, other in zip(trials, usual, strict=True)
                   for name in ("learning_rate", "updates_per_round"))  # fmt: skip
    assert spread(space("ddpo"), 0, 1) != spread(space("ddpo"), 0, 0)


@pytest.mark.parametrize("method", ["ddpo", "grpo", "reward_weighted_anchor", "d3po_of_two"])
def test_no_option_goes_with_high_rates_or_with_low_ones(method: str) -> None:
    trials = [spread(space(method), n, 0) for n in range(SPREAD)]
    high = [trial["learning_rate"] > 1e-3 for trial in trials]
    for name, of in space(method).items():
        middle = math.sqrt(of[0] * of[1]) if isinstance(of, tuple) else of[len(of) // 2]
        upper = [trial[name] >= middle for trial in trials]
        if name != "learning_rate":
            assert {*zip(high, upper, strict=True)} == {*product((False, True), repeat=2)}


class Made:
    """Stands for the runs of a search, which here end at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: dict[Path, Job] = {}
        self.failed: set[Path] = set()
        self.calls, self.stop_at = 0, -1
        monkeypatch.setattr(launch, "execute", self.execute)
        monkeypatch.setattr(tune, "read_state", self.state)

    def execute(self, jobs: Sequence[Job], *_: Any, **__: Any) -> dict[str, UserError]:
        assert jobs  # a place has a run to make
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.done |= {job.folder: job for job in jobs}
        hot = [job for job in jobs if job.config.learning_rate > 5e-3]
        self.failed |= {job.folder for job in hot}
        return {job.called: RunError("The update is not finite.") for job in hot}

    def state(self, folder: Path, config: Any) -> State:
        if folder in self.failed:
            return State(config, "failed", 0, why="The update is not finite.")
        return State(config, "finished" if folder in self.done else "not begun", 0)

    def measure(self, folder: Path) -> Mapping[str, float]:
        """Best at a rate of 1e-3; what follows the objective is added to a drift of 1."""
        config = self.done[folder].config
        reward = 0.5 - (math.log10(config.learning_rate) + 3) ** 2 + 0.01 * config.seed
        gain = 1 + reward if config.objective == "incompress" else 1 - reward
        known = 0.9 if config.updates_per_round < 16 else 0.5
        return {"gain": gain, "recognised": known, "drift": 0.1}


def request(made: Made, out: Path, **changes: Any) -> TuneRequest:
    run = RunRequest(
        method="d3po", objective="incompress", model="tiny", preset="quick", settings={},
        seeds=range(1), device="cpu", out=out, tools=TOOLS,
    )  # fmt: skip
    usual: dict[str, Any] = {
        "methods": ["d3po", "grpo"], "seeds": [901, 902], "trials": 8, "run": run,
        "rule": Rule(recognised=0.8), "measure": made.measure,
    }  # fmt: skip
    return TuneRequest(**usual | changes)


def search(asked: TuneRequest) -> list[dict[str, str]]:
    table, _ = tune.run(asked, Board(Level.QUIET))
    with table.open() as file:
        return list(csv.DictReader(file))


def test_every_method_has_as_many_trials_and_each_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)
    rows = search(request(made, tmp_path))
    assert [row["method"] for row in rows] == ["d3po"] * 8 + ["grpo"] * 8
    assert {row["state"] for row in rows} == {"complete", "pruned", "fail"}
    for row in rows:
        if row["state"] == "complete":
            # The mean of both seeds, whose gains differ by 0.01.
            gains = [float(row[f"gain, seed {seed}"]) for seed in (901, 902)]
            assert float(row["value"]) == pytest.approx(sum(gains) / 2)
            assert float(row["learning_rate"]) <= 5e-3
        elif row["state"] == "pruned":
            assert row["why"] == "recognised 0.500, below 0.8"
            assert (row["gain, seed 902"], row["updates_per_round"]) == ("", "16")
        else:
            assert row["why"] == "The update is not finite."
        assert (row["chosen"] == "yes") == (
            row["value"] == max((r["value"] for r in rows if r["method"] == row["method"]), key=key)
        )


def key(text: str) -> float:
    return float(text or "-inf")


def test_a_killed_search_goes_on_to_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)
    small: dict[str, Any] = {"methods": ["d3po"], "trials": 12}
    search(request(made, tmp_path / "whole", **small))
    for made.stop_at in (2, 3, 1):  # among the first eight, the next four, before anything new
        made.calls = 0
        with pytest.raises(KeyboardInterrupt):
            search(request(made, tmp_path / "killed", **small))
    made.stop_at = -1
    with (tmp_path / "killed" / "trials.log").open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # killed while it wrote, with Optuna's lock
    (tmp_path / "killed" / "trials.log.lock").symlink_to("trials.log")
    search(request(made, tmp_path / "killed", **small))
    ours, theirs = (tmp_path / n / "trials.csv" for n in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    before = made.calls
    search(request(made, tmp_path / "whole", **small))
    assert made.calls == before  # nothing is left to do
    more = search(request(made, tmp_path / "whole", methods=["grpo"], trials=1))
    assert [row["method"] for row in more] == ["grpo"]


def test_a_kill_while_a_trial_is_asked_for_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)
    few: dict[str, Any] = {"methods": ["d3po"], "trials": 2}
    search(request(made, tmp_path / "whole", **few))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("optuna.Study.ask", killed)  # what was to be asked for waits in the study
        with pytest.raises(KeyboardInterrupt):
            search(request(made, tmp_path / "killed", **few))
    search(request(made, tmp_path / "killed", **few))
    ours, theirs = (tmp_path / n / "trials.csv" for n in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_after_the_first_trials_others_are_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rates of one, then Optuna's: the same, asked for at once or later."""
    made = Made(monkeypatch)
    rows = search(request(made, tmp_path / "once", methods=["d3po"], trials=14))
    assert len({row["learning_rate"] for row in rows}) == 14
    best = max((row for row in rows[:SPREAD]), key=lambda row: key(row["value"]))
    rates = [float(row["learning_rate"]) for row in rows[SPREAD:12]]
    factors = [rate / float(best["learning_rate"]) for rate in rates]
    assert factors == pytest.approx([2 ** (n / 2) for n in (1, 2, 3, 4)], rel=0.01)
    assert {row["updates_per_round"] for row in rows[SPREAD:12]} == {best["updates_per_round"]}
    for trials in (8, 10, 13):
        assert search(request(made, tmp_path / "later", methods=["d3po"], trials=trials)) != rows
    assert search(request(made, tmp_path / "later", methods=["d3po"], trials=14)) == rows


def test_the_most_promising_trial_is_within_reach_of_the_bounds() -> None:
    rule = Rule(recognised=0.4, drift=0.05)
    far = [Seen(gain=0.9, recognised=0.19, drift=0.01)]  # less than half of what is asked
    near = [Seen(gain=0.5, recognised=0.3, drift=0.09)]
    good = [Seen(gain=0.3, recognised=0.4, drift=0.05)]
    assert rule.promising([far, good, near, []]) == (2, True)
    assert rule.promising([far, good, []]) == (1, False)
    assert rule.promising([[], far]) == (1, True)
    assert rule.misses(Seen(gain=math.nan, recognised=0.9, drift=0.0)) == math.inf
    assert rule.misses(Seen(gain=0.5, recognised=math.nan, drift=0.0)) == math.inf


@pytest.mark.parametrize(
    ("rate", "lower", "ratio"), [(2e-4, True, 2**-0.25), (1e-3, False, 2**0.5)]
)
def test_other_rates_stay_in_the_range(rate: float, lower: bool, ratio: float) -> None:
    whole: Space = {"learning_rate": (1e-4, 1e-2)}
    found = [rescaled(whole, {"learning_rate": rate}, n, lower=lower) for n in range(REFINED)]
    expected = [rate * ratio ** (n + 1) for n in range(REFINED)]
    assert [point["learning_rate"] for point in found] == pytest.approx(expected)


def test_against_the_other_sign_drift_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)
    rows = search(request(made, tmp_path, against="compress", methods=["d3po"], trials=4))
    known = [row for row in rows if row["state"] == "complete"]
    assert known
    for row in known:
        rate = math.log10(float(row["learning_rate"]))
        # incompress grows by 1 + r, compress by 1 - r: half the difference is r.
        assert float(row["value"]) == pytest.approx(0.5 - (rate + 3) ** 2 + 9.015)


def test_another_search_in_the_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)
    search(request(made, tmp_path, trials=1, methods=["d3po"]))
    with pytest.raises(UserError, match=r"another search: its seeds differ for d3po\. Give anothe"):
        search(request(made, tmp_path, trials=1, methods=["d3po"], seeds=[901]))
    with pytest.raises(UserError, match=r"its images differ for d3po"):
        search(request(made, tmp_path, trials=1, methods=["d3po"], images=32))
    with pytest.raises(UserError, match=r"--images is 20\. Give a multiple of 8, the most images"):
        search(request(made, tmp_path, images=20))
    with pytest.raises(UserError, match=r"aesthetic is not incompress with the other sign"):
        search(request(made, tmp_path, against="aesthetic"))


def test_what_is_no_fault_of_a_trial_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)

    def stopped(jobs: Sequence[Job], *_: Any, **__: Any) -> dict[str, UserError]:
        return {jobs[0].called: TryAgainError("Stopped after round 3.")}

    monkeypatch.setattr(launch, "execute", stopped)
    with pytest.raises(TryAgainError, match=r"trial 0 of d3po incompress seed 901: Stopped after"):
        search(request(made, tmp_path, methods=["d3po"]))
    made = Made(monkeypatch)
    assert len(search(request(made, tmp_path, methods=["d3po"]))) == 8


def test_a_protocol_file_and_its_faults(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "protocol.toml"
    said = ["tune", "--protocol", str(path), "--out", str(tmp_path / "out")]
    for text, fault in (
        ("[tune]\nmethod = ['d3po']", "No key of [tune] in"),
        ("[run]", "has no TOML table [tune]"),
        (
            "[tune]\nmethods = ['d3po']\nobjective = 'incompress'\nseeds = [1, 1]",
            "no list of seeds",
        ),
        (
            "[tune]\nmethods = ['d4po']\nobjective = 'incompress'\nseeds = [1]",
            "Did you mean 'dpok'",
        ),
    ):
        path.write_text(text)
        refused(command(*said), fault)
    assert not (tmp_path / "out").exists()


def test_the_command_line_adds_to_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    asked = list[TuneRequest]()

    def kept(request: TuneRequest, board: Board) -> tuple[Path, list[dict[str, Any]]]:
        asked.append(request)
        return tmp_path, []

    monkeypatch.setattr(tune, "run", kept)
    path = tmp_path / "protocol.toml"
    path.write_text(
        "[tune]\nmethods = ['d3po', 'ddpo']\nobjective = 'incompress'\nseeds = [901]\n"
        "settings = ['rounds=16', 'guidance=1']"
    )
    said = ["tune", "--protocol", str(path), "--method", "ddpo"]
    found = command(*said, "--set", "micro_batch=8", "--set", "rounds=2")
    assert found.code == 0, found.err
    assert asked[0].methods == ("ddpo",)
    assert asked[0].run.settings == {"rounds": "2", "guidance": "1", "micro_batch": "8"}


def test_trials_whose_runs_are_gone_are_no_base_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(request(Made(monkeypatch), tmp_path, methods=["d3po"]))
    with pytest.raises(UserError, match=r"has a trial 0 of d3po, but .* has no runs of it"):
        search(request(Made(monkeypatch), tmp_path, methods=["d3po"], trials=12))


@pytest.mark.slow
def test_two_trials_of_two_methods(tmp_path: Path, command: Command) -> None:
    small = ("rounds=1", "sampling_steps=6", "prompts_per_round=2", "eval_prompts=3")
    said = ["tune", "--method", "d3po", "--method", "raft", "--objective", "incompress"]
    said += ["--against", "compress", "--trials", "2", "--seeds", "901", "--jobs", "2"]
    said += [part for text in small for part in ("--set", text)]
    found = command(*said, "--out", str(tmp_path))
    assert found.code == 0, found.err
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["d3po", "d3po", "raft", "raft"]
    assert all(float(row["value"]) == float(row["gain, seed 901"]) for row in rows)
    assert "[method.raft]" in found.out
