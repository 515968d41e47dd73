"""Diffusion-DPO: preference pairs of finished images (Wallace et al. 2023, arXiv:2311.12908).

Winner and loser are noised to one level with one noise. The loss (their Eq. 14) rewards that the
error of the network's output falls on the winner and rises on the loser, against the pretrained
model's. It needs no denoising chain, so it also learns from pictures that exist already. Released
code: SalesforceAIResearch/DiffusionDPO; its mean over a batch comes after the log-sigmoid, as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from d3po_bench.diffusion.preferences import error_gap, pairs_of
from d3po_bench.errors import UserError
from d3po_bench.types import (
    Conditions,
    Method,
    Metrics,
    NoisedRows,
    Policy,
    Reference,
    Rollout,
    Rows,
)


@dataclass(frozen=True)
class NoisedPairs(Rows):
    """One row is a pair of final images of a prompt, the preferred one first."""

    x_0: Tensor
    """[M, T, 2, C, H, W]."""
    noise: Tensor
    """[M, T, C, H, W], the same for both."""
    level: Tensor
    """[M, T]."""
    conditions: Conditions
    preference: Tensor
    """[M, T]; 1, or 0 for a tie."""


def diffusion_dpo_loss(gaps: Tensor, preference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-(beta / 2) h (g_w - g_l)), with g the error less the pretrained model's.

    Args:
        gaps: [N, 2], preferred image first; squared error, mean over latent elements.
        preference: [N]; 1, or 0 for a tie (which costs log 2 and has no gradient).
        beta: weight of the errors.

    Returns:
        Loss of each pair, [N]; log 2 where the policy equals the pretrained model.
    """
    winner, loser = gaps.unbind(1)
    return -logsigmoid(-beta / 2 * preference * (winner - loser))


@dataclass(frozen=True)
class DiffusionDPO:
    """Defaults are for a LoRA and small batches; the paper trains whole networks on 2048 pairs."""

    beta: float = 1000.0
    """The paper's is 5000 (it tried 2000 to 5000), with 2048 pairs in each update."""
    pairs: Literal["all", "extremes"] = "all"
    """Of more than two images of a prompt: every pair, or the best against the worst."""
    skip_ties: bool = False
    """Leave ties out instead of letting them dilute the mean at zero gradient."""
    timesteps: Literal["all", "sampler"] = "all"
    """Noise levels of all 1000 training timesteps, or of the sampler's T."""
    shared_noise: bool = True
    """Draw the images of a prompt from one noise, as D3PO does; pictures from elsewhere are not."""

    images_per_prompt: ClassVar[int] = 2
    least_images: ClassVar[int] = 2
    """There is nothing to compare one image with."""
    reference: ClassVar[Reference | None] = None
    needs_chain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options without a meaning.

        Raises:
            UserError: naming them.
        """
        if not self.beta > 0:
            raise UserError(
                f"Diffusion-DPO needs beta above 0, not {self.beta}. Change it with --set beta=..."
            )

    @property
    def search(self) -> dict[str, Any]:
        """See `launch.space`."""
        return {"beta": (30.0, 10_000.0), "pairs": ["all", "extremes"]}

    def rows(self, rollout: Rollout, rng: Generator) -> NoisedPairs:
        """The pairs of each prompt, winner first, with T draws of a noise level and a noise."""
        prompt, images, preference = pairs_of(rollout.scores, self.pairs, self.skip_ties)
        winner = NoisedRows.of(rollout, prompt, images[:, 0], rng, self.timesteps)
        loser = rollout.latents[prompt, images[:, 1], -1].unsqueeze(1).expand(winner.x_0.shape)
        level = winner.level
        return NoisedPairs(
            x_0=torch.stack([winner.x_0, loser], 2),
            noise=winner.noise,
            level=level,
            conditions=winner.conditions,
            preference=preference.to(level.device).unsqueeze(1).expand(level.shape),
        )

    def loss(self, policy: Policy, items: NoisedPairs) -> tuple[Tensor, Metrics]:
        r"""Mean over the items, both images of all pairs in one network call.

        $$
        L = -\log \sigma\Bigl(-\tfrac{\beta}{2}\, h\, \bigl[(e_w - e_w^\mathrm{pre})
        - (e_l - e_l^\mathrm{pre})\bigr]\Bigr),
        \qquad
        e = \lVert \epsilon_\theta(x_s, s, c) - \epsilon \rVert^2
        $$

        x_s is a final latent with noise epsilon of level s, both the same for winner w and loser l,
        and h is 1, or 0 for a tie. Of a flow, e is the error of its velocity. The square is a mean
        over the latent's elements; pre is the pretrained model.
        """
        gaps = error_gap(
            policy,
            items.x_0.flatten(0, 1),
            items.level.repeat_interleave(2),
            items.noise.repeat_interleave(2, 0),
            items.conditions.repeat(2),
        ).view(-1, 2)
        loss = diffusion_dpo_loss(gaps, items.preference, self.beta)
        return loss.mean(), _diagnostics(gaps.detach(), items.preference)


def _diagnostics(gaps: Tensor, preference: Tensor) -> Metrics:
    """What a loss that stays near log 2 cannot show."""
    ahead = (gaps[:, 1] - gaps[:, 0]).sign()
    return {
        # A tie, and a pair of equal gaps, count as half right: so does chance.
        "accuracy": ((ahead * preference + 1) / 2).mean(),
        # Where both rise, the model forgets the winner only more slowly than the loser.
        "winner_gap": gaps[:, 0].mean(),
        "loser_gap": gaps[:, 1].mean(),
        "ties": 1 - preference.mean(),
    }


METHOD: type[Method[NoisedPairs]] = DiffusionDPO
