"""Preferred-image fine-tuning: the denoising loss on the images that won, and on nothing else.

The row "preferred images" of the D3PO paper's Table 1, which gives no detail; its code has none.
Images are drawn and compared as in D3PO; those with the largest reward of their prompt are kept,
unless all images of the prompt are equal. The loss is Ho et al. 2020, Eq. 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from d3po_bench.diffusion.policy import Policy
from d3po_bench.types import Method, Metrics, Reference, Rollout, Rows


@dataclass(frozen=True)
class Winners(Rows):
    """One row is one preferred image, with T random noise levels."""

    x_0: Tensor
    """[M, T, C, H, W]."""
    noise: Tensor
    """[M, T, C, H, W]."""
    t: Tensor
    """[M, T]."""
    text: Tensor
    """[M, T, L, E]."""


@dataclass(frozen=True)
class PreferredImages:
    """Same sampling as D3PO, supervised learning on the winners."""

    timesteps: Literal["all", "sampler"] = "all"
    """Noise levels of all 1000 training timesteps, or of the sampler's T."""
    guided: bool = False
    """Put guidance into the loss."""
    shared_noise: bool = True

    images_per_prompt: ClassVar[int] = 2
    least_images: ClassVar[int] = 2
    """One image wins against none."""
    reference: ClassVar[Reference | None] = None

    def rows(self, rollout: Rollout, rng: Generator) -> Winners:
        """The winners, each with T draws of a noise level and noise; none in a round of ties."""
        scores = rollout.scores
        best = scores == scores.amax(1, keepdim=True)
        prompt, image = (best & ~best.all(1, keepdim=True)).nonzero(as_tuple=True)
        x_0 = rollout.latents[prompt, image, -1]
        steps = len(rollout.timesteps)
        t = torch.randint(1000, (len(x_0), steps), generator=rng)
        if self.timesteps == "sampler":
            t = rollout.timesteps.cpu()[t % steps]
        noise = torch.randn((len(x_0), steps, *x_0.shape[1:]), generator=rng)
        return Winners(
            x_0=x_0.unsqueeze(1).expand(noise.shape),
            noise=noise.to(x_0.device),
            t=t.to(x_0.device),
            text=rollout.text[prompt].unsqueeze(1).expand(-1, steps, -1, -1),
        )

    def loss(self, policy: Policy, items: Winners) -> tuple[Tensor, Metrics]:
        """Mean squared error of the predicted noise."""
        error = policy.denoising_error(
            items.x_0, items.text, items.t, items.noise, guided=self.guided
        )
        return error.mean(), {"denoising_error": error.detach().mean()}


METHOD: type[Method[Winners]] = PreferredImages
