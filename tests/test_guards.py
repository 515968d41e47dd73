"""What must stop a run or a table before it becomes a wrong number."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po_bench.cli import main, show
from d3po_bench.config import FEEDBACK
from d3po_bench.diffusion.finite import require_finite
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.errors import RunError, UserError
from d3po_bench.models.sources import fingerprint, model_source
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.prompts import digest, read_prompts
from d3po_bench.runs.run import RunFolder, content, find_runs
from d3po_bench.training.trainer import Trainer
from eval import golden
from eval.analysis.runs import read_groups
from eval.evaluate import plan
from eval.scorers import _clip
from eval.scorers.jpeg_size import JpegSize
from tests.commands import PUBLISHED, Command, refused, run_of
from tests.gallery import gallery
from tests.made_up import write_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def called(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run the micro model for two rounds; exit status and the error."""
    monkeypatch.chdir(tmp_path)

    def call(**settings: Any) -> tuple[int, str]:
        code = 0
        try:
            main(run_of(micro, **settings))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err.splitlines()[-1]

    return call


Called = Callable[..., tuple[int, str]]


def poisoned(target: Any, when: Callable[[], bool], value: float) -> Any:
    """The function, one of whose numbers is `value` from the moment that `when` holds."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = target(*args, **kwargs)
        if when():
            found = found.clone()
            found.view(-1)[0] = value
        return found

    return call


class Rounds:
    """Which round a run is in, for `poisoned`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        begin = Trainer.train_round

        def counted(trainer: Trainer, *args: Any) -> Any:
            self.now = trainer.round + 1
            return begin(trainer, *args)

        monkeypatch.setattr(Trainer, "train_round", counted)

    def second(self) -> bool:
        return self.now == 2


# ---- NaN and infinity


@pytest.mark.parametrize(
    "value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)]
)
def test_a_network_that_says_nan_stops_the_run(
    called: Called, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    rounds = Rounds(monkeypatch)
    output = poisoned(StableDiffusion.output, rounds.second, value)
    monkeypatch.setattr(StableDiffusion, "output", output)
    code, error = called(eval_every=0)
    assert code == 1
    assert "Round 2, seed 0: NaN or infinity in the means of the denoising steps" in error
    assert len(Path().rglob("metrics.jsonl").__next__().read_text().splitlines()) == 1


def test_a_score_of_nan_stops_the_run(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    wrong = poisoned(JpegSize.__call__, rounds.second, float("nan"))
    monkeypatch.setattr(JpegSize, "__call__", wrong)
    code, error = called(eval_every=0)
    assert code == 1
    assert "Round 2, seed 0: The scorer jpeg_size returned nan" in error


def test_an_evaluation_score_of_nan_stops_the_run(
    called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "check", lambda name, scorer: True)
    wrong = poisoned(JpegSize.__call__, lambda: True, float("nan"))
    monkeypatch.setattr(JpegSize, "__call__", wrong)
    code, error = called()
    assert code == 1
    assert "Evaluation after round 0, seed 0: The scorer jpeg_size returned nan for 1 of 2" in error
    assert not list(Path().rglob("eval.csv"))


@pytest.mark.parametrize(
    ("settings", "round_"),
    [
        ({}, 1),
        pytest.param({"dtype": "fp16", "prompts_per_round": 20}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_of_nan_names_its_weight(
    settings: dict[str, Any], round_: int, called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With loss scaling after 17 updates: before, the scale might have been too large."""
    add_adapter = StableDiffusion.add_adapter

    def broken(model: StableDiffusion, seed: int) -> None:
        add_adapter(model, seed)
        weight = list(model.trainable().values())[3]
        weight.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(StableDiffusion, "add_adapter", broken)
    code, error = called(eval_every=0, **settings)
    assert code == 1
    assert f"Round {round_}, seed 0" in error
    assert "nan for grad_norm, first in " in error
    assert "lora_" in error


def test_a_kl_that_is_infinite_stops_the_run(
    called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of means that are finite: their squares need not be."""
    rounds = Rounds(monkeypatch)
    monkeypatch.setattr(Gaussian, "kl", poisoned(Gaussian.kl, rounds.second, float("inf")))
    code, error = called(eval_every=0)
    assert code == 1
    assert (
        "Round 2, seed 0: NaN or infinity in the kl of the steps to the pretrained model" in error
    )
    assert len(Path().rglob("metrics.jsonl").__next__().read_text().splitlines()) == 1


def test_an_evaluation_kl_of_nan_stops_the_run(
    called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl = poisoned(Gaussian.kl, lambda: True, float("nan"))
    monkeypatch.setattr("eval.measure.Gaussian", type("Poisoned", (Gaussian,), {"kl": kl}))
    code, error = called(eval_every=1)
    assert code == 1
    assert "Evaluation after round 1, seed 0: NaN or infinity in the evaluation kl" in error
    rows = next(Path().rglob("eval.csv")).read_text().splitlines()[1:]
    assert {row.partition(",")[0] for row in rows} == {"0"}


@pytest.mark.parametrize("units", [pytest.param(1000, marks=pytest.mark.slow), 1])
def test_weights_of_nan_are_named_and_not_written(called: Called, units: int) -> None:
    """Adam without epsilon divides the first LoRA factor's gradient of 0 by 0.

    In the only step of the last round, after which no loss is computed, or in the first of two.
    """
    code, error = called(rounds=1, eval_every=0, units_per_update=units, adam_epsilon=0)
    assert code == 1
    assert "Round 1, seed 0: NaN or infinity in the weights " in error
    assert "lora_A" in error
    assert "after an optimizer step: " in error
    assert not list(Path().rglob("*.safetensors"))
    assert not list(Path().rglob("metrics.jsonl"))


def test_a_reference_of_nan_is_named() -> None:
    values = torch.tensor([1.0, float("nan"), float("-inf")])
    with pytest.raises(RunError, match="NaN or infinity in the latents: 2 of 3 numbers"):
        require_finite("latents", values)
    require_finite("latents", values[:1])


# ---- scorers


def test_a_scorer_that_changed_stops_the_run_before_the_first_round(
    called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = JpegSize.__call__
    monkeypatch.setattr(JpegSize, "__call__", lambda *args: score(*args) * 1.5)
    code, error = called()
    assert code == 2
    assert "The scorer jpeg_size (jpeg_size) gives" in error
    assert not Path("runs").exists()


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A CLIP of one's own by its name on the command line: no golden scores are of its weights."""
    folder = shutil.copytree(_clip.EMBEDDED / "clip", tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    save_file(
        {n: t * 1.01 for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return f"clip:{folder}"


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_scorer_without_golden_scores_is_named_and_recorded(
    jobs: int, own: str, micro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    more = ("--seeds", "2", "--jobs", str(jobs), "--out", str(out))
    main(run_of(micro, *more, rounds=1, eval_scorers=own))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert told == [f"note: {golden.note([own])}"]
    runs = [path.parent for path in out.rglob("provenance.json")]
    assert [RunFolder(run).facts["unchecked_scorers"] for run in runs] == [[own], [own]]
    assert dict(show.known(runs[0]))["inputs"]["without golden scores"] == own


def test_a_run_whose_scorers_were_all_checked_says_so(micro: Path, tmp_path: Path) -> None:
    main(run_of(micro, "--out", str(tmp_path / "runs"), rounds=1, eval_scorers="animal"))
    (path,) = (tmp_path / "runs").rglob("provenance.json")
    assert RunFolder(path.parent).facts["unchecked_scorers"] == []


def test_an_evaluation_names_scorers_without_golden_scores(
    own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gallery(tmp_path / "pictures", 2)
    main(["evaluate", str(folder), "--scorers", f"jpeg_size,{own}"])
    assert capsys.readouterr().err.count(f"note: {golden.note([own])}\n") == 1
    facts = json.loads((folder / "evaluation" / "provenance.json").read_text())
    assert facts["unchecked_scorers"] == [own]


def with_scorer(folder: Path, weights: str) -> None:
    facts = {"inputs": {"scorers": {"aesthetic": weights}}, "packages": {}}
    (folder / "provenance.json").write_text(json.dumps(facts))


def test_runs_of_other_scorer_weights_are_not_put_together(tmp_path: Path) -> None:
    for seed in (0, 1):
        with_scorer(write_run(tmp_path, seed=seed), "aaa")
    assert len(read_groups([tmp_path])) == 1
    with_scorer(write_run(tmp_path, method="ddpo"), "bbb")
    with pytest.raises(
        UserError, match=r"version of the scorer aesthetic: it is 'aaa' in .* and 'bbb' in"
    ):
        read_groups([tmp_path])


# ---- prompts


def run_on(folder: Path, prompts: str, model: str = "tiny", **changes: Any) -> Path:
    """A run that ended, of an embedded model, as far as `evaluate` looks at it."""
    shutil.copytree(PUBLISHED, folder)
    (folder / "lora").mkdir()
    (folder / "lora" / "weights").write_bytes(b"of a LoRA")
    config = json.loads((folder / "config.json").read_text())
    changes |= {"prompts": prompts, "model": model}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    facts = json.loads((folder / "provenance.json").read_text())
    facts["inputs"]["prompts"] = digest(read_prompts(prompts))
    facts["inputs"]["model"] = fingerprint(model_source(model))
    facts["content"] = content(folder, "lora")
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def planned(run: Path, prompts: str | None = None) -> plan.Plan:
    return plan.planned(
        plan.EvaluateRequest(
            target=run, scorers=("jpeg_size",), model=None, prompts=prompts, count=None, images=1,
            steps=2, guidance=None, device="cpu", jobs=1, out=None,
        )
    )  # fmt: skip


def test_the_held_out_list_holds_nothing_that_is_trained_on() -> None:
    held_out = set(read_prompts("captions-held-out"))
    for name in ("captions", "animals"):
        assert not held_out & set(read_prompts(name))


@pytest.mark.parametrize("prompts", [None, "captions-held-out"])
def test_held_out_prompts_that_a_run_was_trained_on_are_refused(
    tmp_path: Path, prompts: str | None
) -> None:
    assert len(planned(run_on(tmp_path / "a", "captions"), prompts).prompts) == 300
    run = run_on(tmp_path / "b", "captions-held-out")
    with pytest.raises(UserError, match=r"learns from .* and 299 more"):
        planned(run, prompts)
    one = tmp_path / "one.txt"
    one.write_text("cat\n" + read_prompts("captions-held-out")[7] + "\n")
    with pytest.raises(UserError, match="and 0 more"):
        planned(run_on(tmp_path / "c", str(one)), prompts)


@pytest.mark.parametrize("model", ["tiny", "tiny2"])
def test_the_held_out_list_is_that_of_the_model(tmp_path: Path, model: str) -> None:
    """By a reward, or by votes, of which nobody knows the prompts."""
    held_out = model_source(model).prompts
    run = run_on(tmp_path / "a", held_out, model)
    voted = run_on(tmp_path / "b", "animals", model, objective=FEEDBACK)
    for prompts in (None, held_out):
        with pytest.raises(UserError, match="so they are not held out"):
            planned(run, prompts)
        with pytest.raises(UserError, match="which prompts it has not seen"):
            planned(voted, prompts)


def test_prompts_that_are_not_called_held_out_may_be_those_of_the_run(tmp_path: Path) -> None:
    assert planned(run_on(tmp_path / "a", "captions-held-out"), "animals").prompts


# ---- versions


def test_a_newer_setting_is_refused_with_the_version(tmp_path: Path) -> None:
    run = run_on(tmp_path / "a", "animals")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "momentum": 0.9}))
    with pytest.raises(UserError, match=r"unknown settings: momentum. It was written by 0\.1\.0"):
        _ = RunFolder(run).config
    (run / "provenance.json").unlink()
    with pytest.raises(
        UserError, match=r"momentum. It was written by a version that is not on rec"
    ):
        _ = RunFolder(run).config


@pytest.mark.parametrize(
    ("version", "newer"),
    [("0.1.0", False), ("0.0.9", False), ("0.1.1", True), ("0.2", True), ("10.0.0rc1", True),
     ("0.1.0+local", False)],
)  # fmt: skip
def test_a_newer_version_is_refused(tmp_path: Path, version: str, newer: bool) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"packages": {"d3po-bench": version}}))
    if not newer:
        assert RunFolder(tmp_path).facts
        return
    with pytest.raises(
        UserError, match=rf"is of d3po-bench {re.escape(version)}, and this is 0\.1\.0"
    ):
        _ = RunFolder(tmp_path).facts


def test_what_is_published_is_read() -> None:
    runs = find_runs([ROOT / "results"])
    assert len(runs) >= 100
    assert all(run.config.method for run in runs)


# ---- seeds


def test_a_seed_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=3)
    write_run(tmp_path / "b", seed=3)
    with pytest.raises(UserError, match="Seed 3 of d3po is there twice"):
        read_groups([tmp_path])


def test_what_compares_the_pictures_of_a_prompt_is_refused_where_there_is_one(
    command: Command, micro: Path
) -> None:
    line = run_of(micro, rounds=1, eval_scorers="diversity:tiny", eval_images=1)
    refused(command(*line), "diversity:tiny would say nothing", "--set eval_images=2")
    assert not Path("runs").exists()
