"""What one round hands to the engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.diffusion.preferences import shuffled
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import UserError
from d3po_bench.experience.on_policy import OnPolicy
from d3po_bench.runs.files import Row
from d3po_bench.training.evaluation import BaseEvaluation, Evaluation
from d3po_bench.training.run import Job, on_policy
from d3po_bench.training.tools import EvaluationSet
from d3po_bench.training.trainer import Trainer
from eval.tools import TOOLS
from tests.commands import Command, run_of, seed_folder, written
from tests.conftest import CPU


def experience_of(config: RunConfig, execution: Execution) -> OnPolicy:
    """What `run` would hand to the trainer."""
    job = Job(config=config, execution=execution, folder=Path("unused"), tools=TOOLS)
    return on_policy(job, CPU, "tiny")


def test_every_round_draws_from_its_own_seed_and_round(
    micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Draws] = []

    def spy(policy: Any, prompts: Any, draws: Draws, **options: Any) -> Any:
        seen.append(draws)
        return sample(policy, prompts, draws, **options)

    monkeypatch.setattr("d3po_bench.experience.on_policy.sample", spy)
    changes = {"prompts_per_round": "2", "sampling_steps": "3", "dtype": "fp32"}
    config, execution = make(
        "d3po", "incompress", "official_code", changes, model=str(micro), seed=3
    )
    trainer = Trainer(config, execution, experience_of(config, execution), CPU)
    for _ in range(2):
        trainer.train_round(lambda share: None)
    assert seen == [Draws(seed=3, round=0), Draws(seed=3, round=1)]


def test_only_what_learns_from_steps_needs_noise_in_them(micro: Path) -> None:
    changes = {"prompts_per_round": "2", "dtype": "fp32", "eta": "0.001"}
    for method in ("preferred_images", "d3po"):
        config, execution = make(method, "incompress", "paper", changes, model=str(micro))
        experience = experience_of(config, execution)
        if method == "preferred_images":
            assert Trainer(config, execution, experience, CPU).policy.table.std.min() < 1e-4
        else:
            with pytest.raises(UserError, match="adds no noise"):
                Trainer(config, execution, experience, CPU)


def test_a_run_can_do_without_a_card_whose_weights_are_absent(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    changes = {"eval_scorers": "clip,animal", "dtype": "fp32"}
    config, execution = make("d3po", "incompress", "official_code", changes, model=str(micro))
    with pytest.raises(UserError, match=r"weights fetch clip.* --set eval_scorers=animal$"):
        Evaluation(config, execution, experience_of(config, execution), TOOLS, CPU)


def test_the_base_model_is_evaluated_once_for_all_seeds_of_equal_settings(
    micro: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, drawn = Evaluation._drawn, list[tuple[int, int, bool]]()

    def spy(of: Evaluation, model: Any, round_: int, what: EvaluationSet, working: Any) -> Any:
        drawn.append((of.config.seed, round_, what.untrained))
        return whole(of, model, round_, what, working)

    def run(seed: int, out: str, *more: str, **settings: Any) -> None:
        seeds = ("--seed-start", str(seed), *more)
        settings = {"eval_every": 1, "eval_prompts": 2, **settings}
        assert command(*run_of(micro, *seeds, "--out", out, rounds=1, **settings)).code == 0

    monkeypatch.setattr(Evaluation, "_drawn", spy)
    run(0, "runs", "--seeds", "2", "--jobs", "1")
    assert drawn == [(0, 0, True), (0, 1, False), (1, 1, False)]
    run(1, "alone")
    assert written(seed_folder(Path("runs"), micro, 1)) == written(
        seed_folder(Path("alone"), micro, 1)
    )
    (kept,) = Path("runs").rglob("base-evaluation-*")
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")  # damaged
    run(2, "runs")
    run(3, "runs", eval_images=2)
    run(4, "runs", micro_batch=3)
    assert {(seed, 0, True) for seed in (2, 3, 4)} <= set(drawn)


def test_two_runs_write_the_base_evaluation_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (BaseEvaluation(tmp_path / "d3po" / f"seed-{n}", {"of": "tiny"}) for n in (0, 1))
    rows: list[Row] = [{"prompt": "cat"}]
    fsync = os.fsync

    def while_writing(number: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        other.write(rows, {})
        fsync(number)

    monkeypatch.setattr(os, "fsync", while_writing)
    one.write(rows, {})
    assert one.path == other.path == tmp_path / one.own.name
    assert one.read() == other.read() == (rows, {})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [one.path]


class Numbered:
    """Scores pictures by their order."""

    unit = "places"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.arange(len(images)).float()


def test_random_choices_leave_the_scores_and_say_nothing() -> None:
    kept = shuffled(torch.tensor([[0.0, 1.0]]).expand(2000, 2), torch.Generator().manual_seed(0))
    assert (kept.sum(1) == 1).all()
    assert 0.45 < float(kept[:, 1].mean()) < 0.55
    seen = {}
    for choices in ("scores", "random"):
        config = RunConfig(
            method="d3po", objective="incompress", model=str(Path(__file__).with_name("points.py")),
            sampling_steps=3, prompts_per_round=4, images_per_prompt=4, choices=choices,
        )  # fmt: skip
        experience = experience_of(config, Execution())
        experience.scorer = Numbered()
        trainer = Trainer(config, Execution(), experience, CPU)
        metrics, _ = trainer.train_round(lambda share: None)
        history = {prompt: sorted(scores) for prompt, scores in trainer.history.items()}
        seen[choices] = metrics, history, trainer.model.trainable()["shift"].clone()
    (plain, before, weights), (random, after, others) = seen["scores"], seen["random"]
    assert random["score_mean"] == pytest.approx(plain["score_mean"])
    assert before == after
    assert not torch.equal(weights, others)
