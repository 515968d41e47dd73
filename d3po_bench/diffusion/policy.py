"""A base model seen as a policy: the sampler's step as a Gaussian, and guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.errors import UserError
from d3po_bench.types import Model

SMALLEST_STD = 1e-4


@dataclass(frozen=True)
class Schedule:
    """DDIM with eta (Song et al. 2021, Eq. 12): `mean = x_coef x + e_coef e`, per timestep.

    Leading spacing with offset 1; the step out of the last timestep lands on timestep 0, whose
    alpha_bar is the final one. With eta 1 this is the DDPM posterior of the strided chain.
    All tensors are indexed by step 0..T-1 and computed in float64.
    """

    timesteps: Tensor
    """[T] int64, descending: T=20 gives 951, 901, ..., 1."""
    x_coef: Tensor
    e_coef: Tensor
    std: Tensor
    alpha: Tensor
    """[T] alpha_bar at each timestep."""

    @classmethod
    def ddim(cls, alphas_cumprod: Tensor, steps: int, eta: float = 1.0) -> Schedule:
        """The schedule of `steps` denoising steps.

        Args:
            alphas_cumprod: [1000] alpha_bar of each training timestep.
            steps: T, at least 1 and at most the number of training timesteps.
            eta: 1 adds the posterior's noise, 0 none.

        Raises:
            ValueError: the number of steps does not fit the training timesteps.
        """
        total = len(alphas_cumprod)
        if not 1 <= steps < total:
            raise ValueError(f"steps must be 1 to {total - 1}, got {steps}")
        stride = total // steps
        t = torch.arange(steps - 1, -1, -1) * stride + 1
        a = alphas_cumprod.double().cpu()
        here, there = a[t], a[(t - stride).clamp(min=0)]
        std = eta * ((1 - there) / (1 - here) * (1 - here / there)).clamp(min=0).sqrt()
        x_coef = (there / here).sqrt()
        e_coef = (1 - there - std.square()).sqrt() - x_coef * (1 - here).sqrt()
        return cls(timesteps=t, x_coef=x_coef, e_coef=e_coef, std=std, alpha=here)

    def require_noise(self) -> None:
        """Refuse a schedule in which some step is deterministic: it has no log-probability.

        Raises:
            UserError: naming the first such timestep.
        """
        quiet = self.std < SMALLEST_STD
        if bool(quiet.any()):
            first = int(quiet.nonzero()[0])
            raise UserError(
                f"Expected noise in every denoising step, got std {float(self.std[first]):.1e} at "
                f"timestep {int(self.timesteps[first])}. Training needs eta above 0 and a noise "
                "schedule that does not start at alpha_bar = 1."
            )


class Policy:
    """A model with a schedule and a guidance weight.

    Every method needs only `step` and `denoising_error`. Step arithmetic is float32 whatever
    the network computes in.
    """

    def __init__(
        self, model: Model, *, steps: int = 20, eta: float = 1.0, guidance: float = 5.0
    ) -> None:
        """`steps` T, `eta` of DDIM, `guidance` w of classifier-free guidance (1: off)."""
        self.model = model
        self.guidance = guidance
        self.schedule = Schedule.ddim(model.alphas_cumprod, steps, eta)
        s, device = self.schedule, model.device
        position = torch.zeros(len(model.alphas_cumprod), dtype=torch.int64)
        position[s.timesteps] = torch.arange(steps)
        self._position = position.to(device)
        table = torch.stack([s.x_coef, s.e_coef, s.std, s.alpha], 1)
        self._table = table.float().to(device)
        self._alphas = model.alphas_cumprod.float().to(device)
        self._null: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:
        """[T] int64 on the model's device, descending."""
        return self.schedule.timesteps.to(self.model.device)

    def noise(self, x_t: Tensor, t: Tensor, text: Tensor, *, frozen: bool = False) -> Tensor:
        """The guided network output u + w (p - u), [N, C, H, W]; one call for both halves."""
        if self.guidance == 1:
            return self.model.noise(x_t, t, text, frozen=frozen)
        if self._null is None:
            self._null = self.model.encode([""])
        both = torch.cat([self._null.expand_as(text), text])
        output = self.model.noise(x_t.repeat(2, 1, 1, 1), t.repeat(2), both, frozen=frozen)
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def step(self, x_t: Tensor, t: Tensor, text: Tensor, *, frozen: bool = False) -> Gaussian:
        """The distribution of the next latent.

        Args:
            x_t: [N, C, H, W] latents before the step.
            t: [N] int64, each one of the schedule's timesteps.
            text: [N, L, E].
            frozen: with the pretrained network in place of the fine-tuned one.
        """
        output = self.noise(x_t, t, text, frozen=frozen)
        row = self._table[self._position[t]]
        return step_gaussian(x_t, output, row, self.model.prediction)

    def noise_gap(self, step: Gaussian, other_mean: Tensor, t: Tensor) -> Tensor:
        """Squared difference of the noise predictions behind two means, mean over elements, [N].

        The means differ by e_coef times the noises, so this is the step's KL times
        2 std^2 / e_coef^2.
        """
        e_coef = self._table[self._position[t], 1]
        return (step.mean - other_mean).square().flatten(1).mean(1) / e_coef.square()

    def denoising_error(
        self, x_0: Tensor, text: Tensor, t: Tensor, noise: Tensor, *, guided: bool = False
    ) -> Tensor:
        """Squared error of the noise prediction, mean over elements, [N].

        Args:
            x_0: [N, C, H, W] clean latents.
            text: [N, L, E].
            t: [N] int64, any training timestep.
            noise: [N, C, H, W] standard normal.
            guided: of the guided prediction instead of the conditional one.
        """
        predicted = self.predicted_noise(x_0, text, t, noise, guided=guided)
        return (predicted - noise).square().flatten(1).mean(1)

    def predicted_noise(
        self, x_0: Tensor, text: Tensor, t: Tensor, noise: Tensor, *,
        guided: bool = False, frozen: bool = False,
    ) -> Tensor:  # fmt: skip
        """The noise [N, C, H, W] that is seen in `x_0` noised to `t`; see `denoising_error`."""
        a = self._alphas[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        predict = self.noise if guided else self.model.noise
        output = predict(x_t, t, text, frozen=frozen)
        if self.model.prediction == "v_prediction":
            output = a.sqrt() * output + (1 - a).sqrt() * x_t
        return output


def step_gaussian(
    x_t: Tensor, output: Tensor, row: Tensor, prediction: Literal["epsilon", "v_prediction"]
) -> Gaussian:
    """One DDIM step from a (guided) network output.

    Args:
        x_t: [N, C, H, W].
        output: [N, C, H, W]; the predicted noise, or the velocity.
        row: [N, 4]; x_coef, e_coef, std and alpha_bar of each item's step.
        prediction: what `output` is.
    """
    x_coef, e_coef, std, alpha = row.unbind(1)
    x_coef, e_coef, alpha = (c.view(-1, 1, 1, 1) for c in (x_coef, e_coef, alpha))
    noise = output
    if prediction == "v_prediction":
        noise = alpha.sqrt() * output + (1 - alpha).sqrt() * x_t
    return Gaussian(mean=x_coef * x_t + e_coef * noise, std=std)
