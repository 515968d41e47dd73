"""What holds for every method: these tests are not edited when one is added."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.process import VariancePreserving
from d3po_bench.diffusion.sampling import Draws, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.models.embedded import recipe
from d3po_bench.types import Conditions, Method, Model, Rollout, Rows, Weights
from tests.points import Points

METHODS = [name for name in registry.names("method") if not registry.variant(name)[1]]

OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "group"},
    "dpok_value": {"value": "reward", "kl": "noise_mse", "ratio": "hard_clamp", "clip_range": 0.2},
    "awm": {"weight": "signed", "advantage": "group", "anchor": 0.1},
}
"""Of variants, those that change what is learned, and a clip range for so large steps."""


class Toy(Points):
    """A linear network on latents of eight numbers.

    The best noise predictor of N(0, I) data, plus a trainable offset.
    """

    latent_shape: tuple[int, ...] = (1, 1, 8)

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.process = VariancePreserving(recipe.new_scheduler().alphas_cumprod)
        self.offset = torch.zeros(8, requires_grad=True)

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        best = self.process.sigma(s).float().view(-1, 1, 1, 1) * x
        return best if weights == "base" else best + self.offset

    def trainable(self) -> dict[str, Tensor]:
        return {"offset": self.offset}


def rollout(policy: Policy, method: Method[Any], seed: int, round_: int) -> Rollout:
    """A round whose reward is the mean of the final latent."""
    drawn = sample(
        policy, ["a", "bb"] * 4, Draws(seed=seed, round=round_),
        images_per_prompt=max(2, method.images_per_prompt), shared_noise=method.shared_noise,
    )  # fmt: skip
    scored = replace(drawn, scores=drawn.latents[:, :, -1].flatten(2).mean(2))
    return with_reference(policy, scored, method, untrained=round_ == 0, batch=64)


def train(name: str, seed: int = 0, rounds: int = 30, **options: Any) -> tuple[list[float], Tensor]:
    """Rewards of every round, and the trained offset."""
    toy = Toy()
    assert isinstance(toy, Model)
    method = registry.method(name)(**options)
    policy = Policy(toy, steps=5, guidance=1.0)
    optimizer = torch.optim.AdamW(list(toy.trainable().values()), 0.05, weight_decay=0.0)
    rewards = []
    for round_ in range(rounds):
        drawn = rollout(policy, method, seed, round_)
        rewards.append(float(drawn.scores.mean()))
        rows = method.rows(drawn, stream(seed, "rows", round_))
        update(policy, method, rows, optimizer, Updates(units=8), stream(seed, "shuffle", round_))
    return rewards, toy.offset.detach().clone()


@pytest.mark.parametrize("name", METHODS)
def test_learns_a_reward_that_is_linear_in_the_mean(name: str) -> None:
    rewards, offset = train(name)
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert after > before + 0.2
    assert offset.mean() < -0.1  # less predicted noise makes the next latent larger


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_weights(name: str) -> None:
    assert torch.equal(train(name, rounds=3)[1], train(name, rounds=3)[1])
    assert not torch.equal(train(name, rounds=3)[1], train(name, seed=1, rounds=3)[1])


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_units_by_steps(name: str) -> None:
    method = registry.method(name)()
    policy = Policy(Toy(), steps=5, guidance=1.0)
    rows = method.rows(rollout(policy, method, 0, 0), stream(0, "rows"))
    assert isinstance(rows, Rows)
    item = rows.take(torch.tensor([3, 0]), torch.tensor([2, 4]))
    for f in fields(rows):
        whole, part = getattr(rows, f.name), getattr(item, f.name)
        if isinstance(whole, Conditions):  # the same at every step
            assert len(whole) == len(rows)
            assert torch.equal(part["centre"], whole["centre"][[3, 0]])
        else:
            assert whole.shape[:2] == (len(rows), rows.steps)
            assert torch.equal(part, whole[[3, 0], [2, 4]])


@pytest.mark.parametrize("name", [*METHODS, *OPTIONS])
def test_loss_is_a_mean_over_items(name: str) -> None:
    method = registry.method(registry.variant(name)[0])(**OPTIONS.get(name, {}))
    policy = Policy(Toy(), steps=5, guidance=1.0)
    rows = method.rows(rollout(policy, method, 0, 0), stream(0, "rows"))
    unit, step = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4, 2, 1])
    whole, metrics = method.loss(policy, rows.take(unit, step))
    parts = [method.loss(policy, rows.take(unit[i : i + 1], step[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack([p[0] for p in parts]).mean())
    for key, value in metrics.items():
        torch.testing.assert_close(value, torch.stack([p[1][key] for p in parts]).mean())
    assert whole.requires_grad


@pytest.mark.parametrize("name", OPTIONS)
def test_a_variant_learns_the_same_reward(name: str) -> None:
    of, settings = registry.variant(name)
    assert {**settings, **OPTIONS[name]} == {**OPTIONS[name], **settings}
    rewards, offset = train(of, rounds=20, **OPTIONS[name])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert offset.mean() < -0.05


@pytest.mark.parametrize("name", METHODS)
def test_options_are_documented_fields_of_a_frozen_dataclass(name: str) -> None:
    method = registry.method(name)()
    options: Any = registry.method(name)
    assert is_dataclass(options)
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(options)[0].name, None)
    assert registry.summary("method", name)
