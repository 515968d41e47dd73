"""What is measured beside the objective: drift, diversity; and that evaluation repeats."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.training.tools import EvaluationSet
from d3po_bench.types import Weights
from eval.golden import checked_scorer
from eval.measure import NOISE_SEED, evaluate
from eval.scorers._clip import EMBEDDED
from eval.scorers.diversity import distances
from tests.conftest import CPU, disturb

WHAT = EvaluationSet(prompts=["cat", "dog"], images=2, steps=3)


def mean_of(rows: list[dict[str, Any]], column: str, sampler: str = "eta1") -> float:
    values: list[float] = [row[column] for row in rows if row["sampler"] == sampler]
    return sum(values) / len(values)


def test_no_drift_before_training_and_some_after(micro_model: StableDiffusion) -> None:
    before, _ = evaluate(micro_model, WHAT, {})
    assert mean_of(before, "kl") == 0
    disturb(micro_model)
    after, _ = evaluate(micro_model, WHAT, {})
    assert mean_of(after, "kl") == pytest.approx(drift(micro_model), rel=1e-3)
    assert not any("kl" in row for row in after if row["sampler"] == "eta0")


@torch.no_grad()
def drift(model: StableDiffusion) -> float:
    """Step by step: |mean - pretrained mean|^2 / (2 std^2), a mean over elements and steps."""
    policy = Policy(model, steps=3)
    draws = Draws(seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps")
    rollout = sample(policy, ["cat", "cat", "dog", "dog"], draws)
    total = 0.0
    weights: tuple[Weights, ...] = ("current", "base")
    for i in range(3):
        x, std = rollout.latents[:, 0, i], policy.table.std[i]
        ours, theirs = (
            policy.step(x, torch.full((4,), i), rollout.conditions, weights=w).mean for w in weights
        )
        total += float((ours - theirs).square().mean() / (2 * std**2)) / 3
    return total


def test_evaluation_repeats(micro_model: StableDiffusion) -> None:
    disturb(micro_model)
    scorers = {"score": checked_scorer("jpeg_size", CPU)}
    first, second = (evaluate(micro_model, WHAT, scorers) for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1]["eta0"], second[1]["eta0"])
    assert [r["index"] for r in first[0]] == [0, 1] * 4


def test_distances_by_hand() -> None:
    # Of cat: (1, 0), (0, 1), (1, 0): distances 1 and 0 to the others, so means 1/2, 1, 1/2.
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    found = distances(features, ["cat", "cat", "cat", "dog"])
    assert found[:3].tolist() == [0.5, 1.0, 0.5]
    assert math.isnan(found[3])


@pytest.mark.parametrize("weights", ["tiny", str(EMBEDDED / "clip")])
def test_equal_pictures_have_no_diversity_and_different_ones_have(weights: str) -> None:
    judge = checked_scorer(f"diversity:{weights}", CPU)
    images: Tensor = torch.randint(
        0, 255, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)
    )
    one = images[:1].to(torch.uint8)
    same = judge(one.expand(2, -1, -1, -1), ["cat", "cat"])
    assert same.abs().max() < 1e-6
    assert judge(images.to(torch.uint8), ["cat", "cat"]).min() > 0.01
    assert judge(images.to(torch.uint8), ["cat", "dog"]).isnan().all()


def test_a_scorer_with_nothing_to_say_leaves_its_cell_empty(micro_model: StableDiffusion) -> None:
    scorers = {"animal": checked_scorer("animal", CPU)}
    rows, _ = evaluate(micro_model, WHAT, scorers)
    assert all(isinstance(row["animal"], float) for row in rows)
    rows, _ = evaluate(micro_model, replace(WHAT, prompts=["a house"]), scorers)
    assert [row["animal"] for row in rows] == [""] * 4
