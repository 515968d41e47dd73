"""The reader of run folders: what is typed, what is kept, and what is not taken on trust."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.runs.run import JOURNAL, RunFolder, find_runs
from tests.commands import PUBLISHED

HEAD = "round,sampler,prompt,index,score,animal\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PUBLISHED, tmp_path / "seed-0"))


def test_what_is_published_is_read() -> None:
    run = RunFolder(PUBLISHED)
    assert isinstance(run.config, RunConfig)
    assert (run.config.method, run.config.seed, run.config.rounds) == ("d3po", 0, 12)
    assert run.config.lora_targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert run.recorded["run_id"] == run.config.run_id
    assert [line["round"] for line in run.metrics] == list(range(1, 13))
    assert len(run.timing) == 12
    assert run.finished
    run.require_content()


def test_evaluation_rows_are_typed_and_their_text_is_kept(folder: Path) -> None:
    (folder / "eval.csv").write_text(HEAD + '0,eta1,"a ""b"", c",0,7.250,\n0,eta0,NA,1,nan,0.5\n')
    run = RunFolder(folder)
    first, second = run.evaluation
    assert first | {"animal": 0} == {
        "round": 0, "sampler": "eta1", "prompt": 'a "b", c', "index": 0, "score": 7.25, "animal": 0
    }  # fmt: skip
    assert math.isnan(first["animal"])
    assert math.isnan(second["score"])
    assert (second["prompt"], second["index"], second["animal"]) == ("NA", 1, 0.5)
    assert [row["score"] for row in run.table] == ["7.250", "nan"]


def test_what_is_not_there_yet_is_empty(folder: Path) -> None:
    for name in ("metrics.jsonl", "timing.jsonl", "eval.csv", "provenance.json"):
        (folder / name).unlink()
    run = RunFolder(folder)
    assert (run.metrics, run.timing, run.evaluation, run.facts) == ([], [], [], {})
    assert not run.finished


def test_a_file_is_read_once(folder: Path) -> None:
    run = RunFolder(folder)
    before = run.config, run.metrics, run.evaluation
    shutil.rmtree(folder)
    assert (run.config, run.metrics, run.evaluation) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "0,eta1,cat,0,7.0,\n0,eta1,cat,0,7.0,\n", "two rows of one image: (0, 'eta1'"),
        (HEAD + "0,eta1,cat,0,7.0,\n0,eta1,dog,0,7.0,\n0,eta0,cat,0,7.0,\n",
         "1 of 2 images of round 0, sampler eta0"),
        (HEAD + "0,eta1,cat,0,7.0,\n3,eta0,cat,0,7.0,\n", "0 of 1 images of round"),
        (HEAD + "0.5,eta1,cat,0,7.0,\n", "'0.5' is not a whole number from 0 as round"),
        (HEAD + "0,eta1,cat,-1,7.0,\n", "'-1' is not a whole number from 0 as index"),
        (HEAD + "0,eta1,cat,0,inf,\n", "an infinite score"),
        (HEAD + "0,eta1,cat,0,7.0\n", "more or fewer values than columns"),
        ("round,sampler,prompt,score\n0,eta1,cat,7.0\n", "no column index"),
        (HEAD + "0,eta1,cat,0,7.0,0.5", "half a line at its end"),
    ],
)  # fmt: skip
def test_an_evaluation_that_no_run_writes_is_refused(folder: Path, text: str, said: str) -> None:
    (folder / "eval.csv").write_text(text)
    with pytest.raises(UserError) as told:
        _ = RunFolder(folder).evaluation
    assert f"{folder / 'eval.csv'} cannot be read: " in str(told.value)
    assert said in str(told.value)


def test_a_round_left_out_or_twice_is_refused(folder: Path) -> None:
    for numbers, said in (((1, 3), "line 2 is of round 3"), ((1, 1), "line 2 is of round 1")):
        lines = [json.dumps({"round": number}) + "\n" for number in numbers]
        (folder / "timing.jsonl").write_text("".join(lines))
        with pytest.raises(UserError, match=said):
            _ = RunFolder(folder).timing


def test_a_changed_file_of_a_finished_run_is_named(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing or was changed"):
        RunFolder(folder).require_content()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing or was changed"):
        RunFolder(folder).require_content()


def test_runs_are_found_at_any_depth_each_once(tmp_path: Path) -> None:
    places = [tmp_path / "b", tmp_path / "a" / "deep" / "er", tmp_path / "a"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").touch()
    found = find_runs([tmp_path, tmp_path / "a", tmp_path / "a" / ".." / "b"])
    assert sorted(run.folder.resolve() for run in found) == sorted(places)
    assert find_runs([tmp_path / "nowhere"]) == []


def test_trials_of_a_search_are_found_where_it_is_named(tmp_path: Path) -> None:
    trial, run = tmp_path / "runs" / "tune" / "trial-000", tmp_path / "runs" / "tiny"
    for place in (trial, run):
        place.mkdir(parents=True)
        (place / "config.json").touch()
    (trial.parent / JOURNAL).touch()
    (run.parent / "trials.csv").touch()
    assert [found.folder for found in find_runs([run.parent])] == [run]
    for named in (trial.parent, trial):
        assert [found.folder for found in find_runs([named])] == [trial]
        assert [found.folder for found in find_runs([run.parent, named])] == [run, trial]
    assert [found.folder for found in find_runs([run.parent], trials=True)] == [run, trial]
