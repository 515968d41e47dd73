"""D3PO's loss and pairing, by hand, and its gradient on the micro model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d3po_bench.d3po import D3PO, d3po_loss
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.preferences import extremes, preferred
from d3po_bench.diffusion.sampling import with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.errors import UserError
from d3po_bench.models.stable_diffusion import StableDiffusion
from tests.conftest import disturb
from tests.rounds import gradient, near, rollout_of, rows_of, scored

ONE = torch.ones(1)


def test_loss_by_hand() -> None:
    # beta = 2, inside the clamp: 2 * (0.05 - (-0.05)) = 0.2, so -log sigmoid(0.2)
    loss = d3po_loss(torch.tensor([[0.05, -0.05]]), ONE, beta=2.0)
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-0.2))]))


def test_equal_policies_and_ties_cost_log_two() -> None:
    log_ratio = torch.tensor([[0.0, 0.0], [0.05, -0.05]])
    loss = d3po_loss(log_ratio, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.full((2,), math.log(2)))


def test_the_clamp_bounds_the_loss() -> None:
    # facts.d3po_loss_min_max_with_clamp of the published code
    loss = d3po_loss(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]), torch.ones(2))
    torch.testing.assert_close(loss, torch.tensor([0.683163980852314, 0.7032310503985292]))


def grad_of(log_ratio: list[float], clip: str, size: float = 0.1) -> Tensor:
    x = torch.tensor([log_ratio], requires_grad=True)
    d3po_loss(x, ONE, clip=clip, clip_range=size).sum().backward()  # type: ignore[arg-type]
    assert x.grad is not None
    return x.grad[0]


def test_no_gradient_outside_the_clamp_on_either_side() -> None:
    # log 1.1 = 0.0953 and log 0.9 = -0.1054
    assert grad_of([0.096, -0.106], "ratio").abs().sum() == 0
    assert grad_of([-0.106, 0.096], "ratio").abs().sum() == 0
    inside = grad_of([0.095, -0.105], "ratio")
    assert inside[0] < 0 < inside[1]


def test_one_sided_clip_pulls_a_fallen_winner_back() -> None:
    assert grad_of([0.2, -0.2], "one_sided").abs().sum() == 0
    fallen = grad_of([-0.2, 0.2], "one_sided")
    assert fallen[0] < 0 < fallen[1]


def test_no_clip_has_a_gradient_everywhere_and_none_is_nan() -> None:
    far = grad_of([90.0, -110.0], "none")
    assert far[0] < 0 < far[1]
    assert torch.isfinite(grad_of([1e4, -1e4], "ratio")).all()


def test_sum_is_mean_with_beta_and_clamp_scaled() -> None:
    # the joint density of 12 elements at beta: the mean at the same beta, by construction
    mean = torch.tensor([[0.02, -0.03], [0.2, 0.01]])
    by_mean = d3po_loss(mean, torch.ones(2))
    by_sum = d3po_loss(mean * 12, torch.ones(2), elements=12)
    torch.testing.assert_close(by_mean, by_sum)


def test_all_pairs_of_seven_tags_are_good_times_bad() -> None:
    scores = torch.tensor([[0.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0], [0.0] * 7])
    prompt, images, preference = preferred(scores)
    assert len(prompt) == 2 * 21
    decided = images[(preference > 0)]
    assert len(decided) == 5 * 2
    assert set(decided[:, 1].tolist()) == {2, 4}  # the losers
    assert prompt[preference > 0].unique().tolist() == [0]


def test_d3po_needs_its_reference() -> None:
    with pytest.raises(ValueError, match=r"needs rollout\.reference"):
        D3PO().rows(scored(["cat"], [[0.0, 0.0]]), torch.Generator())


@pytest.mark.parametrize("options", [{"clip_range": 1.0}, {"clip_range": 0.0}, {"beta": 0.0}])
def test_options_without_a_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="needs clip_range between 0 and 1 and beta above 0"):
        D3PO(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pairs", [preferred, extremes])
def test_one_image_is_no_pair(pairs: Callable[[Tensor], object]) -> None:
    with pytest.raises(
        UserError, match=r"at least 2 images of a prompt, not 1.*--set images_per_prompt=2"
    ):
        pairs(torch.zeros(3, 1))


def test_gaussian_by_hand() -> None:
    # mean 1, std 2, x = (3, 1): z = (1, 0); mean of -z^2/2 = -1/4
    step = Gaussian(torch.ones(1, 2, 1, 1), torch.tensor([2.0]))
    x = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)
    expected = -0.25 - math.log(2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob(x), torch.tensor([expected]))
    # KL of N(1, 4) to N(0, 4): 1 / 8
    zero = torch.zeros(1, 2, 1, 1)
    torch.testing.assert_close(step.kl(zero), torch.tensor([0.125]))
    # log ratio = mean (1 - 0)(x - 1/2) / 4 = ((2.5 + 0.5) / 2) / 4
    torch.testing.assert_close(step.log_ratio(zero, x), torch.tensor([0.375]))


def test_difference_form_keeps_what_subtraction_loses() -> None:
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 4, 8, 8, generator=rng)
    change = 1e-7 * torch.randn(1, 4, 8, 8, generator=rng)
    std = torch.tensor([0.02])
    x = mean + 0.02 * torch.randn(1, 4, 8, 8, generator=rng)
    # as far as float32 can hold the two means at all
    moved = mean + change
    exact = Gaussian(moved.double(), std.double()).log_ratio(mean.double(), x.double())
    difference = Gaussian(moved, std).log_ratio(mean, x)
    subtraction = Gaussian(moved, std).log_prob(x) - Gaussian(mean, std).log_prob(x)
    assert (difference - exact).abs() < 1e-9
    assert (subtraction - exact).abs() > 1e-8


def test_extremes_are_the_best_against_the_worst() -> None:
    scores = torch.tensor([[1.0, 4, 0, 2], [3, 3, 3, 3], [5, 5, 1, 1]])
    prompt, images, preference = extremes(scores)
    assert prompt.tolist() == [0, 1, 2]
    assert images.tolist() == [[1, 2], [0, 3], [0, 3]]
    assert preference.tolist() == [1, 0, 1]


def test_of_two_images_extremes_are_all_pairs() -> None:
    scores = torch.tensor([[1.0, 4], [4, 1], [2, 2]])
    for ours, theirs in zip(extremes(scores), preferred(scores), strict=True):
        assert torch.equal(ours, theirs)


# ---- on the micro model


def test_swapping_images_and_scores_leaves_the_loss(micro_model: StableDiffusion) -> None:
    disturb(micro_model)
    policy, method = Policy(micro_model, steps=4), D3PO()
    drawn = with_reference(policy, rollout_of(policy), method, untrained=False, batch=8)
    assert drawn.reference is not None
    swapped = replace(
        drawn,
        latents=drawn.latents.flip(1),
        means=drawn.means.flip(1),
        scores=drawn.scores.flip(1),
        reference=drawn.reference.flip(1),
    )
    wrong = replace(drawn, scores=drawn.scores.flip(1))
    every = torch.arange(12)
    same, also, other = (
        method.loss(policy, method.rows(r, stream(0, "rows")).take(every // 4, every % 4))[0]
        for r in (drawn, swapped, wrong)
    )
    assert torch.equal(same, also)
    assert not torch.equal(same, other)


def test_the_direction_at_the_reference_is_the_policy_gradient(
    micro_model: StableDiffusion,
) -> None:
    # At the reference, d loss = -beta/2 (d lp_w - d lp_l): REINFORCE with advantage +1 and -1.
    policy, method = Policy(micro_model, steps=4), D3PO()
    rows = rows_of(policy, method, untrained=True)
    items = rows.take(torch.arange(12) // 4, torch.arange(12) % 4)
    method.loss(policy, items)[0].backward()
    ours = gradient(micro_model)
    for weight in micro_model.trainable().values():
        weight.grad = None
    step = policy.step(
        items.x_t.flatten(0, 1), items.step.repeat_interleave(2), items.conditions.repeat(2)
    )
    log_prob = step.log_prob(items.x_next.flatten(0, 1)).view(-1, 2)
    (-(log_prob[:, 0] - log_prob[:, 1]).mean()).backward()
    reinforce = gradient(micro_model)
    near(ours, reinforce * method.beta / 2)
