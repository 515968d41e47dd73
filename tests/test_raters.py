"""What simulated raters left, on its way to what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from d3po_bench.errors import UserError
from d3po_bench.feedback import simulated, training
from d3po_bench.feedback.sampling import Sampling
from d3po_bench.runs.files import read_csv
from results import feedback, raters, tries


def test_rounds_and_choices_go_to_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, home = tmp_path / "runs", tmp_path / "home"
    monkeypatch.setattr(feedback, "HERE", home)
    monkeypatch.setattr(raters, "HERE", home)
    for name in ("normalcy", "normalcy-kto", "safety2"):
        rates = runs / name / "error-0.2" / "seed-3" / "rates.csv"
        rates.parent.mkdir(parents=True)
        rates.write_text("round,good\n0,0.5\n")
    for of in ("error-0", "error-0.2", "error-0-by-geneval_second-at-0.25"):
        choices = runs / "preference" / of / "choices" / "seed-0.csv"
        choices.parent.mkdir(parents=True)
        choices.write_text(of)
        choices.parents[1].joinpath("seed-0.csv").write_text(f"model,share\n{of},1\n")

    CliRunner().invoke(raters.collect, [str(runs)], catch_exceptions=False)

    found = {h: [r["experiment"] for r in read_csv(home / h / "feedback" / "rounds.csv")]
             for h in ("tiny", "tiny2")}  # fmt: skip
    assert found == {"tiny": ["normalcy", "normalcy-kto"], "tiny2": ["safety2"]}
    shares = read_csv(home / "tiny" / "feedback" / "preference.csv")
    assert [(row["error"], row["model"]) for row in shares] == [
        ("0", "error-0"),
        ("0.2", "error-0.2"),
    ]
    chosen = {h: (home / h / "table1" / "choices" / "seed-0.csv").read_text()
              for h in ("tiny", "alignment")}  # fmt: skip
    assert chosen == {"tiny": "error-0", "alignment": "error-0-by-geneval_second-at-0.25"}


@pytest.mark.parametrize("experiment", feedback.QUESTIONS["tiny2"])
def test_what_is_played_on_version_2_has_the_settings_that_the_tries_chose(experiment: str) -> None:
    assert raters.EXPERIMENTS[experiment].learning == {"d3po": tries.chosen(experiment)}


def test_a_try_that_loses_the_animals_in_one_seed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tries.csv"
    monkeypatch.setattr(tries, "path_of", lambda home, name: path)
    ends = {0: ((0.3, 0.8), (0.3, 0.75)), 1: ((0.9, 0.8), (0.9, 0.69)), 2: ((0.2, 1), (0.2, 1))}
    lines = [f"safety2,{index},{seed},{at},{good},{known}" for index, seeds in ends.items()
             for seed, end in zip(tries.SEEDS, seeds, strict=True)
             for at, (good, known) in enumerate([(0.1, 1.0), end])]  # fmt: skip
    path.write_text("\n".join(["experiment,try,seed,round,good,recognised", *lines]))
    assert tries.chosen("safety2") == tries.TRIES[0]
    path.write_text("\n".join(["experiment,try,seed,round,good,recognised", *lines[4:8]]))
    assert tries.chosen("safety2") == tries.TRIES[1]  # none keeps them


def test_a_play_that_ended_for_want_of_tags_keeps_its_last_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(said: str) -> list[dict[str, str]]:
        of = {"0": ("0.5", "0.9", "1"), "1": ("0.5", said)}
        return [{"experiment": "safety2", "seed": seed, "round": str(at), "said_good": good,
                 "good": good}
                for seed, course in of.items() for at, good in enumerate(course)]  # fmt: skip

    monkeypatch.setattr(feedback, "_rows", lambda name: rows("1"))
    assert feedback._by_seed("rounds", "good")["1"] == {"0": 0.5, "1": 1, "2": 1}
    monkeypatch.setattr(feedback, "_rows", lambda name: rows("0.99"))
    with pytest.raises(UserError, match="Seed 1 of rounds"):
        feedback._by_seed("rounds", "good")


def test_a_play_ends_where_all_votes_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise training.TiesError("All votes are ties.")

    nothing = dict.fromkeys(("draw_round", "scores_of"), lambda *given, **named: None)
    for name, stub in nothing.items():
        monkeypatch.setattr(raters, name, stub)
    monkeypatch.setattr(raters, "_rates", lambda *given: {"said_good": 1.0, "good": 0.5})
    monkeypatch.setattr(raters, "untrained", lambda *given: 0.25)
    monkeypatch.setattr(Sampling, "read", lambda place: None)
    monkeypatch.setattr(simulated, "simulate", lambda *given, **named: None)
    monkeypatch.setattr(training, "data_of", lambda *given: None)
    monkeypatch.setattr(training, "train", refuse)
    said = CliRunner().invoke(raters.rounds, ["captions2", "--out", str(tmp_path)])
    assert (said.exit_code, "The play ends here. All votes are ties." in said.output) == (0, True)
    (rates,) = tmp_path.rglob("rates.csv")
    assert [(row["round"], row["base"]) for row in read_csv(rates)] == [("0", "0.25")]
