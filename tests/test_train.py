"""What one round hands to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import UserError
from d3po_bench.experience.on_policy import OnPolicy
from d3po_bench.training.evaluation import Evaluation
from d3po_bench.training.run import Job, on_policy
from d3po_bench.training.trainer import Trainer
from eval.tools import TOOLS
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


def test_a_run_can_do_without_a_card_whose_weights_are_absent(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    changes = {"eval_scorers": "clip,animal", "dtype": "fp32"}
    config, execution = make("d3po", "incompress", "official_code", changes, model=str(micro))
    with pytest.raises(UserError, match=r"weights fetch clip.* --set eval_scorers=animal$"):
        Evaluation(config, execution, experience_of(config, execution), TOOLS, CPU)
