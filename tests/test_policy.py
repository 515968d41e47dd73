"""A model as a policy: guidance, KL in closed form, and the pretrained weights beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.errors import UserError
from d3po_bench.models.stable_diffusion import StableDiffusion
from tests.conftest import disturb, loaded
from tests.rounds import PROMPTS


def test_guidance_is_u_plus_w_times_p_minus_u(micro_model: StableDiffusion) -> None:
    x, level = torch.randn(2, 4, 4, 4), torch.tensor([751, 1])
    conditions, empty = micro_model.encode(PROMPTS[:2]), micro_model.encode([""])
    with torch.no_grad():
        u = micro_model.output(x, level, empty.expand(2))
        p = micro_model.output(x, level, conditions)
        for w in (1.0, 5.0):
            guided = Policy(micro_model, steps=4, guidance=w).output(x, level, conditions)
            torch.testing.assert_close(guided, u + w * (p - u), rtol=1e-5, atol=1e-5)


def test_mean_log_ratio_on_own_samples_is_the_closed_form_kl(micro_model: StableDiffusion) -> None:
    disturb(micro_model, 0.02)
    policy = Policy(micro_model, steps=4)
    x, conditions = torch.randn(1, 4, 4, 4), micro_model.encode(["cat"])
    rng = torch.Generator().manual_seed(2)
    for i in range(4):
        number, level = torch.tensor([i]), policy.levels[i : i + 1]
        with torch.no_grad():
            tuned, base = (
                policy.step(x, number, conditions, weights=w) for w in ("current", "base")
            )
            error = policy.output(x, level, conditions) - policy.output(
                x, level, conditions, weights="base"
            )
        kl = tuned.kl(base.mean)
        weight = float(policy.table.output[i] ** 2 / (2 * policy.table.std[i] ** 2))
        torch.testing.assert_close(kl[0], weight * error.square().mean(), rtol=1e-3, atol=1e-9)
        count = 20_000
        many = Gaussian(tuned.mean.expand(count, -1, -1, -1), tuned.std.expand(count))
        drawn = many.sample(torch.randn(many.mean.shape, generator=rng))
        ratio = many.log_ratio(base.mean, drawn)
        spread = ratio.std() / math.sqrt(count)
        assert (ratio.mean() - kl[0]).abs() < 5 * spread + 1e-9
        assert kl[0] > 3 * spread  # else the line above could not fail


@pytest.mark.parametrize("full", [False, True])
def test_the_pretrained_weights_answer_bit_for_bit_after_training(full: bool, micro: Path) -> None:
    model = loaded(micro, full=full)
    x, level = torch.randn(3, 4, 4, 4), torch.tensor([1, 251, 751])
    conditions = model.encode(PROMPTS)
    with torch.no_grad():
        before = model.output(x, level, conditions)
        model.add_adapter(0)
        fresh = model.output(x, level, conditions)
        disturb(model)
        base = model.output(x, level, conditions, weights="base")
        trained = model.output(x, level, conditions)
    assert torch.equal(before, base)
    assert torch.equal(before, fresh)
    assert not torch.equal(before, trained)


def test_a_step_without_noise_among_those_trained_is_refused(micro_model: StableDiffusion) -> None:
    policy = Policy(micro_model, steps=4, eta=0)
    said = r"Step 1 of 4 adds no noise .* Use eta above 0, or .* --set skip_steps=4"
    with pytest.raises(UserError, match=said):
        policy.require_noise(4)
    policy.require_noise(0)
