"""A base model seen as a policy: the sampler's step as a Gaussian, and guidance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.process import (
    Sampler,
    Spacing,
    StepTable,
    even_levels,
    join,
    split,
    step_table,
)
from d3po_bench.errors import UserError
from d3po_bench.types import Conditions, Model, Step, Weights

SMALLEST_STD = 1e-4


class Policy:
    """A model with a sampler and a guidance weight; implements `types.Policy`.

    Step arithmetic is float32 whatever the network computes in.
    """

    def __init__(
        self,
        model: Model,
        *,
        steps: int = 20,
        eta: float = 1.0,
        guidance: float = 5.0,
        sampler: Sampler | Literal["auto"] = "auto",
        timestep_spacing: Spacing = "model",
        step_weight: Literal["equal", "inverse"] = "equal",
    ) -> None:
        """Tabulate the sampler's steps.

        Args:
            model: what answers.
            steps: T.
            eta: strength of the noise that each step adds; see `process.step_table`.
            guidance: w of classifier-free guidance; 1 switches it off.
            sampler: whose steps; auto: DDIM, or Flow-GRPO's SDE for a flow.
            timestep_spacing: where the steps begin and end.
            step_weight: of the gradient that comes through a step; "inverse" divides it by the
                step's `sensitivity`.
        """
        self.model = model
        self.guidance = guidance
        if sampler == "auto":
            sampler = "flow_sde" if model.prediction == "flow" else "ddim"
        even = timestep_spacing == "log_snr"
        process, ends = model.process, None if even else model.process.ends(steps)
        self.levels = even_levels(process, steps) if even else process.levels(steps)
        self._noisy, self._quiet = (
            step_table(process, self.levels, kind, strength, model.prediction, ends)
            for kind, strength in ((sampler, eta), ("ddim", 0.0))
        )
        self.table = self._noisy
        self._table = self.table.stacked().float().to(model.device)
        self._levels = self.levels.to(model.device)
        self._weight: Tensor | None = None
        if step_weight == "inverse":
            self._weight = (self.table.std / self.table.output.abs()).float().to(model.device)
        self._unconditional: Conditions | None = None

    @property
    def steps(self) -> int:
        """T."""
        return len(self.table.std)

    @property
    def sensitivity(self) -> Tensor:
        """[T] w: by how many nats per unit of noise z a step's log-density follows the network.

        For a network that predicts noise, and DDIM with eta 1, w = sqrt(r^2 - 1) with r^2 the ratio
        of the signal-to-noise ratios at the step's two ends. Infinite where a step adds no noise.
        """
        return self.table.output.abs() / self.table.std

    def add_noise_in(self, steps: range) -> None:
        """Let these steps alone add noise, and the others follow the ODE."""
        within = torch.zeros(self.steps, dtype=torch.bool)
        within[steps.start : steps.stop] = True
        parts = zip(vars(self._noisy).values(), vars(self._quiet).values(), strict=True)
        self.table = StepTable(*(noisy.where(within, quiet) for noisy, quiet in parts))
        self._table = self.table.stacked().float().to(self._table.device)

    def require_noise(self, steps: int) -> None:
        """Refuse a deterministic step among the first `steps`: it has no log-probability.

        Raises:
            UserError: naming the first such step.
        """
        quiet = self.table.std[:steps] < SMALLEST_STD
        if bool(quiet.any()):
            first = int(quiet.nonzero()[0])
            raise UserError(
                f"Step {first + 1} of {self.steps} adds no noise "
                f"(std {float(self.table.std[first]):.1e}), so it has no "
                "log-probability to train. Use eta above 0, or leave the last steps out of the "
                f"update: --set skip_steps={self.steps - first}."
            )

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        """The guided network output u + w (p - u), [N, C, H, W]; one call for both halves."""
        if self.guidance == 1:
            return self.model.output(x, s, conditions, weights=weights)
        if self._unconditional is None:
            self._unconditional = self.model.unconditional()
        both = self._unconditional.expand(len(x)).cat(conditions)
        output = self.model.output(torch.cat([x, x]), s.repeat(2), both, weights=weights)
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def step(
        self, x_t: Tensor, step: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Gaussian:
        """The distribution of the next latent.

        Args:
            x_t: [N, C, H, W] latents before the step.
            step: [N] int64, number of the step, 0 to T-1.
            conditions: of N.
            weights: which ones answer.
        """
        output = self.output(x_t, self._levels[step], conditions, weights=weights)
        if self._weight is not None and output.requires_grad:
            weight = _wide(self._weight[step], output)
            output.register_hook(lambda gradient: gradient * weight)
        x_coef, output_coef, std = self._table[step].unbind(1)
        return Gaussian(mean=_wide(x_coef, x_t) * x_t + _wide(output_coef, x_t) * output, std=std)

    def output_gap(self, step: Step, other_mean: Tensor, number: Tensor) -> Tensor:
        """Squared difference of the network outputs behind two means, mean over elements, [N].

        Args:
            step: with one of the means.
            other_mean: [N, C, H, W].
            number: [N] of the step.
        """
        coefficient = self._table[number, 1]
        return (step.mean - other_mean).square().flatten(1).mean(1) / coefficient.square()

    def denoise(
        self, x_0: Tensor, level: Tensor, noise: Tensor, conditions: Conditions, *,
        guided: bool = False, weights: Weights = "current",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What the network sees in `x_0` noised to `level`, and what is there.

        Both are the noise for a variance-preserving model, and noise minus image for a flow.

        Args:
            x_0: [N, C, H, W] clean latents.
            level: [N] any of the process's training levels.
            noise: [N, C, H, W] standard normal.
            conditions: of N.
            guided: the guided prediction instead of the conditional one.
            weights: which ones answer.
        """
        process, prediction = self.model.process, self.model.prediction
        alpha, sigma = (
            _wide(part(level.cpu()).float().to(x_0.device), x_0)
            for part in (process.alpha, process.sigma)
        )
        x = join(x_0, noise, alpha, sigma)
        answer = self.output if guided else self.model.output
        output = answer(x, level, conditions, weights=weights)
        if prediction == "flow":
            return output, noise - x_0
        return split(x, output, alpha, sigma, prediction)[1], noise


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, ...], to multiply `like` [N, ...] with."""
    return values.view(-1, *[1] * (like.ndim - 1))
