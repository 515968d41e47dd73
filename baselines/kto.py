"""Diffusion-KTO: images that are liked or disliked, each by itself (Li et al. 2024, 2404.04465).

No pairs are needed: the loss raises the utility of liked images and lowers that of disliked ones,
where the gain of an image is by how much the denoising error has fallen below the pretrained
model's. It is measured from the mean gain of the whole optimizer step, which `update` works out
over all micro-batches and ranks; in released code (jacklishufan/diffusion-kto) that mean depends on
how a batch is split. That takes one more pass without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from d3po_bench.diffusion.preferences import denoising_error, error_gap, liking
from d3po_bench.errors import UserError
from d3po_bench.types import Method, Metrics, NoisedRows, Policy, Reference, Rollout


@dataclass(frozen=True)
class LikedRows(NoisedRows):
    """One row is a final image, liked or disliked."""

    liking: Tensor
    """[M, T]; 1 liked, -1 disliked."""
    shared: Tensor
    """[M, T]; mean gain over all items of the optimizer step, which `update` fills in."""
    own: Tensor
    """[M, T]; each item's gain, likewise: going backward needs no second pretrained error."""


def kto_loss(gain: Tensor, mean_gain: Tensor, liking: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(beta y (g - z)), with z = max(0, mean gain), without gradient.

    Args:
        gain: [N], pretrained model's error less the policy's.
        mean_gain: [N], over all items of the optimizer step.
        liking: [N]; 1 liked, -1 disliked.
        beta: weight of the errors.

    Returns:
        Loss of each image, [N]; 1/2 where the policy equals the pretrained model.
    """
    return 1 - torch.sigmoid(beta * liking * (gain - mean_gain.detach().clamp(min=0)))


@dataclass(frozen=True)
class KTO:
    """beta and weights are the released code's, which trains whole networks."""

    beta: float = 1000.0
    """Weight of the errors; the larger, the sooner an image has been learned."""
    liked: Literal["above_mean", "above_value"] = "above_mean"
    """An image is liked if its score is above the mean of its prompt's images, or above `value`,
    as tags are judged; below, it is disliked, and equal ones are left out."""
    value: float = 0.0
    """What `above_value` compares scores with."""
    liked_weight: float = 1.0
    """Of the loss of liked images, lambda: raise it where few are liked."""
    disliked_weight: float = 1.0
    """Of the loss of disliked images."""
    timesteps: Literal["all", "sampler"] = "all"
    """Noise levels of all 1000 training timesteps, or of the sampler's T."""
    shared_noise: bool = False
    """Start the images of a prompt from the same noise."""

    images_per_prompt: ClassVar[int] = 2
    reference: ClassVar[Reference | None] = None
    needs_chain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options without a meaning.

        Raises:
            UserError: naming them.
        """
        if not (self.beta > 0 and self.liked_weight >= 0 and self.disliked_weight >= 0):
            raise UserError(
                "KTO needs beta above 0, and liked_weight and disliked_weight of at least 0; these "
                f"are {self.beta}, {self.liked_weight} and {self.disliked_weight}. Change them "
                "with --set."
            )

    @property
    def least_images(self) -> int:
        """One image is its prompt's mean."""
        return 2 if self.liked == "above_mean" else 1

    @property
    def search(self) -> dict[str, Any]:
        """See `launch.space`."""
        return {"beta": (30.0, 10_000.0)}

    def rows(self, rollout: Rollout, rng: Generator) -> LikedRows:
        """Liked and disliked images, each with T draws of a noise level and noise."""
        found = liking(rollout.scores, None if self.liked == "above_mean" else self.value)
        prompt, image = found.nonzero(as_tuple=True)
        images = NoisedRows.of(rollout, prompt, image, rng, self.timesteps)
        sign = found[prompt, image].to(images.level.device).unsqueeze(1)
        unknown = torch.zeros_like(sign).expand(images.level.shape)
        return LikedRows(
            **vars(images),
            liking=sign.expand(images.level.shape),
            shared=unknown,
            own=unknown,
        )

    def shared(self, policy: Policy, items: LikedRows) -> Tensor:
        """See `diffusion.update.SharesMean`: the gain, [N].

        By how much the error of the network's output is below the pretrained model's.
        """
        return -error_gap(policy, items.x_0, items.level, items.noise, items.conditions)

    def loss(self, policy: Policy, items: LikedRows) -> tuple[Tensor, Metrics]:
        r"""Mean over the items of the weighted loss.

        $$
        L = \lambda_y \bigl(1 - \sigma(y\, \beta\, (g - z))\bigr),
        \qquad
        g = e^\mathrm{pre} - e,
        \quad
        z = \max(0, \bar g),
        \quad
        e = \lVert \epsilon_\theta(x_s, s, c) - \epsilon \rVert^2
        $$

        y is 1 for a liked image and -1 for a disliked one, lambda `liked_weight` or
        `disliked_weight`, and z the mean gain over all items of the optimizer step, without
        gradient. The error e is Diffusion-DPO's; pre is the pretrained model.
        """
        error = denoising_error(policy, items.x_0, items.level, items.noise, items.conditions)
        gain = items.own - (error - error.detach())  # its value is known, its gradient is not
        weight = torch.where(items.liking > 0, self.liked_weight, self.disliked_weight)
        loss = weight * kto_loss(gain, items.shared, items.liking, self.beta)
        ahead = (gain.detach() - items.shared.clamp(min=0)).sign()
        return loss.mean(), {
            # An image that has gained as much as the mean counts as half right.
            "accuracy": ((ahead * items.liking + 1) / 2).mean(),
            "gain": gain.detach().mean(),
            "liked": (items.liking > 0).float().mean(),
        }


METHOD: type[Method[LikedRows]] = KTO
