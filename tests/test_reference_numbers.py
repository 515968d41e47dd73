"""Our arithmetic against numbers recorded from the published code.

Tolerances are relative to the largest entry: float32 3e-5, float64 1e-5 (the published scheduler
keeps float32 coefficients), float64_full 1e-12.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.dpok import DPOK
from baselines.reward_weighted import softmax_weights
from d3po_bench.d3po import d3po_loss
from d3po_bench.diffusion.advantages import advantages, ppo_loss
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.preferences import preferred
from d3po_bench.diffusion.process import VariancePreserving
from d3po_bench.errors import UserError
from d3po_bench.models.embedded import recipe
from d3po_bench.types import Conditions, Prediction, Weights
from eval.scorers.jpeg_size import JpegSize
from tests.points import Points
from tests.rounds import dpok_losses, scored

Numbers = dict[str, Any]

TOLERANCE = {"float32": 3e-5, "float64": 1e-5, "float64_full": 1e-12}


def alphas(dtype: str = "float32") -> Tensor:
    """Stable Diffusion 1.5's alpha_bar; for float64_full without any float32 on the way."""
    if dtype != "float64_full":
        scheduler_alphas: Tensor = recipe.new_scheduler().alphas_cumprod
        return scheduler_alphas
    roots = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0)


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "float32" else torch.float64


class Says(Points):
    """A model that answers what a recorded network did."""

    latent_shape: tuple[int, ...] = (4, 8, 8)

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction = "epsilon") -> None:
        super().__init__(torch.device("cpu"))
        self.process = VariancePreserving(alphas_cumprod)
        self.prediction = prediction
        self.said = torch.empty(0)

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        return self.said


class Steps:
    """Denoising steps of Stable Diffusion 1.5 in the precision of a recorded case."""

    def __init__(
        self, dtype: str, steps: int, eta: float = 1.0, prediction: Prediction = "epsilon"
    ) -> None:
        self.dtype = torch_dtype(dtype)
        self.model = Says(alphas(dtype), prediction)
        self.policy = Policy(self.model, steps=steps, eta=eta, guidance=1.0)
        self.table = self.policy.table

    def number(self, timesteps: list[int]) -> Tensor:
        """[N] the numbers of the steps from these timesteps."""
        return torch.tensor([self.policy.levels.tolist().index(t) for t in timesteps])

    def step(self, x: Tensor, output: Tensor, timesteps: list[int]) -> Gaussian:
        """The step from `x` [N, ...] with the network's output."""
        number = self.number(timesteps)
        if self.dtype == torch.float32:
            self.model.said = output
            return self.policy.step(x, number, Conditions({}))
        wide = (-1, *[1] * (x.ndim - 1))  # Policy.step is float32: the same from its table
        mean = self.table.x[number].view(wide) * x + self.table.output[number].view(wide) * output
        return Gaussian(mean, self.table.std[number])


def close(ours: Tensor, recorded: Any, tolerance: float) -> None:
    expected = torch.tensor(recorded, dtype=torch.float64)
    error = (ours.detach().double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), f"off by {error:.3e}"


@pytest.mark.parametrize(
    ("key", "steps", "eta"),
    [("sd15_T20_eta1", 20, 1.0), ("sd15_T20_eta0.5", 20, 0.5), ("sd15_T50_eta1", 50, 1.0)],
)
def test_step_table(reference_numbers: Numbers, key: str, steps: int, eta: float) -> None:
    table = reference_numbers["schedule_table"][key]
    ours = Steps("float64_full", steps, eta)
    assert ours.policy.levels[:-1].tolist() == [row["t"] for row in table]
    close(ours.table.x, [row["mean_coef_x"] for row in table], 1e-5)
    close(ours.table.output, [row["mean_coef_eps"] for row in table], 1e-5)
    close(ours.table.std, [row["sigma"] for row in table], 1e-5)


def ddim_cases(numbers: Numbers) -> list[Numbers]:
    cases: list[Numbers] = numbers["ddim_step"]["cases"]
    assert len(cases) == 80
    return cases


def test_ddim_step_samples_replays_and_differentiates(reference_numbers: Numbers) -> None:
    inputs = reference_numbers["ddim_step"]["inputs"]
    for case in ddim_cases(reference_numbers):
        dtype, tolerance = torch_dtype(case["dtype"]), TOLERANCE[case["dtype"]]
        output, x, noise = (
            torch.tensor(inputs[k], dtype=dtype) for k in ("model_output", "sample", "noise")
        )
        ours = Steps(case["dtype"], case["T"], case["eta"], case["prediction_type"])
        timesteps = [case["t"]] * len(x)
        step = ours.step(x, output, timesteps)
        rng = torch.Generator().manual_seed(case["noise_seed"])
        x_next = step.sample(torch.randn(x.shape, generator=rng, dtype=dtype))
        close(x_next, case["prev_sample"], tolerance)
        close(step.log_prob(x_next), case["log_prob_sampling"], tolerance)
        replayed = (output + 0.05 * noise).requires_grad_()
        log_prob = ours.step(x, replayed, timesteps).log_prob(x_next)
        log_prob.sum().backward()
        close(log_prob, case["log_prob_replay"], tolerance)
        recorded = case.get("grad_log_prob_replay_wrt_model_output")
        if recorded is not None:  # every case but the float64 ones
            assert replayed.grad is not None
            close(replayed.grad, recorded, tolerance)


def test_ddim_step_of_mixed_timesteps(reference_numbers: Numbers) -> None:
    inputs = reference_numbers["ddim_step"]["inputs"]
    case = reference_numbers["ddim_step"]["mixed_timesteps"]
    output, x = (torch.tensor(inputs[k], dtype=torch.float64) for k in ("model_output", "sample"))
    rng = torch.Generator().manual_seed(case["noise_seed"])
    noise = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    x_next = Steps("float64_full", 20).step(x, output, case["t"]).sample(noise)
    close(x_next, case["prev_sample"], 1e-12)


@pytest.mark.parametrize("corner", ["eta_0", "set_alpha_to_one_last_step"])
def test_steps_without_noise_are_refused(reference_numbers: Numbers, corner: str) -> None:
    # The published code returns nan log-probabilities here (or hides it behind a clamp).
    assert corner in reference_numbers["ddim_step"]
    table = alphas().clone()
    if corner != "eta_0":
        table[0] = 1.0
    policy = Policy(Says(table), steps=20, eta=0.0 if corner == "eta_0" else 1.0)
    with pytest.raises(UserError, match=r"Step \d+ of 20 adds no noise .*Use eta above 0"):
        policy.require_noise(20)


def winner_first(h: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The published (h0, h1) form as ours: [N, 2] with the winner first, and 1 or 0 for a tie."""
    swap = (h[..., 0] < 0).unsqueeze(-1)
    pair = torch.stack([first, second], -1)
    return torch.where(swap, pair.flip(-1), pair), h[..., 0].abs()


def test_d3po_loss(reference_numbers: Numbers) -> None:
    for case in reference_numbers["d3po_loss"]["cases"]:
        dtype = torch_dtype(case["dtype"])
        tolerance = TOLERANCE[case["dtype"]]
        d0, d1 = (
            torch.tensor(case[k], dtype=dtype, requires_grad=True) for k in ("delta0", "delta1")
        )
        h = torch.tensor(case["h"], dtype=dtype).expand(len(d0), 2)
        loss = d3po_loss(*winner_first(h, d0, d1))
        close(loss, case["loss_each"], tolerance)
        close(loss.mean(), case["loss_mean"], tolerance)
        loss.mean().backward()
        for delta, key in ((d0, "grad_lp0_of_mean"), (d1, "grad_lp1_of_mean")):
            assert delta.grad is not None
            # Published: exp before clamp, so 0 * inf = nan at ratios past e^88. Ours is 0 there.
            close(delta.grad, [0.0 if g == "nan" else g for g in case[key]], max(tolerance, 1e-6))


def test_d3po_loss_of_a_batch_with_a_tie(reference_numbers: Numbers) -> None:
    case = reference_numbers["d3po_loss"]["batch_with_tie"]
    d0, d1 = (
        torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in ("lp0", "lp1")
    )
    loss = d3po_loss(*winner_first(torch.tensor(case["h"], dtype=torch.float64), d0, d1)).mean()
    loss.backward()
    close(loss, case["loss"], 1e-5)
    assert d0.grad is not None
    assert d1.grad is not None
    close(d0.grad, case["grad_lp0"], 1e-5)
    close(d1.grad, case["grad_lp1"], 1e-5)


def test_d3po_chain(reference_numbers: Numbers) -> None:
    chain = reference_numbers["d3po_chain"]
    ours = Steps("float64_full", chain["T"], chain["eta"])
    for case in chain["cases"]:
        x, reference, policy, x_next = (
            torch.tensor(case[k], dtype=torch.float64)
            for k in ("x", "ref_pred", "policy_pred", "next")
        )
        policy.requires_grad_()
        ratios = []
        for i in (0, 1):  # the image of the pair; the batch is the other axis
            timesteps = [case["t"]] * x.shape[1]
            mean = ours.step(x[i], reference[i], timesteps).mean
            step = ours.step(x[i], policy[i], timesteps)
            ratios.append(step.log_ratio(mean, x_next[i]))
            close(step.log_prob(x_next[i]), case["log_prob_policy"][i], 1e-12)
        low, high = math.log(0.9), math.log(1.1)
        close(torch.stack(ratios).clamp(low, high).exp(), case["ratio"], 1e-9)
        h = torch.tensor(case["h"], dtype=torch.float64)
        loss = d3po_loss(*winner_first(h, *ratios)).mean()
        loss.backward()
        close(loss, case["loss"], 1e-12)
        assert policy.grad is not None
        close(policy.grad, case["grad_policy_pred"], 1e-10)


@pytest.mark.parametrize("kind", ["scalar", "multi"])
def test_compare(reference_numbers: Numbers, kind: str) -> None:
    case = reference_numbers["compare"][kind]
    scores = torch.stack([torch.tensor(case["r0"]), torch.tensor(case["r1"])], 1)
    _, images, preference = preferred(scores)
    sign = torch.where(images[:, 0] == 0, 1.0, -1.0) * preference
    assert torch.stack([sign, -sign], 1).tolist() == case["h"]


def jpeg_images() -> dict[str, Tensor]:
    x = torch.arange(64.0)
    ramp_x, ramp_y = x.expand(64, 64), x.view(64, 1).expand(64, 64)
    i, j = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")[0]
    return {
        "constant_half": torch.full((3, 64, 64), 0.5),
        "gradient": torch.stack([ramp_x / 63, ramp_y / 63, (ramp_x + ramp_y) / 126]),
        "checker4": ((i // 4 + j // 4) % 2).float().expand(3, 64, 64),
        "noise_seed0": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "noise_smooth": smooth,
        "out_of_range": torch.linspace(-0.5, 1.5, 12288).view(3, 64, 64),
    }


def test_jpeg_reward(reference_numbers: Numbers) -> None:
    case = reference_numbers["jpeg_reward"]
    made = jpeg_images()
    images = torch.stack([made[name] for name in case["names"]])
    uint8 = images.clamp(0, 1).mul(255).round().to(torch.uint8)
    sums = {name: int(u.long().sum()) for name, u in zip(case["names"], uint8, strict=True)}
    assert sums == case["uint8_checksums"]
    sizes = JpegSize()(uint8, [""] * len(uint8))
    close(sizes, case["incompressibility"], 0.003 / max(case["incompressibility"]))


# ---- the baselines


@pytest.mark.parametrize(("buffer", "minimum"), [(16, 16), (4, 2)])
def test_per_prompt_advantages(reference_numbers: Numbers, buffer: int, minimum: int) -> None:
    history: dict[str, list[float]] = {}
    for update in reference_numbers["stat_tracker"]["updates"]:
        rewards = torch.tensor(update["rewards"], dtype=torch.float64)
        rollout = scored(update["prompts"], rewards.unsqueeze(1), history)
        recorded = update[f"advantages_buf{buffer}_min{minimum}"]
        close(advantages(rollout, buffer, minimum).flatten(), recorded, 1e-6)
        for prompt, reward in zip(update["prompts"], update["rewards"], strict=True):
            history.setdefault(prompt, []).append(reward)
    final = reference_numbers["stat_tracker"]["final_stats_buf16_min16"]
    for prompt, expected in final.items():
        kept = torch.tensor(history[prompt][-16:], dtype=torch.float64)
        assert len(kept) == expected["count"]
        assert kept.mean().item() == pytest.approx(expected["mean"])


def test_whole_number_rewards_are_not_cut(reference_numbers: Numbers) -> None:
    trap = reference_numbers["stat_tracker"]["int_reward_trap"]
    rollout = scored(trap["prompts"], torch.tensor(trap["rewards"]).unsqueeze(1))
    assert trap["advantages"] == [-1, 0, 1]  # the published code: (1 - 2) / 0.8165 cut to -1
    close(advantages(rollout).flatten(), [-1.2247434, 0.0, 1.2247434], 1e-6)


@pytest.mark.parametrize("code", ["ddpo_d3po_repo", "ddpo_kvablack"])
def test_ddpo_loss(reference_numbers: Numbers, code: str) -> None:
    numbers = reference_numbers["ddpo_dpok_loss"]
    recorded = numbers[code]
    log_ratio = torch.tensor(numbers["delta"], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor(numbers["advantages"], dtype=torch.float64).clamp(-5, 5)
    loss = ppo_loss(log_ratio, advantage, numbers["clip_range"])
    close(loss.mean(), recorded["loss"], 1e-9)
    (gradient,) = torch.autograd.grad(loss.mean(), log_ratio)
    close(gradient, recorded["grad_log_prob"], 1e-9)
    close(log_ratio.exp(), recorded["ratio"], 1e-9)
    for ours, one in zip(loss, recorded["batch_size_1"], strict=True):
        assert ours.item() == pytest.approx(one["loss"], abs=1e-9)


def test_dpok_of_the_published_code_is_ddpo_for_one_image(reference_numbers: Numbers) -> None:
    numbers = reference_numbers["ddpo_dpok_loss"]
    single = numbers["dpok_d3po_repo"]["batch_size_1"]
    assert [one["kl"] for one in single] == [0.0] * 8
    log_ratio = torch.tensor(numbers["delta"], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor(numbers["advantages"], dtype=torch.float64).clamp(-5, 5)
    loss = dpok_losses(DPOK(kl="none", clip_range=numbers["clip_range"]), log_ratio, advantage)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    close(loss, [one["loss"] for one in single], 1e-9)
    close(gradient, [one["grad"][0] for one in single], 1e-9)


def test_dpok_kl(reference_numbers: Numbers) -> None:
    numbers = reference_numbers["derived_dpok_kl"]
    trained, base = (
        torch.tensor(numbers[k], dtype=torch.float64) for k in ("policy_pred", "pretrained_pred")
    )
    noise_mse = (trained - base).square().flatten(1).mean(1)
    close(noise_mse, numbers["derived_google_noise_mse_per_sample"], 1e-9)
    ours = Steps("float64_full", 20)
    x = torch.randn(base.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for case in numbers["rows"]:
        timesteps = [case["t"]] * 2
        prediction = trained.clone().requires_grad_()
        step = ours.step(x, prediction, timesteps)
        pretrained = ours.step(x, base, timesteps).mean
        kl = step.kl(pretrained)
        close(kl, case["derived_gaussian_kl_mean_dims"], 1e-5)
        (gradient,) = torch.autograd.grad(kl.sum(), prediction)
        close(gradient, case["derived_grad_policy_pred"], 1e-5)
        # Policy.output_gap is the same distance without the step's weight.
        table, number = ours.table, ours.number(timesteps)
        weight = table.output[number].square() / (2 * table.std[number].square())
        close(kl / weight, noise_mse.tolist(), 1e-9)


def test_rwr_weights(reference_numbers: Numbers) -> None:
    numbers = reference_numbers["rwr_weights"]
    rewards = torch.tensor(numbers["rewards"], dtype=torch.float64)
    for case in numbers["cases"]:
        prompts = numbers["prompts"] if case["by_prompt"] else None
        close(softmax_weights(rewards, case["inverse_temperature"], prompts), case["weights"], 1e-9)
