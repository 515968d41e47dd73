"""Preferred-image fine-tuning: the denoising loss on the images that won, and on nothing else.

The row "preferred images" of the D3PO paper's Table 1, which gives no detail; its code has none.
Images are drawn and compared as in D3PO; those with the largest reward of their prompt are kept,
unless all images of the prompt are equal. With two images of a prompt that is the winner of a
pair; the best of eight is RAFT (Dong et al. 2023, 2304.06767). The loss is Ho et al. 2020, Eq. 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Generator, Tensor

from d3po_bench.types import Method, Metrics, NoisedRows, Policy, Reference, Rollout


@dataclass(frozen=True)
class PreferredImages:
    """Same sampling as D3PO, supervised learning on the winners."""

    timesteps: Literal["all", "sampler"] = "all"
    """Noise levels of all 1000 training timesteps, or of the sampler's T."""
    guided: bool = False
    """Put guidance into the loss."""
    liked: Literal["best", "above_value"] = "best"
    """The winners of each prompt, or every image with a score above `value`, as tags are judged."""
    value: float = 0.0
    """What `above_value` compares scores with."""
    shared_noise: bool = True
    """Start the images of a prompt from the same noise, as D3PO does."""

    images_per_prompt: ClassVar[int] = 2
    reference: ClassVar[Reference | None] = None
    needs_chain: ClassVar[bool] = False

    @property
    def least_images(self) -> int:
        """One image wins against none."""
        return 2 if self.liked == "best" else 1

    def rows(self, rollout: Rollout, rng: Generator) -> NoisedRows:
        """The winners, each with T draws of a noise level and noise; none in a round of ties."""
        scores = rollout.scores
        best = scores == scores.amax(1, keepdim=True)
        kept = best & ~best.all(1, keepdim=True) if self.liked == "best" else scores > self.value
        prompt, image = kept.nonzero(as_tuple=True)
        return NoisedRows.of(rollout, prompt, image, rng, self.timesteps)

    def loss(self, policy: Policy, items: NoisedRows) -> tuple[Tensor, Metrics]:
        r"""Mean squared error of the predicted noise.

        $$
        L = \lVert \epsilon_\theta(x_s, s, c) - \epsilon \rVert^2
        $$

        x_s is a winner's latent with noise epsilon of level s. The square is a mean over the
        latent's elements.
        """
        predicted, target = policy.denoise(
            items.x_0, items.level, items.noise, items.conditions, guided=self.guided
        )
        error = (predicted - target).square().flatten(1).mean(1)
        return error.mean(), {"denoising_error": error.detach().mean()}


VARIANTS = {
    "preferred_of_two": {"images_per_prompt": 2},
    "raft": {"images_per_prompt": 8, "shared_noise": False},
}

METHOD: type[Method[NoisedRows]] = PreferredImages
