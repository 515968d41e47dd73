"""The baselines' losses and weights, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.ddpo import DDPO
from baselines.dpok import DPOK
from baselines.preferred_images import PreferredImages
from baselines.reward_weighted import RewardWeighted, softmax_weights
from d3po_bench.d3po import D3PO
from d3po_bench.diffusion.advantages import advantages, ppo_loss
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.errors import UserError
from d3po_bench.models.embedded import recipe
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.types import ImageRows, Method, Rollout
from tests.conftest import disturb
from tests.rounds import dpok_losses, scored, weights

PROMPTS = ["cat", "dog", "cat"]
SCORES = [[1.0, 2.0], [5.0, 3.0], [0.0, 4.0]]


def rollout_of(policy: Policy, method: Method[Any], untrained: bool = False) -> Rollout:
    drawn = sample(policy, PROMPTS, Draws(seed=0, round=0), images_per_prompt=2)
    judged = replace(drawn, scores=torch.tensor(SCORES))
    return with_reference(policy, judged, method, untrained=untrained, batch=100)


@pytest.fixture
def policy(micro_model: StableDiffusion) -> Policy:
    disturb(micro_model)
    return Policy(micro_model, steps=4)


def everything(method: Method[Any], policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over all items of a rollout of the policy itself."""
    rows = method.rows(rollout_of(policy, method), stream(0, "rows"))
    unit = torch.arange(len(rows)).repeat_interleave(rows.steps)
    step = torch.arange(rows.steps).repeat(len(rows))
    return method.loss(policy, rows.take(unit, step))


def gradient(loss: Tensor, policy: Policy) -> Tensor:
    grads = torch.autograd.grad(loss, list(policy.model.trainable().values()))
    return torch.cat([g.flatten() for g in grads])


# ---- advantages


def test_a_prompt_without_a_past_is_compared_with_the_round() -> None:
    # 1, 3, 1, 3: mean 2, population std 1
    found = advantages(scored(["cat", "dog"], [[1, 3], [1, 3]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))


def test_a_prompt_with_a_past_is_compared_with_itself() -> None:
    # cat: 0, 0, then 4, 4 now: mean 2, std 2. dog has one image: the round, 4 4 10, mean 6,
    # std sqrt(8).
    found = advantages(scored(["cat", "cat", "dog"], [[4], [4], [10]], {"cat": [0, 0]}), 4, 4)
    expected = torch.tensor([[1.0], [1.0], [4 / math.sqrt(8)]])
    torch.testing.assert_close(found, expected)


def test_the_buffer_forgets() -> None:
    # Of cat's 100, 1, 3 a buffer of 2 keeps the newest.
    found = advantages(scored(["cat"], [[1, 3]], {"cat": [100]}), 2, 2)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0]]))


def test_without_a_buffer_the_round_counts() -> None:
    found = advantages(scored(["cat", "dog"], [[1], [3]], {"cat": [100] * 20}), 0, 0)
    torch.testing.assert_close(found, torch.tensor([[-1.0], [1.0]]))


def test_in_a_group_an_image_is_compared_with_those_of_its_draw() -> None:
    # 1, 3: mean 2, std 1. Of equal images none is better.
    drawn = scored(["cat", "cat"], [[1, 3], [5, 5]], {"cat": [9] * 20})
    found = advantages(drawn, against="group")
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / (1 + 1e-4))
    moved = advantages(scored(["cat"], [[107, 101]]), against="group")  # 3 less, 3 more
    torch.testing.assert_close(moved, torch.tensor([[1.0, -1.0]]), rtol=1e-3, atol=0)


# ---- DDPO


def test_ppo_by_hand() -> None:
    # A = 2: ratio 1.2 cut to 1.1 -> max(-2.4, -2.2). A = -1: max(1.2, 1.1), ratio 0.8 -> 0.9.
    log_ratio = torch.tensor([1.2, 1.2, 0.8, 0.8]).log()
    loss = ppo_loss(log_ratio, torch.tensor([2.0, -1.0, 2.0, -1.0]), 0.1)
    torch.testing.assert_close(loss, torch.tensor([-2.2, 1.2, -1.6, 0.9]))


def test_ppo_has_a_finite_gradient_anywhere() -> None:
    log_ratio = torch.tensor([100.0, 100.0, -100.0], requires_grad=True)
    ppo_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0]), 0.1).sum().backward()
    assert log_ratio.grad is not None
    assert torch.isfinite(log_ratio.grad).all()


def test_the_score_function_is_the_importance_form_on_policy(policy: Policy) -> None:
    forms = [DDPO(loss_form="importance"), DDPO(loss_form="score_function")]
    first, second = (gradient(everything(form, policy)[0], policy) for form in forms)
    assert first.norm() > 0
    assert (first - second).norm() <= 1e-3 * first.norm()


def test_advantages_are_clipped(policy: Policy) -> None:
    rows = DDPO(advantage_clip=0.5).rows(rollout_of(policy, DDPO()), stream(0, "rows"))
    assert rows.advantage.abs().max() == 0.5
    assert (rows.advantage[:, :1] == rows.advantage).all()


# ---- DPOK


def test_dpok_without_a_penalty_is_ddpo(policy: Policy) -> None:
    ours = gradient(everything(DPOK(kl="none"), policy)[0], policy)
    ddpo = gradient(everything(DDPO(), policy)[0], policy)
    assert torch.equal(ours, ddpo)
    for kl in ("gaussian", "noise_mse"):
        assert not torch.equal(gradient(everything(DPOK(kl=kl), policy)[0], policy), ddpo)


def test_the_penalty_alone_pulls_back_to_the_pretrained_model(policy: Policy) -> None:
    method = DPOK(kl_weight=1e4)
    optimizer = torch.optim.SGD(list(policy.model.trainable().values()), lr=0.1)
    before, after = (_penalty_after(policy, method, optimizer if i else None) for i in range(2))
    assert 0 < after < before


def _penalty_after(policy: Policy, method: DPOK, optimizer: torch.optim.Optimizer | None) -> float:
    rows = method.rows(rollout_of(policy, method), stream(0, "rows"))
    if optimizer is not None:
        updates = Updates(units=6)
        update(policy, method, rows, optimizer, updates, stream(0, "shuffle"))
    return float(everything(method, policy)[1]["penalty"])


def test_noise_mse_is_the_kl_without_the_weight_of_the_step(policy: Policy) -> None:
    method = DPOK()
    rows = method.rows(rollout_of(policy, method), stream(0, "rows"))
    items = rows.take(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]))
    step = policy.step(items.x_t, items.step, items.conditions)
    table = policy.table
    weight = (table.output.square() / (2 * table.std.square())).float()
    kl = DPOK(kl="gaussian").penalty(policy, step, items)
    noise = DPOK(kl="noise_mse").penalty(policy, step, items)
    assert kl.min() > 0
    torch.testing.assert_close(kl, weight * noise, rtol=1e-4, atol=0)


def test_a_hard_clamp_has_no_gradient_outside() -> None:
    log_ratio = torch.tensor([0.2, -0.2], requires_grad=True)
    advantage = torch.tensor([-1.0, 1.0])  # where PPO still pulls back
    clamped = DPOK(kl="none", ratio="hard_clamp", clip_range=0.1)
    dpok_losses(clamped, log_ratio, advantage).sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.abs().sum() == 0
    dpok_losses(DPOK(kl="none", clip_range=0.1), log_ratio, advantage).sum().backward()
    assert log_ratio.grad.abs().min() > 0


def test_the_value_is_learned_and_remembered(policy: Policy) -> None:
    method = DPOK(value="on", buffer=0)
    rollout = rollout_of(policy, method)
    target = advantages(rollout, 0, 0).flatten()
    errors = []
    for number in range(40):
        rows = method.rows(rollout, stream(0, "rows", number))
        errors.append(float(rows.advantage.square().mean()))
    assert errors[-1] < 0.5 * errors[0]
    assert float(rollout.memory["step.last.bias"]) == 200
    plain = DPOK(buffer=0).rows(rollout, stream(0, "rows"))
    torch.testing.assert_close(plain.advantage[:, 0], target)


def test_a_value_of_the_reward_is_subtracted_from_the_reward_itself(policy: Policy) -> None:
    method = DPOK(value="reward")
    drawn = rollout_of(policy, method)
    found = []
    for more in (0.0, 10.0):
        own = replace(drawn, scores=drawn.scores + more, memory={})
        found.append(method.rows(own, stream(0, "rows")).advantage)
    # The value has seen no reward yet, so it is the same for both.
    torch.testing.assert_close(found[1] - found[0], torch.full_like(found[0], 10.0))
    value = drawn.scores.flatten().unsqueeze(1) - found[0]
    assert (value[:, 0] != value[:, 1]).any()
    fast = DPOK(value="reward", value_rate=1e-2, value_steps=100)
    for number in range(3):
        learned = fast.rows(drawn, stream(0, "rows", number)).advantage
    assert learned.square().mean() < 0.1 * drawn.scores.square().mean()


# ---- Reward Weighted and preferred images


def test_softmax_weights_by_hand() -> None:
    # e^0 : e^ln3 = 1 : 3, times two images
    every = softmax_weights(torch.tensor([0.0, math.log(3)]), 1.0)
    torch.testing.assert_close(every, torch.tensor([0.5, 1.5]))
    own = softmax_weights(torch.tensor([0.0, math.log(3), 7.0]), 1.0, ["cat", "cat", "dog"])
    torch.testing.assert_close(own, torch.tensor([0.5, 1.5, 1.0]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight": "sparse", "quantile": 0.7}, [0, 0, 1, 0, 0, 1]),  # of 0 1 2 3 4 5: above 3.5
        ({"weight": "softmax_raw", "inverse_temperature": 1e-9}, [1] * 6),
        ({"weight": "softmax_raw", "inverse_temperature": 9.0, "largest_weight": 2.0},
         [0, 0, 2, 0, 0, 7e-4]),
        # Each against the other of its draw, in standard deviations of the two.
        ({"weight": "signed", "advantage": "group"}, [-1, 1, 1, -1, -1, 1]),
        ({"weight": "signed", "advantage": "group", "largest_weight": 0.5},
         [-0.5, 0.5, 0.5, -0.5, -0.5, 0.5]),
    ],
)  # fmt: skip
def test_weights(policy: Policy, options: dict[str, Any], expected: list[float]) -> None:
    found = RewardWeighted(**options).weights(rollout_of(policy, RewardWeighted()))
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=2e-4, rtol=0)


def test_lee_takes_rewards_as_they_are_and_only_from_0_to_1() -> None:
    method = RewardWeighted(weight="lee")
    assert method.weights(scored(["cat"], [[0.25, 1.0]])).tolist() == [0.25, 1.0]
    with pytest.raises(UserError, match=r"weight=lee needs rewards from 0 to 1; .* from 0 to 3"):
        method.weights(scored(["cat"], [[0.0, 3.0]]))


def test_weighted_loss_by_hand(policy: Policy) -> None:
    method = RewardWeighted(buffer=0)
    rollout = rollout_of(policy, method)
    rows = method.rows(rollout, stream(0, "rows"))
    assert torch.equal(rows.x_0[3, 1], rollout.latents[1, 1, -1])
    assert rows.level.unique().numel() > 4
    items = rows.take(torch.tensor([0, 3]), torch.tensor([1, 2]))
    kept = recipe.new_scheduler().alphas_cumprod[items.level].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * items.x_0 + (1 - kept).sqrt() * items.noise
    predicted = policy.model.output(noisy, items.level, items.conditions)
    error = (predicted - items.noise).square().mean((1, 2, 3))
    loss, metrics = method.loss(policy, items)
    torch.testing.assert_close(loss, (error * items.weight).mean())
    share = rows.weight[:, 0].sum() ** 2 / rows.weight[:, 0].square().sum() / 6
    torch.testing.assert_close(metrics["effective_share"], share)


def test_signed_weights_turn_with_the_reward(policy: Policy) -> None:
    method = RewardWeighted(weight="signed", advantage="group")
    drawn, losses = rollout_of(policy, method), []
    for sign in (1, -1):
        rows = method.rows(replace(drawn, scores=sign * drawn.scores), stream(0, "rows"))
        unit, step = torch.arange(6), torch.tensor([0, 1, 2, 3, 0, 1])
        losses.append(method.loss(policy, rows.take(unit, step))[0])
    assert losses[0] != 0
    torch.testing.assert_close(losses[0], -losses[1])
    tied = method.rows(replace(drawn, scores=torch.ones(3, 2)), stream(0, "rows"))
    assert tied.weight.abs().sum() == tied.effective.abs().sum() == 0


def test_the_samplers_noise_levels(policy: Policy) -> None:
    for method in (RewardWeighted(timesteps="sampler"), PreferredImages(timesteps="sampler")):
        rows = method.rows(rollout_of(policy, method), stream(0, "rows"))
        assert set(rows.level.unique().tolist()) <= set(policy.levels[:-1].tolist())


def test_guidance_in_the_loss_changes_it(policy: Policy) -> None:
    for kind in (RewardWeighted, PreferredImages):
        plain, guided = (everything(kind(guided=g), policy)[0] for g in (False, True))
        assert abs(plain - guided) > 1e-5


def test_the_anchor_weighs_the_way_from_the_pretrained_model(policy: Policy) -> None:
    rows = RewardWeighted().rows(rollout_of(policy, RewardWeighted()), stream(0, "rows"))
    unit, step = (
        i.flatten() for i in torch.meshgrid(torch.arange(6), torch.arange(3), indexing="ij")
    )
    items = rows.take(unit, step)
    place = items.x_0, items.level, items.noise, items.conditions
    plain, anchored = (RewardWeighted(anchor=a).loss(policy, items)[0] for a in (0.0, 2.0))
    (now, _), (before, _) = policy.denoise(*place), policy.denoise(*place, weights="base")
    way = (now - before).square().mean()
    assert way > 0
    torch.testing.assert_close(anchored - plain, 2 * way)
    for weight in policy.model.trainable().values():
        weight.data.zero_()  # the adapter does nothing: no way to go, and no pull
    plain, anchored = (RewardWeighted(anchor=a).loss(policy, items)[0] for a in (0.0, 2.0))
    torch.testing.assert_close(anchored, plain)


def test_only_winners_are_trained_on(policy: Policy) -> None:
    method = PreferredImages()
    rollout = rollout_of(policy, method)
    rows = method.rows(rollout, stream(0, "rows"))
    winners = torch.stack([rollout.latents[i, k, -1] for i, k in ((0, 1), (1, 0), (2, 1))])
    assert torch.equal(rows.x_0[:, 0], winners)
    tags = replace(rollout, scores=torch.tensor([[1.0, 1], [0, 0], [1, 0]]))
    assert torch.equal(method.rows(tags, stream(0, "rows")).x_0[:, 0], rollout.latents[2:, 0, -1])


@pytest.mark.parametrize("method", [PreferredImages(), D3PO(skip_ties=True)])
def test_a_round_of_ties_changes_nothing(policy: Policy, method: Method[Any]) -> None:
    rollout = replace(rollout_of(policy, method), scores=torch.zeros(3, 2))
    rows = method.rows(rollout, stream(0, "rows"))
    assert len(rows) == 0
    before = weights(policy.model)
    optimizer = torch.optim.AdamW(list(policy.model.trainable().values()), 0.1)
    metrics = update(policy, method, rows, optimizer, Updates(), stream(0, "shuffle"))
    assert metrics == {"updates": 0}
    assert torch.equal(before, weights(policy.model))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DDPO, {"clip_range": 0}), (DDPO, {"buffer": 65}), (DDPO, {"buffer": 8}),
     (RewardWeighted, {"minimum": 32}), (DPOK, {"kl_weight": -1}),
     (DPOK, {"clip_range": 1}), (RewardWeighted, {"quantile": 1}),
     (RewardWeighted, {"anchor": -1})],
)  # fmt: skip
def test_options_without_a_meaning_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"needs .* these are .*Change them with --set"):
        kind(**options)


def test_images_become_rows(policy: Policy) -> None:
    rollout = rollout_of(policy, DDPO())
    rows = ImageRows.of(rollout)
    assert torch.equal(rows.x_next[3, 2], rollout.latents[1, 1, 3])
    assert torch.equal(rows.sampled[3, 2], rollout.means[1, 1, 2])
    assert rows.step[3].tolist() == [0, 1, 2, 3]
    item = rows.take(torch.tensor([3]), torch.tensor([2]))
    assert torch.equal(item.conditions["text"][0], rollout.conditions["text"][1])
