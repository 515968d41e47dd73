"""One denoising step as a Gaussian with mean `mean` and covariance `std`^2 I."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


def _mean_over_elements(x: Tensor) -> Tensor:
    """[N, ...] -> [N]."""
    return x.flatten(1).mean(1)


@dataclass(frozen=True)
class Gaussian:
    """N steps; densities are in nats per latent element (the mean over C, H, W, not the sum).

    Both published code bases (kvablack/ddpo-pytorch, yk7333/d3po) average here, so their clip
    ranges and temperatures assume this unit. Multiply by C*H*W for the joint density.
    """

    mean: Tensor
    """[N, C, H, W]."""
    std: Tensor
    """[N], above 0."""

    def _std(self) -> Tensor:
        return self.std.view(-1, *[1] * (self.mean.ndim - 1))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal `noise` [N, C, H, W]."""
        return self.mean + self._std() * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of `x`, [N]."""
        z = (x - self.mean) / self._std()
        constant = 0.5 * math.log(2 * math.pi)
        return _mean_over_elements(-0.5 * z.square()) - self.std.log() - constant

    def log_ratio(self, other_mean: Tensor, x: Tensor) -> Tensor:
        """log density(x) here minus that under `other_mean` and the same std, [N].

        Computed from the difference of the means: log std cancels exactly, where subtracting
        two log densities would leave its rounding error.
        """
        middle = (self.mean + other_mean) / 2
        return _mean_over_elements((self.mean - other_mean) * (x - middle)) / self.std.square()

    def kl(self, other_mean: Tensor) -> Tensor:
        """KL divergence to the Gaussian of `other_mean` and the same std, [N]."""
        return _mean_over_elements((self.mean - other_mean).square()) / (2 * self.std.square())
