"""Diffusion-DPO and KTO: losses by hand, one gradient whatever the split, the right reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.diffusion_dpo import DiffusionDPO, NoisedPairs, diffusion_dpo_loss
from baselines.kto import KTO, LikedRows, kto_loss
from baselines.reward_weighted import RewardWeighted
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.preferences import liking
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.errors import UserError
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.types import Rollout
from tests.conftest import disturb
from tests.rounds import KeepGradient, adam, near, rollout_of, weights


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def all_items(rows: Any) -> Any:
    unit = torch.arange(len(rows)).repeat_interleave(rows.steps)
    return rows.take(unit, torch.arange(rows.steps).repeat(len(rows)))


def gradient_of(loss: Tensor, policy: Policy) -> Tensor:
    grads = torch.autograd.grad(loss, list(policy.model.trainable().values()))
    return torch.cat([g.flatten() for g in grads])


@pytest.fixture
def policy(micro_model: StableDiffusion) -> Policy:
    disturb(micro_model)
    return Policy(micro_model, steps=4)


def rows_of(policy: Policy, method: Any, rollout: Rollout | None = None) -> Any:
    return method.rows(rollout or rollout_of(policy), stream(0, "rows"))


# ---- losses


def test_diffusion_dpo_by_hand() -> None:
    # beta 2: -log sigmoid(-(g_w - g_l)); the winner's error fell by .3 and the loser's rose by .2.
    gaps = torch.tensor([[-0.3, 0.2], [0.2, -0.3], [-0.3, 0.2], [0.1, 0.1]])
    found = diffusion_dpo_loss(gaps, torch.tensor([1.0, 1.0, 0.0, 1.0]), beta=2.0)
    expected = [-math.log(sigmoid(0.5)), -math.log(sigmoid(-0.5)), math.log(2), math.log(2)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_kto_by_hand() -> None:
    # beta 10, mean gain .02: liked and gained .05 -> 1 - sigmoid(.3), disliked -> 1 - sigmoid(-.3)
    gain, mean = torch.tensor([0.05, 0.05, -0.01]), torch.full((3,), 0.02)
    found = kto_loss(gain, mean, torch.tensor([1.0, -1.0, -1.0]), beta=10.0)
    expected = [1 - sigmoid(0.3), 1 - sigmoid(-0.3), 1 - sigmoid(0.3)]
    torch.testing.assert_close(found, torch.tensor(expected))
    # Gains that are losses on the mean are measured from zero.
    below = kto_loss(gain[:1], torch.tensor([-5.0]), torch.tensor([1.0]), beta=10.0)
    torch.testing.assert_close(below, torch.tensor([1 - sigmoid(0.5)]))


@pytest.mark.parametrize(("method", "value"), [(DiffusionDPO(), math.log(2)), (KTO(), 0.5)])
def test_the_first_update_costs_what_chance_does_and_has_a_gradient(
    method: Any, value: float, micro_model: StableDiffusion
) -> None:
    policy = Policy(micro_model, steps=4)
    optimizer = KeepGradient(micro_model)
    found = update(
        policy, method, rows_of(policy, method), optimizer, Updates(units=9), stream(0, "shuffle")
    )
    assert found["loss"] == pytest.approx(value, abs=1e-5)
    assert found["grad_norm"] > 0


def swapped(rows: Any) -> Any:
    if isinstance(rows, NoisedPairs):
        return replace(rows, x_0=rows.x_0.flip(2))
    return replace(rows, liking=-rows.liking)


@pytest.mark.parametrize("method", [DiffusionDPO(), KTO()])
def test_swapping_who_won_negates_the_gradient(method: Any, micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=4)
    rows = rows_of(policy, method)
    one, other = (
        gradient_of(method.loss(policy, all_items(r))[0], policy) for r in (rows, swapped(rows))
    )
    near(-other, one)


# ---- the update


@pytest.mark.parametrize(
    "method",
    [DiffusionDPO(beta=20.0), KTO(beta=20.0),
     pytest.param(RewardWeighted(weight="signed", advantage="group", anchor=0.1),
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_gradient_whatever_the_micro_batches(method: Any, policy: Policy) -> None:
    rows, kept, logs = rows_of(policy, method), [], []
    for size in (1, 5, 64):
        optimizer = KeepGradient(policy.model)
        given = Updates(units=9, micro_batch=size)
        logs.append(update(policy, method, rows, optimizer, given, stream(0, "shuffle")))
        kept.append(optimizer.kept)
        for weight in policy.model.trainable().values():
            weight.grad = None
    for other, log in zip(kept[1:], logs[1:], strict=True):
        near(other, kept[0])
        assert log == pytest.approx(logs[0], rel=1e-3)


class Spy(KTO):
    """Sees the mean that each micro-batch is given."""

    seen: list[float] = []  # noqa: RUF012

    def loss(self, policy: Any, items: LikedRows) -> Any:
        self.seen.extend(items.shared.tolist())
        return super().loss(policy, items)


def test_the_mean_gain_is_that_of_the_whole_step(policy: Policy) -> None:
    rows = rows_of(policy, KTO())
    with torch.no_grad():
        expected = float(KTO().shared(policy, all_items(rows)).double().mean())
    Spy.seen.clear()
    spent, items = policy.model.forwards, len(rows) * rows.steps
    given = Updates(units=9, micro_batch=5)
    update(policy, Spy(), rows, KeepGradient(policy.model), given, stream(0, "shuffle"))
    assert len(Spy.seen) == items
    # To learn from, and before that for the mean: the policy and, once, the pretrained model.
    assert policy.model.forwards - spent == 3 * items
    assert Spy.seen == pytest.approx([expected] * len(Spy.seen), rel=1e-3)


@pytest.mark.parametrize("method", [DiffusionDPO(), KTO()])
def test_the_reference_is_the_pretrained_model_wherever_training_began(
    method: Any, policy: Policy
) -> None:
    rows, value = rows_of(policy, method), math.log(2) if isinstance(method, DiffusionDPO) else 0.5

    def loss() -> float:
        kept = KeepGradient(policy.model)
        return update(policy, method, rows, kept, Updates(units=9), stream(0, "shuffle"))["loss"]

    assert abs(loss() - value) > 1e-3  # begun with other weights
    for weight in policy.model.trainable().values():
        weight.data.zero_()  # the adapter does nothing: the pretrained model
    assert loss() == pytest.approx(value, abs=1e-5)


# ---- rows


def test_the_images_of_a_pair_share_level_and_noise(policy: Policy) -> None:
    rollout = replace(rollout_of(policy), scores=torch.tensor([[0.0, 1], [1, 0], [2, 2]]))
    rows = rows_of(policy, DiffusionDPO(), rollout)
    final = rollout.latents[:, :, -1]
    assert torch.equal(rows.x_0[0, 1], final[0].flip(0))
    assert torch.equal(rows.x_0[1, 3], final[1])
    assert rows.noise.shape == (3, 4, *final.shape[2:])
    assert rows.preference[:, 0].tolist() == [1, 1, 0]
    assert len(rows_of(policy, DiffusionDPO(skip_ties=True), rollout)) == 2
    drawn = rows_of(policy, DiffusionDPO(timesteps="sampler"), rollout)
    assert set(drawn.level.unique().tolist()) <= set(policy.levels[:-1].tolist())


def test_diagnostics_tell_displacement_from_learning(policy: Policy) -> None:
    items = all_items(rows_of(policy, DiffusionDPO()))
    _, found = DiffusionDPO().loss(policy, items)
    place = items.level, items.noise, items.conditions
    for name, index in (("winner_gap", 0), ("loser_gap", 1)):
        x_0 = items.x_0[:, index]
        now, then = (policy.denoise(x_0, *place, weights=w) for w in ("current", "base"))
        gaps = (now[0] - now[1]).square().mean((1, 2, 3)) - (then[0] - then[1]).square().mean(
            (1, 2, 3)
        )
        torch.testing.assert_close(found[name], gaps.mean(), rtol=1e-3, atol=1e-6)
    right, wrong = (
        DiffusionDPO().loss(policy, i)[1] for i in (items, replace(items, x_0=items.x_0.flip(1)))
    )
    torch.testing.assert_close(right["accuracy"] + wrong["accuracy"], torch.tensor(1.0))


def test_who_is_liked() -> None:
    nan = math.nan
    scores = torch.tensor([[1.0, 2, 3], [0.1, 0.1, 0.1], [nan, nan, nan]])
    assert liking(scores).tolist() == [[-1, 0, 1], [0, 0, 0], [0, 0, 0]]
    tags = torch.tensor([[0.0, -1, -0.5]])
    assert liking(tags, -0.5).tolist() == [[1, -1, 0]]


def test_liked_images_become_rows(policy: Policy) -> None:
    rollout = replace(rollout_of(policy), scores=torch.tensor([[0.0, 1], [1, 1], [2, 1]]))
    rows = rows_of(policy, KTO(), rollout)
    assert rows.liking[:, 0].tolist() == [-1, 1, 1, -1]
    assert torch.equal(rows.x_0[:, 0], rollout.latents[[0, 0, 2, 2], [0, 1, 0, 1], -1])
    assert len(rows_of(policy, KTO(liked="above_value", value=0.5), rollout)) == 6


def test_weights_of_liked_and_disliked(policy: Policy) -> None:
    items = all_items(rows_of(policy, KTO()))
    loss = {w: float(KTO(liked_weight=w).loss(policy, items)[0].detach()) for w in (0.0, 1.0, 3.0)}
    assert loss[3.0] - loss[0.0] == pytest.approx(3 * (loss[1.0] - loss[0.0]), rel=1e-4)
    assert loss[1.0] > loss[0.0] > 0


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (DiffusionDPO, {"beta": 0.0}, r"needs beta above 0, not 0.*--set beta="),
        (KTO, {"disliked_weight": -1.0}, r"disliked_weight of at least 0; these .* -1.*--set"),
    ],
)
def test_options_without_a_meaning_are_refused(
    kind: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        kind(**options)


def test_a_round_of_ties_changes_nothing(policy: Policy) -> None:
    tied = replace(rollout_of(policy), scores=torch.zeros(3, 2))
    before = weights(policy.model)
    methods: tuple[Any, ...] = (DiffusionDPO(skip_ties=True), KTO())
    for method in methods:
        rows = rows_of(policy, method, tied)
        found = update(policy, method, rows, adam(policy.model), Updates(), stream(0, "shuffle"))
        assert found == {"updates": 0}
    assert torch.equal(before, weights(policy.model))
