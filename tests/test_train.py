"""What one round hands to the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.config import make
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import UserError
from d3po_bench.training import evaluation
from d3po_bench.training.trainer import Trainer


def test_every_round_draws_from_its_own_seed_and_round(
    micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Draws] = []

    def spy(policy: Any, prompts: Any, draws: Draws, **options: Any) -> Any:
        seen.append(draws)
        return sample(policy, prompts, draws, **options)

    monkeypatch.setattr("d3po_bench.training.trainer.sample", spy)
    changes = {"prompts_per_round": "2", "sampling_steps": "3", "dtype": "fp32"}
    config, execution = make(
        "d3po", "incompress", "official_code", changes, model=str(micro), seed=3
    )
    trainer = Trainer(config, replace(execution, device="cpu"))
    for _ in range(2):
        trainer.train_round(lambda stage, share: None)
    assert seen == [Draws(seed=3, round=0), Draws(seed=3, round=1)]


def test_a_run_can_do_without_a_card_whose_weights_are_absent(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    changes = {"eval_scorers": "clip,animal", "dtype": "fp32"}
    config, execution = make("d3po", "incompress", "official_code", changes, model=str(micro))
    with pytest.raises(UserError, match=r"weights fetch clip.* --set eval_scorers=animal$"):
        evaluation.Evaluation(Trainer(config, replace(execution, device="cpu")))
