"""Noise processes and samplers: by hand, against diffusers, and on Gaussian data exactly."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from d3po_bench.diffusion.process import (
    RectifiedFlow,
    Sampler,
    StepTable,
    VariancePreserving,
    join,
    split,
    step_table,
)
from d3po_bench.errors import UserError
from d3po_bench.types import Prediction, Process


def sd15() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip


ALPHA_BAR: Tensor = sd15().alphas_cumprod
VP = VariancePreserving(ALPHA_BAR)
FLOW = RectifiedFlow(shift=3)


def close(actual: Tensor, expected: Any, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


# ---- levels


def test_levels_of_stable_diffusion() -> None:
    assert VP.levels(20).tolist() == [*range(951, 0, -50), 0]
    assert VP.levels(1).tolist() == [1, 0]
    assert VP.training_levels.tolist() == list(range(1000))
    assert torch.equal(VP.network_time(VP.levels(20)), VP.levels(20))
    for steps in (0, 1000):
        with pytest.raises(ValueError, match="steps must be 1 to 999"):
            VP.levels(steps)


def test_coefficients_of_stable_diffusion_have_the_bits_of_float32_roots() -> None:
    s = VP.training_levels
    assert VP.alpha(s).dtype == VP.sigma(s).dtype == torch.float64
    assert torch.equal(VP.alpha(s).float(), ALPHA_BAR.sqrt())
    assert torch.equal(VP.sigma(s).float(), (1 - ALPHA_BAR).sqrt())
    for part, root in zip(VP.squares(s), (VP.alpha(s), VP.sigma(s)), strict=True):
        close(part, root.square(), atol=2e-7)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 5.0}])
def test_levels_of_a_static_shift_are_those_of_diffusers(config: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    process = RectifiedFlow.from_config(scheduler.config)
    assert torch.equal(process.training_levels.float(), scheduler.sigmas.flip(0))
    for steps in [*range(1, 51), 999]:
        scheduler.set_timesteps(steps)
        levels = process.levels(steps)
        assert levels.dtype == torch.float32  # as the network sees them; some devices have no more
        assert torch.equal(levels, scheduler.sigmas)
        assert torch.equal(process.network_time(levels).float()[:-1], scheduler.timesteps)


@pytest.mark.parametrize("mu", [0.5, 0.8, 1.15])
def test_levels_of_a_dynamic_shift_are_those_of_diffusers(mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    process = RectifiedFlow.from_config(scheduler.config, mu=mu)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps, mu=mu)
        close(process.levels(steps), scheduler.sigmas, atol=6e-8)  # one unit of float32


def test_levels_of_stable_diffusion_3_by_hand() -> None:
    # Between 1 and the once shifted .001 in even steps, then shifted: the last one twice.
    last = 3 * 0.001 / 1.002
    assert FLOW.levels(2)[1].item() == pytest.approx(3 * last / (1 + 2 * last), rel=1e-6)
    expected = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089, 0]
    close(FLOW.levels(10), expected, atol=6e-4)
    close(FLOW.network_time(torch.tensor([0.25])), [250])
    close(FLOW.alpha(torch.tensor([0.25])), [0.75])
    close(FLOW.sigma(torch.tensor([0.25])), [0.25])


def test_schedulers_with_other_levels_are_refused() -> None:
    for name in ("use_karras_sigmas", "use_beta_sigmas", "invert_sigmas"):
        config = FlowMatchEulerDiscreteScheduler(**{name: True}).config
        with pytest.raises(UserError, match=name):
            RectifiedFlow.from_config(config)
    with pytest.raises(UserError, match=r"shift_terminal, time_shift_type"):
        RectifiedFlow.from_config({"shift_terminal": 0.02, "time_shift_type": "linear"})
    with pytest.raises(UserError, match="mu"):
        RectifiedFlow.from_config({"use_dynamic_shifting": True})


# ---- split and join


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("alpha", [0.6, 0.96])
def test_split_undoes_join(prediction: Prediction, alpha: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 4, generator=rng, dtype=torch.float64)
    a = torch.tensor(alpha).double()
    s = 1 - a if prediction == "flow" else (1 - a.square()).sqrt()
    outputs = {"epsilon": eps, "v_prediction": a * eps - s * x_0, "flow": eps - x_0}
    found = split(join(x_0, eps, a, s), outputs[prediction], a, s, prediction)
    close(found[0], x_0)
    close(found[1], eps)


def test_a_flow_prediction_holds_on_a_variance_preserving_path() -> None:
    x_0, eps = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    a, s = torch.tensor(0.6), torch.tensor(0.8)
    found = split(join(x_0, eps, a, s), eps - x_0, a, s, "flow")
    close(found[0], x_0, atol=1e-6)
    close(found[1], eps, atol=1e-6)


# ---- steps by hand


def test_a_flow_step_by_hand() -> None:
    # x = 2 at s = .8, output v = -1: x_0 = 2 + .8 = 2.8, eps = 2 - .2 = 1.8; next s' = .5.
    levels = torch.tensor([0.8, 0.5]).double()
    ddim = 0.5 * math.sqrt(1 - (0.2 * 0.5 / (0.5 * 0.8)) ** 2)
    cps = 0.5 * math.sin(0.35 * math.pi)
    g2 = 0.7**2 * 0.8 / 0.2
    expected: dict[tuple[Sampler, float], tuple[float, float]] = {
        ("ddim", 0.0): (2 + 0.3, 0.0),
        ("ddim", 1.0): (0.5 * 2.8 + 1.8 * math.sqrt(0.25 - ddim**2), ddim),
        ("cps", 0.7): (0.5 * 2.8 + 1.8 * math.sqrt(0.25 - cps**2), cps),
        ("flow_sde", 0.7): (
            2 * (1 - g2 / 1.6 * 0.3) - (1 + g2 * 0.2 / 1.6) * -0.3,
            math.sqrt(g2 * 0.3),
        ),
    }
    for (sampler, eta), (mean, std) in expected.items():
        table = step_table(FLOW, levels, sampler, eta, "flow")
        close(table.x * 2 + table.output * -1, [mean], atol=1e-7)
        close(table.std, [std], atol=1e-7)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_the_first_flow_step_is_finite(sampler: Sampler) -> None:
    table = step_table(FLOW, FLOW.levels(4), sampler, 0.7, "flow")
    second = FLOW.levels(4).double()[1]
    fresh = {
        "ddim": second * 0.7,
        "cps": second * math.sin(0.35 * math.pi),
        "flow_sde": 0.7 * ((1 - second) / (1 - second)).sqrt(),
    }
    close(table.std[0], fresh[sampler])
    assert torch.stack([table.x, table.output, table.std]).isfinite().all()
    # DDIM and CPS end without noise, Flow-GRPO's SDE does not.
    s = FLOW.levels(4).double()[-2]
    close(table.std[-1], 0.7 * s / (1 - s).sqrt() if sampler == "flow_sde" else 0)


# ---- steps against other implementations


def published_ddim(steps: int, eta: float) -> StepTable:
    """The expressions, in their order, with which the published results were computed."""
    stride = len(ALPHA_BAR) // steps
    t = torch.arange(steps - 1, -1, -1) * stride + 1
    a = ALPHA_BAR.double().cpu()
    here, there = a[t], a[(t - stride).clamp(min=0)]
    std = eta * ((1 - there) / (1 - here) * (1 - here / there)).clamp(min=0).sqrt()
    x_coef = (there / here).sqrt()
    e_coef = (1 - there - std.square()).sqrt() - x_coef * (1 - here).sqrt()
    return StepTable(x=x_coef, output=e_coef, std=std)


@pytest.mark.parametrize("eta", [0, 0.5, 1])
def test_ddim_has_the_bits_of_the_published_results(eta: float) -> None:
    for steps in range(1, 1000):
        table = step_table(VP, VP.levels(steps), "ddim", eta, "epsilon")
        expected = published_ddim(steps, eta)
        for name in ("x", "output", "std"):
            # Of float64, so that rounding to float32 cannot differ on any machine.
            assert torch.equal(getattr(table, name), getattr(expected, name)), (steps, name)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_steps_are_those_of_diffusers(prediction: Prediction, eta: float) -> None:
    scheduler = DDIMScheduler.from_config(sd15().config, prediction_type=prediction)
    scheduler.alphas_cumprod = ALPHA_BAR.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    table = step_table(VP, VP.levels(20), "ddim", eta, prediction)
    x, output = torch.tensor([0.3, -2.0]).double(), torch.tensor([1.1, 0.4]).double()
    for i, t in enumerate(scheduler.timesteps):
        ends = [
            scheduler.step(
                output, t, x, eta=eta, variance_noise=torch.full_like(x, noise)
            ).prev_sample
            for noise in (0, 1)
        ]
        close(table.x[i] * x + table.output[i] * output, ends[0], atol=1e-9)
        close(table.std[i].expand(2), ends[1] - ends[0], atol=1e-9)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_without_noise_every_flow_step_is_that_of_diffusers(sampler: Sampler) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    table = step_table(FLOW, FLOW.levels(10), sampler, 0, "flow")
    x, output = torch.tensor([0.3, -2.0]), torch.tensor([1.1, 0.4])
    for i, t in enumerate(scheduler.timesteps):
        end = scheduler.step(output, t, x).prev_sample
        close(table.x[i] * x + table.output[i] * output, end, atol=1e-6)
    close(table.std, torch.zeros(10))


def flow_grpo(levels: Tensor, a: float) -> StepTable:
    """Flow-GRPO's SDE step as its authors write it, for x and v of one in turn."""
    s, s_next = levels[:-1], levels[1:]
    dt = s_next - s
    g = a * torch.sqrt(s / (1 - torch.where(s == 1, levels[1], s)))
    x = 1 + g**2 / (2 * s) * dt
    v = (1 + g**2 * (1 - s) / (2 * s)) * dt
    return StepTable(x=x, output=v, std=g * torch.sqrt(-1 * dt))


@pytest.mark.parametrize("steps", [1, 2, 10, 28])
def test_flow_sde_is_flow_grpos(steps: int) -> None:
    levels = FLOW.levels(steps).double()
    table = step_table(FLOW, FLOW.levels(steps), "flow_sde", 0.7, "flow")
    expected = flow_grpo(levels, 0.7)
    for name in ("x", "output", "std"):
        close(getattr(table, name), getattr(expected, name))


def test_flow_sde_of_a_variance_preserving_model_is_that_of_its_latents_scaled_to_a_flow() -> None:
    levels = VP.levels(20)
    alpha, sigma = (part.sqrt() for part in VP.squares(levels))
    scale = alpha + sigma
    table = step_table(VP, levels, "flow_sde", 0.7, "flow")
    expected = flow_grpo(sigma / scale, 0.7)
    close(table.x * scale[:-1] / scale[1:], expected.x)
    close(table.output / scale[1:], expected.output)
    close(table.std / scale[1:], expected.std)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_step_is_the_same_whatever_the_network_predicts(sampler: Sampler) -> None:
    levels = VP.levels(10)
    alpha, sigma = (part.sqrt()[:-1] for part in VP.squares(levels))
    x_0, eps = torch.full_like(alpha, 0.7), torch.full_like(alpha, -1.2)
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "flow": eps - x_0}
    means = []
    for prediction in get_args(Prediction):
        table = step_table(VP, levels, sampler, 0.5, prediction)
        means.append(table.x * join(x_0, eps, alpha, sigma) + table.output * outputs[prediction])
    close(means[1], means[0])
    close(means[2], means[0])


# ---- Gaussian data, for which the best network is known


SAMPLERS: list[tuple[Sampler, float]] = [
    ("ddim", 0), ("ddim", 0.5), ("ddim", 1), ("flow_sde", 0.7),
]  # fmt: skip


def moments(
    process: Process,
    steps: int,
    sampler: Sampler,
    eta: float,
    prediction: Prediction,
    mean: float,
    variance: float,
) -> tuple[Tensor, Tensor]:
    """Errors [T] of mean and variance along a chain with the best network; no sampling.

    For x_0 ~ N(m, v), E[x_0 | x] = m + k (x - alpha m), k = alpha v / (alpha^2 v + sigma^2), so
    that the best output, and with it every step, is linear in x.
    """  # fmt: skip
    levels = process.levels(steps)
    alpha, sigma = (part.sqrt() for part in process.squares(levels))
    table = step_table(process, levels, sampler, eta, prediction)
    due_mean, due_variance = alpha * mean, alpha.square() * variance + sigma.square()

    def best_output(x: Tensor, i: int) -> Tensor:
        x_0 = mean + alpha[i] * variance / due_variance[i] * (x - due_mean[i])
        eps = (x - alpha[i] * x_0) / sigma[i]
        outputs = {
            "epsilon": eps,
            "v_prediction": alpha[i] * eps - sigma[i] * x_0,
            "flow": eps - x_0,
        }
        return outputs[prediction]

    m, v, found = due_mean[0], due_variance[0], []
    for i in range(steps):
        ends = [table.x[i] * x + table.output[i] * best_output(x, i) for x in (m, m + 1)]
        m, v = ends[0], (ends[1] - ends[0]).square() * v + table.std[i].square()
        found.append(torch.stack([m, v]))
    errors = torch.stack(found, 1) - torch.stack([due_mean, due_variance])[:, 1:]
    return errors[0], errors[1]


CHAINS: list[tuple[Process, Prediction]] = [
    (VP, "epsilon"), (VP, "v_prediction"), (RectifiedFlow(), "flow"), (FLOW, "flow"),
]  # fmt: skip


@pytest.mark.parametrize("steps", [100, 400])
@pytest.mark.parametrize(("process", "prediction"), CHAINS)
def test_long_chains_keep_the_distribution(
    process: Process, prediction: Prediction, steps: int
) -> None:
    for sampler, eta in SAMPLERS:
        means, variances = moments(process, steps, sampler, eta, prediction, 1.5, 0.3)
        close(means, torch.zeros(steps))
        if sampler == "flow_sde" and process is not VP:
            # The first step adds a^2 of noise however short it is, so kept^2 + std^2 is
            # 1 + a^4 / 4; the chain forgets that as T^-(a^2).
            assert variances.abs().max() < eta**4 / 2
            variances = variances[steps // 2 :]
            close(variances, torch.zeros_like(variances), atol=0.2 / steps ** (eta**2))
        else:
            close(variances, torch.zeros(steps), atol=5 / steps)


@pytest.mark.parametrize("steps", [1, 2, 10, 400])
@pytest.mark.parametrize(("process", "prediction"), CHAINS)
def test_ddim_and_cps_keep_the_distribution_around_a_single_picture_exactly(
    process: Process, prediction: Prediction, steps: int
) -> None:
    samplers: list[Sampler] = ["ddim", "cps"]
    for sampler in samplers:
        for eta in (0, 0.7, 1):
            for errors in moments(process, steps, sampler, eta, prediction, 1.5, 0):
                close(errors, torch.zeros(steps))


@pytest.mark.parametrize(("process", "prediction"), CHAINS)
def test_cps_narrows_the_distribution_of_pictures(process: Process, prediction: Prediction) -> None:
    # Long chains reach the variance P that one step keeps: P = c^2 P + sigma^2 (1 - q^2) with
    # q = cos(a pi/2) and c = (alpha^2 v + q sigma^2) / (alpha^2 v + sigma^2).
    steps, q = 900, math.cos(0.35 * math.pi)
    _, errors = moments(process, steps, "cps", 0.7, prediction, 1.5, 0.3)
    alpha2, noise = process.squares(process.levels(steps)[1:])
    data = 0.3 * alpha2
    c = (data + q * noise) / (data + noise)
    kept = noise * (1 - q**2) / (1 - c.square())
    noisy = slice(10, 600)
    close((data + noise + errors)[noisy], kept[noisy], atol=0.01)
    assert errors[-1] < -0.08
