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
from eval.scorers.diversity import coverage, distances
from eval.scorers.vendi import effective_number
from tests.conftest import CPU, disturb

WHAT = EvaluationSet(prompts=["cat", "dog"], images=2, steps=3)


def mean_of(rows: list[dict[str, Any]], column: str, sampler: str = "eta1") -> float:
    values: list[float] = [row[column] for row in rows if row["sampler"] == sampler]
    return sum(values) / len(values)


def test_no_drift_before_training_and_some_after(micro_model: StableDiffusion) -> None:
    before, _ = evaluate(micro_model, WHAT, {})
    assert mean_of(before, "kl") == mean_of(before, "drift") == 0
    disturb(micro_model)
    after, _ = evaluate(micro_model, WHAT, {})
    steps = divergences(micro_model)
    assert [mean_of(after, f"kl_{i}") for i in (1, 2, 3)] == pytest.approx(steps, rel=1e-3)
    assert mean_of(after, "kl") == pytest.approx(sum(steps) / 3, rel=1e-3)
    assert mean_of(after, "drift") == pytest.approx(moved(micro_model), rel=1e-3)
    assert not {"kl", "kl_1", "drift"} & {*next(r for r in after if r["sampler"] == "eta0")}


def test_the_sampler_free_drift_knows_no_sampler(micro_model: StableDiffusion) -> None:
    """Only its clean latents are drawn, without noise, from the first noise."""
    disturb(micro_model)
    one, other = (evaluate(micro_model, replace(WHAT, eta=eta), {})[0] for eta in (1.0, 0.3))
    assert mean_of(one, "drift") == mean_of(other, "drift")
    assert mean_of(one, "kl") != mean_of(other, "kl")


def test_a_part_of_the_prompts_drifts_as_in_the_whole(micro_model: StableDiffusion) -> None:
    disturb(micro_model)
    whole, _ = evaluate(micro_model, WHAT, {})
    part, _ = evaluate(micro_model, replace(WHAT, prompts=["dog"], first=1), {})
    own = [row["drift"] for row in whole if row["prompt"] == "dog" and "drift" in row]
    assert [r["drift"] for r in part if "drift" in r] == pytest.approx(own, rel=1e-4)


@torch.no_grad()
def moved(model: StableDiffusion) -> float:
    """Mean squared change of the predicted noise in what the base model draws, at four levels."""
    draws = Draws(seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps")
    prompts, shape = ["cat", "cat", "dog", "dog"], model.latent_shape
    text, x = model.encode(prompts), draws.start(range(4), 1, False, shape)[:, 0]
    ode = Policy(model, steps=3, eta=0.0)
    for i in range(3):
        x = ode.step(x, torch.full((4,), i), text, weights="base").mean
    noise, total = draws.along(range(4), 1, 4, shape)[:, 0], 0.0
    for k, t in enumerate((125, 375, 625, 875)):
        level = torch.full((4,), t)
        alpha, sigma = (float(f(level)[0]) for f in (model.process.alpha, model.process.sigma))
        noisy = alpha * x + sigma * noise[:, k]
        gap = model.output(noisy, level, text) - model.output(noisy, level, text, weights="base")
        total += float(gap.square().mean()) / 4
    return total


@torch.no_grad()
def divergences(model: StableDiffusion) -> list[float]:
    """Of each step: |mean - pretrained mean|^2 / (2 std^2), a mean over elements."""
    policy = Policy(model, steps=3)
    draws = Draws(seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps")
    rollout = sample(policy, ["cat", "cat", "dog", "dog"], draws)
    found = []
    weights: tuple[Weights, ...] = ("current", "base")
    for i in range(3):
        x, std = rollout.latents[:, 0, i], policy.table.std[i]
        ours, theirs = (
            policy.step(x, torch.full((4,), i), rollout.conditions, weights=w).mean for w in weights
        )
        found.append(float((ours - theirs).square().mean() / (2 * std**2)))
    return found


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


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([[1.0, 0, 0]] * 3, 1),
        (torch.eye(3), 3),
        ([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], 2),
        # cosine 0.6: eigenvalues 0.8 and 0.2 of K / 2
        ([[1.0, 0], [0.6, 0.8]], math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))),
    ],
)
def test_effective_number_by_hand(features: Any, expected: float) -> None:
    assert float(effective_number(torch.as_tensor(features))) == pytest.approx(expected, abs=1e-6)


def test_the_effective_number_is_of_a_prompt() -> None:
    judge, noise = checked_scorer("vendi:tiny", CPU), torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (4, 3, 32, 32), generator=noise).to(torch.uint8)
    same = images[[0, 0, 1, 2]]
    found = judge(same, ["cat", "cat", "dog", "fish"])
    assert found[:2].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert found[2:].isnan().all()
    assert 1 < float(judge(images, ["cat"] * 4)[0]) < 4


def test_coverage_by_hand() -> None:
    # nearest neighbours: 1 away for 0, 1 and 2, and 5 away for 7
    base = torch.tensor([[0.0], [1], [2], [7]])
    assert coverage(base, torch.tensor([[1.0]]), neighbours=1) == 0.75  # 7 is lost
    assert coverage(base, torch.tensor([[2.5], [6.0]]), neighbours=1) == 0.5  # 2 and 7 are left
    assert coverage(base, base, neighbours=1) == 1


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
