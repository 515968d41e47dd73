"""Reward Weighted regression: the denoising loss on own samples, weighted by their reward.

Lee et al. 2023 (arXiv:2302.12192), in the online form of Black et al. 2023 (section 4.2,
RWR): w(r) |noise - predicted noise|^2, the loss of Ho et al. 2020 (Eq. 14) weighted by the reward.
The D3PO paper compares with it and prints no settings; its code has none of it. Default
weights: softmax of the per-prompt advantage over the round. Switches: softmax of the raw reward
(jannerm/ddpo, whose "temperature" multiplies), the best tenth alone (their RWR-sparse), and
rewards in [0, 1] as they are (Lee et al.), and signed advantages, which push away from images that
are below the mean (`awm`: advantage-weighted matching, Xue et al. 2025, 2509.25050, with a ratio of
1 and without its pull to a moving average of the weights). In place of Lee et al.'s second term,
the denoising loss on the pretraining data, which nobody has at hand, `anchor` weighs the squared
distance of the predicted noise to the pretrained model's; it is off by default, and on in
`reward_weighted_anchor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from d3po_bench.diffusion.advantages import Against, ComparesScores, advantages, known_statistics
from d3po_bench.errors import UserError
from d3po_bench.types import Method, Metrics, NoisedRows, Policy, Reference, Rollout

Weighing = Literal["softmax_advantage", "softmax_raw", "sparse", "lee", "signed"]


@dataclass(frozen=True)
class Weighted(NoisedRows):
    """One row is one image, with T random noise levels."""

    weight: Tensor
    """[M, T]."""
    effective: Tensor
    """[M, T]; share of the round that the weights amount to."""


def softmax_weights(
    scores: Tensor, inverse_temperature: float, prompts: Sequence[str] | None = None
) -> Tensor:
    """N softmax(b s) of scores [N], over all, or over those of each of `prompts`; mean 1."""
    names = list(prompts) if prompts is not None else [""] * len(scores)
    weights = torch.empty_like(scores)
    for name in dict.fromkeys(names):
        own = torch.tensor([n == name for n in names])
        weights[own] = own.sum() * (inverse_temperature * scores[own]).softmax(0)
    return weights


@dataclass(frozen=True)
class RewardWeighted(ComparesScores):
    """Defaults: own choice, as no publication prints all of them."""

    weight: Weighing = "softmax_advantage"
    """What becomes of a reward; each is somebody's, see above."""
    inverse_temperature: float = 1.0
    """Multiplies advantages or rewards; 0.2 per kB in jannerm/ddpo."""
    per_prompt: bool = False
    """Softmax within the images of each prompt instead of over the round."""
    largest_weight: float = 10.0
    """Weights of the softmax, whose mean is 1, and signed ones are cut here."""
    quantile: float = 0.9
    """`sparse` keeps the rewards of a round that are at or above it."""
    advantage: Against = "prompt"
    """Against the last scores of the prompt, or against the images of this draw alone (GRPO)."""
    buffer: int = 16
    """Scores of a prompt that its advantage is taken over; 0: over the round, for all prompts."""
    minimum: int = 16
    """Scores that a prompt needs before its own statistics count."""
    timesteps: Literal["all", "sampler"] = "all"
    """Noise levels of all 1000 training timesteps, or of the sampler's T."""
    guided: bool = False
    """Put guidance into the loss, as jannerm/ddpo does."""
    anchor: float = 0.0
    """Weight of the distance to the pretrained model's prediction."""
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
        known = self.largest_weight > 0 and self.anchor >= 0 and 0 <= self.quantile < 1
        if not (known and known_statistics(self.buffer, self.minimum)):
            raise UserError(
                "Reward Weighted needs largest_weight above 0, anchor and minimum of at least 0, "
                "quantile from 0 to 1, buffer 0 or from minimum to 64; these are "
                f"{self.largest_weight}, {self.anchor}, {self.minimum}, {self.quantile} and "
                f"{self.buffer}. Change them with --set."
            )

    @property
    def search(self) -> dict[str, Any]:
        """See `launch.space`."""
        softmax = {"inverse_temperature": (0.25, 8.0)} if "softmax" in self.weight else {}
        return {**softmax, **({"anchor": (0.03, 10.0)} if self.anchor else {})}

    def weights(self, rollout: Rollout) -> Tensor:
        """Weight of every image, [P * K].

        Raises:
            UserError: `lee` with rewards outside 0 to 1.
        """
        rewards = rollout.scores.flatten()
        if self.weight in ("softmax_advantage", "signed"):
            found = advantages(rollout, self.buffer, self.minimum, self.advantage)
            rewards = found.flatten()
        if self.weight == "signed":
            return rewards.clamp(-self.largest_weight, self.largest_weight)
        if self.weight == "sparse":
            return (rewards >= rewards.quantile(self.quantile)).float()
        if self.weight == "lee":
            if rewards.min() < 0 or rewards.max() > 1:
                raise UserError(
                    "weight=lee needs rewards from 0 to 1; these reach from "
                    f"{float(rewards.min()):g} to {float(rewards.max()):g}. Use another weight."
                )
            return rewards
        prompts = [p for p in rollout.prompts for _ in range(rollout.scores.shape[1])]
        weights = softmax_weights(
            rewards, self.inverse_temperature, prompts if self.per_prompt else None
        )
        return weights.clamp(max=self.largest_weight)

    def rows(self, rollout: Rollout, rng: Generator) -> Weighted:
        """All images, each with its weight and T draws of a noise level and noise."""
        prompt, image = torch.ones(rollout.scores.shape).nonzero(as_tuple=True)
        images = NoisedRows.of(rollout, prompt, image, rng, self.timesteps)
        weight = self.weights(rollout).to(images.x_0.device)
        squares = weight.square().sum().clamp(min=1e-12)  # signed ones may all be 0
        effective = weight.abs().sum().square() / squares / len(weight)
        return Weighted(
            **vars(images),
            weight=weight.unsqueeze(1).expand(images.level.shape),
            effective=effective.expand(images.level.shape),
        )

    def loss(self, policy: Policy, items: Weighted) -> tuple[Tensor, Metrics]:
        r"""Weighted mean squared error of the predicted noise, and its anchor.

        $$
        L = w\, \lVert \epsilon_\theta(x_s, s, c) - \epsilon \rVert^2
        + a\, \lVert \epsilon_\theta(x_s, s, c) - \epsilon_\mathrm{pre}(x_s, s, c) \rVert^2
        $$

        w is the image's weight, x_s its latent with noise epsilon of level s, a the option
        `anchor`, and pre the pretrained model. Squares are means over the latent's elements.
        """
        place = items.x_0, items.level, items.noise, items.conditions
        predicted, target = policy.denoise(*place, guided=self.guided)
        error = (predicted - target).square().flatten(1).mean(1)
        loss = (items.weight * error).mean()
        if self.anchor:
            with torch.no_grad():
                before, _ = policy.denoise(*place, guided=self.guided, weights="base")
            loss = loss + self.anchor * (predicted - before).square().mean()
        return loss, {
            "denoising_error": error.detach().mean(),
            "effective_share": items.effective.mean(),
        }


VARIANTS = {
    "reward_weighted_anchor": {"anchor": 1.0},
    "awm": {
        "weight": "signed", "advantage": "group", "largest_weight": 5.0, "anchor": 0.1,
        "images_per_prompt": 8,
    },
}  # fmt: skip

METHOD: type[Method[Weighted]] = RewardWeighted
