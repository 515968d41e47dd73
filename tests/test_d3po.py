"""D3PO's loss and pairing, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d3po_bench.d3po import D3PO, d3po_loss, extremes, preferred
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.errors import UserError

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
    from d3po_bench.types import Rollout

    rollout = Rollout(
        prompts=("cat",),
        text=torch.zeros(1, 2, 2),
        latents=torch.zeros(1, 2, 3, 1, 1, 1),
        means=torch.zeros(1, 2, 2, 1, 1, 1),
        timesteps=torch.tensor([2, 1]),
        scores=torch.zeros(1, 2),
    )
    with pytest.raises(ValueError, match=r"rollout\.reference"):
        D3PO().rows(rollout, torch.Generator())


@pytest.mark.parametrize("options", [{"clip_range": 1.0}, {"clip_range": 0.0}, {"beta": 0.0}])
def test_options_without_a_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="Expected clip_range between 0 and 1 and beta above 0"):
        D3PO(**options)  # type: ignore[arg-type]


def test_one_image_is_no_pair() -> None:
    with pytest.raises(UserError, match="at least 2 images of each prompt, got 1"):
        preferred(torch.zeros(3, 1))


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
    exact = Gaussian((mean.double() + change.double()), std.double()).log_ratio(
        mean.double(), x.double()
    )
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


def test_one_image_has_no_extremes() -> None:
    with pytest.raises(UserError, match="Expected at least 2 images"):
        extremes(torch.ones(3, 1))
