"""What noise is, without a network: noise levels, and the steps of the samplers between them.

A latent at level s is x_s = alpha(s) x_0 + sigma(s) eps. All tables are float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.types import Prediction, Process

Sampler = Literal["ddim", "flow_sde", "cps"]
"""DDIM (with eta 0 the ODE), Flow-GRPO's SDE, and Flow-CPS."""

Spacing = Literal["model", "log_snr"]
"""Levels as the model's scheduler has them, or evenly over the log of the signal-to-noise ratio."""


class VariancePreserving:
    """alpha^2 + sigma^2 = 1, as in DDPM and Stable Diffusion; levels are integer timesteps."""

    def __init__(
        self, alphas_cumprod: Tensor, *, timesteps: Callable[[int], Tensor] | None = None,
        last: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take the schedule of a model.

        Args:
            alphas_cumprod: [1000] alpha^2 of each training timestep.
            timesteps: number of steps T -> [T] the timesteps of a sampler; None for leading
                spacing with offset 1, so that T=20 gives 951, 901, ..., 1.
            last: alpha^2 that a sampler ends at; None for that of timestep 0.
        """
        self._timesteps = timesteps
        self.training_levels = torch.arange(len(alphas_cumprod))
        # Level -1 is where a sampler ends whose last step leaves no noise.
        self._alpha_bar = alphas_cumprod.cpu()
        self._last = 0
        if last is not None and bool(last != alphas_cumprod[0]):
            self._alpha_bar = torch.cat([self._alpha_bar, last.cpu().view(1)])
            self._last = -1

    def levels(self, steps: int) -> Tensor:
        """The model's timesteps, and the level that the last step ends at.

        Raises:
            ValueError: the number of steps does not fit the training timesteps.
        """
        total = len(self.training_levels)
        if not 1 <= steps < total:
            raise ValueError(f"steps must be 1 to {total - 1}, got {steps}")
        if self._timesteps is None:
            start = torch.arange(steps - 1, -1, -1) * (total // steps) + 1
        else:
            start = self._timesteps(steps)
        return torch.cat([start, torch.tensor([self._last])])

    def ends(self, steps: int) -> Tensor:
        """A whole stride below the timestep, as DDIM steps in diffusers whatever the spacing."""
        ends = self.levels(steps)[:-1] - len(self.training_levels) // steps
        return ends.where(ends >= 0, self._last)

    # The roots are taken in the table's own float32, as diffusers' add_noise does: torch's float32
    # root is not the rounded float64 root, and a denoising loss repeats its bits.

    def alpha(self, s: Tensor) -> Tensor:
        """See `types.Process`."""
        return self._alpha_bar.sqrt().double()[s]

    def sigma(self, s: Tensor) -> Tensor:
        """See `types.Process`."""
        return (1 - self._alpha_bar).sqrt().double()[s]

    def squares(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `types.Process`."""
        alpha_bar = self._alpha_bar.double()[s]
        return alpha_bar, 1 - alpha_bar

    def posterior_std(self, s: Tensor, s_next: Tensor) -> Tensor:
        """See `types.Process`; Song et al. 2021, Eq. 16."""
        (here, noise), (there, noise_next) = self.squares(s), self.squares(s_next)
        return (noise_next / noise * (1 - here / there)).clamp(min=0).sqrt()

    def network_time(self, s: Tensor) -> Tensor:
        """The timestep itself."""
        return s


class RectifiedFlow:
    """alpha = 1 - s, sigma = s, with the levels of diffusers' FlowMatchEulerDiscreteScheduler."""

    def __init__(self, *, shift: float = 1.0, mu: float | None = None, total: int = 1000) -> None:
        """Static shifting by `shift`, or by e^`mu`, which suits one image size.

        Args:
            shift: m in s -> m s / (1 + (m - 1) s); above 1 it spends more steps on high noise.
            mu: instead of `shift`, where the scheduler has `use_dynamic_shifting`.
            total: the network's time at s = 1.
        """
        self._shift = shift if mu is None else math.exp(mu)
        self._total = total
        # In float32 as in diffusers, whose levels would differ in the last bit otherwise.
        even = torch.arange(1, total + 1, dtype=torch.float32) / total
        self.training_levels = self._shifted(even)
        # Diffusers shifts the last level twice: in its __init__, then with all the others. It
        # does so only with a static shift.
        self._lowest = float(even[0] if mu is not None else self.training_levels[0])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], mu: float | None = None) -> RectifiedFlow:
        """The process of a FlowMatchEulerDiscreteScheduler's config.

        Args:
            config: of the scheduler.
            mu: the shift for the image size at hand, needed with `use_dynamic_shifting`.

        Raises:
            UserError: the scheduler has levels that cannot be reproduced here.
        """
        others = (
            "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
            "use_beta_sigmas", "stochastic_sampling",
        )  # fmt: skip
        unknown = [name for name in others if config.get(name)]
        if config.get("time_shift_type", "exponential") != "exponential":
            unknown.append("time_shift_type")
        if unknown:
            raise UserError(
                f"The model's noise scheduler sets {', '.join(unknown)}, which is not supported. "
                "Use a model whose scheduler works without."
            )
        total = config.get("num_train_timesteps", 1000)
        if not config.get("use_dynamic_shifting"):
            return cls(shift=config.get("shift", 1.0), total=total)
        if mu is None:
            raise UserError(
                "The model's noise scheduler shifts its levels with the image size "
                "(use_dynamic_shifting). Give mu, the shift for this size."
            )
        return cls(mu=mu, total=total)

    def _shifted(self, s: Tensor) -> Tensor:
        return self._shift * s / (1 + (self._shift - 1) * s)

    def levels(self, steps: int) -> Tensor:
        """The scheduler's `sigmas` after `set_timesteps(steps)`; the final one is 0."""
        even = torch.linspace(1, self._lowest, steps, dtype=torch.float64)
        return torch.cat([self._shifted(even).float(), torch.zeros(1)])

    def ends(self, steps: int) -> Tensor:
        """The next level of each step."""
        return self.levels(steps)[1:]

    def alpha(self, s: Tensor) -> Tensor:
        """See `types.Process`."""
        return 1 - s.double()

    def sigma(self, s: Tensor) -> Tensor:
        """See `types.Process`."""
        return s.double()

    def squares(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `types.Process`."""
        return self.alpha(s).square(), self.sigma(s).square()

    def posterior_std(self, s: Tensor, s_next: Tensor) -> Tensor:
        """See `types.Process`; finite at s = 1, where the latent says nothing about x_0."""
        kept = self.alpha(s) * self.sigma(s_next) / (self.alpha(s_next) * self.sigma(s))
        return self.sigma(s_next) * (1 - kept.square()).sqrt()

    def network_time(self, s: Tensor) -> Tensor:
        """1000 s."""
        return self._total * s


def even_levels(process: Process, steps: int) -> Tensor:
    """[T+1] training levels, descending, as evenly over log(alpha / sigma) as they can be.

    From the noisiest to the cleanest level that has such a logarithm; each level once. They are the
    timesteps that diffusers' DPMSolverMultistepScheduler has with `use_lu_lambdas` for T + 1 steps
    (Lu et al. 2022, 2206.00927), where no two of these are one.

    Raises:
        UserError: the model has fewer levels.
    """
    known = process.training_levels.cpu()
    signal, noise = process.squares(known)
    finite = (signal > 0) & (noise > 0)
    known, half = known[finite], (signal[finite] / noise[finite]).log() / 2
    known, half = known[half.argsort()], half.sort().values
    if (most := len(known) - 1) < steps:
        raise UserError(
            f"With timestep_spacing=log_snr this model has {most} steps at most. Use --set "
            f"sampling_steps={most}."
        )
    wanted = torch.linspace(float(half[0]), float(half[-1]), steps + 1, dtype=torch.float64)
    index = (wanted.unsqueeze(1) - half).abs().argmin(1)
    for i in range(steps - 1, -1, -1):  # the cleanest levels lie farther apart than small steps
        index[i] = index[i].clamp(min=i, max=int(index[i + 1]) - 1)
    return known[index]


def split(
    x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction
) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise, (x_0, eps), that a network sees in `x`.

    Args:
        x: latents at some level.
        output: the network's output there, shaped as `x`.
        alpha: that level's coefficient of x_0; its shape broadcasts with `x`, as `sigma`'s.
        sigma: its coefficient of the noise.
        prediction: what `output` is; "v_prediction" needs alpha^2 + sigma^2 = 1.
    """
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    total = alpha + sigma  # 1 for a rectified flow
    return (x - sigma * output) / total, (x + alpha * output) / total


def join(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Forward noising, alpha x_0 + sigma eps: the inverse of `split`."""
    return alpha * x_0 + sigma * eps


@dataclass(frozen=True)
class StepTable:
    """T denoising steps as Gaussians with the mean `x` x_t + `output` times the network's output.

    All tensors are [T] float64, in the order in which the steps are taken.
    """

    x: Tensor
    output: Tensor
    std: Tensor

    def stacked(self) -> Tensor:
        """[T, 3]."""
        return torch.stack((self.x, self.output, self.std), 1)


def step_table(
    process: Process, levels: Tensor, sampler: Sampler, eta: float, prediction: Prediction,
    ends: Tensor | None = None,
) -> StepTable:  # fmt: skip
    """The steps of a sampler down the levels.

    Every sampler has the mean alpha' x_0 + kept eps, where a prime marks the level that the step
    ends at: it replaces a part of the noise and moves x_0 on.

    Args:
        process: of the model.
        levels: [T+1] as `process.levels` returns them.
        sampler: which one.
        eta: the strength of the noise: DDIM's eta, or a in Flow-GRPO's SDE and Flow-CPS.
        prediction: what the network puts out.
        ends: [T] the level that each step is taken to, as of `process.ends`; None for the next.

    Raises:
        UserError: the network predicts the noise of a level that is noise alone.
    """
    here, there = levels[:-1], levels[1:] if ends is None else ends
    alpha2, sigma2 = process.squares(here)
    alpha2_next, _ = process.squares(there)
    std, kept = _noise(process, here, there, sampler, eta)
    alpha, sigma = alpha2.sqrt(), sigma2.sqrt()
    if prediction == "epsilon":
        if not bool(alpha2.all()):
            raise UserError(
                "The model predicts noise, and its scheduler starts where there is nothing else "
                "(rescale_betas_zero_snr), which says nothing of the picture. Use a model that "
                "predicts velocity, or a scheduler without."
            )
        # Like the general case below but for the last bit, on which published results depend.
        x = (alpha2_next / alpha2).sqrt()
        return StepTable(x=x, output=kept - x * sigma, std=std)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    x_0_of_x, eps_of_x = split(one, zero, alpha, sigma, prediction)
    x_0_of_output, eps_of_output = split(zero, one, alpha, sigma, prediction)
    return StepTable(
        x=alpha2_next.sqrt() * x_0_of_x + kept * eps_of_x,
        output=alpha2_next.sqrt() * x_0_of_output + kept * eps_of_output,
        std=std,
    )


def _noise(
    process: Process, here: Tensor, there: Tensor, sampler: Sampler, eta: float
) -> tuple[Tensor, Tensor]:
    """Of each step, the std of the noise added and the coefficient of the noise kept.

    DDIM is Song et al. 2021, Eq. 12. Flow-CPS (2509.05952) differs in the std alone; it narrows
    the distribution of x_0, the more the more steps there are. Flow-GRPO (2505.05470, Eq. 9) has
    std = g sqrt(s - s') with g = a sqrt(s / (1 - s)); the mean in the authors' form,
    x - v (s - s') - (x + (1 - s) v) std^2 / 2s, is (1 - s') x_0 + (s' - std^2 / 2s) eps. It is
    for latents (1 - s) x_0 + s eps: those of any process, divided by alpha + sigma.
    """
    alpha2_next, sigma2_next = process.squares(there)
    if sampler == "flow_sde":
        alpha2, sigma2 = process.squares(here)
        s = sigma2.sqrt() / (alpha2.sqrt() + sigma2.sqrt())
        scale = alpha2_next.sqrt() + sigma2_next.sqrt()
        s_next = sigma2_next.sqrt() / scale
        # g is infinite at s = 1. As the authors do, put the second level there.
        finite = torch.where(s == 1, s_next[0], s)
        std = eta * (s / (1 - finite) * (s - s_next)).sqrt()
        return scale * std, scale * (s_next - std.square() / (2 * s))
    if sampler == "cps":
        std = math.sin(eta * math.pi / 2) * sigma2_next.sqrt()
    else:
        std = eta * process.posterior_std(here, there)
    # If all noise is new, rounding can make the difference negative.
    return std, (sigma2_next - std.square()).clamp(min=0).sqrt()
