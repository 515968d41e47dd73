"""D3PO: direct preference for denoising diffusion policy optimization (arXiv:2311.13231).

Two images of a prompt grow from the same noise; the better one wins. Every denoising step of
the pair is a preference of its own (Eq. 13), with the loss of Eq. 14. Differences from the
published code are switches: see the fields of `D3PO`. `d3po_of_two` has the paper's two images
whatever the preset; `d3po_best_of_k` compares the best image of eight with the worst; `d3po_random`
learns from preferences that are random, so that it shows what drifts without a signal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from d3po_bench.diffusion.preferences import pairs_of, steps_once
from d3po_bench.errors import UserError
from d3po_bench.types import (
    Conditions,
    Method,
    Metrics,
    Policy,
    Reference,
    Rollout,
    Rows,
    step_numbers,
)


@dataclass(frozen=True)
class Pairs(Rows):
    """One row is one pair of images of a prompt, the preferred one first."""

    x_t: Tensor
    """[M, T, 2, C, H, W]."""
    x_next: Tensor
    """[M, T, 2, C, H, W]."""
    reference: Tensor
    """[M, T, 2, C, H, W] means of the reference policy."""
    step: Tensor
    """[M, T] number of each denoising step, 0 to T-1."""
    conditions: Conditions
    preference: Tensor
    """[M, T]; 1, or 0 for a tie."""
    same: Tensor
    """[M, T, 2] number of each image's step: pairs that share the image share it."""


def d3po_loss(
    log_ratio: Tensor,
    preference: Tensor,
    *,
    beta: float = 0.1,
    clip: Literal["ratio", "one_sided", "none"] = "ratio",
    clip_range: float = 0.1,
    elements: int = 1,
) -> Tensor:
    """Step-wise preference loss of D3PO, Eq. 14.

        L = -log sigmoid(beta h (q_w - q_l)),   q = log pi(a|s) - log pi_ref(a|s)

    With clip "ratio" each q is clamped to [log(1 - clip_range), log(1 + clip_range)], as the
    published code clamps the ratio: the clamp is the trust region, and a row whose two ratios
    are outside has zero gradient. It is applied to the logarithm: exp first gives a gradient
    of 0 * inf at large ratios. "one_sided" clamps only the winner from above and the loser
    from below, so that a winner that fell or a loser that rose is still pulled back.

    Args:
        log_ratio: [N, 2], preferred image first; nats.
        preference: [N]; 1, or 0 for a tie (which costs log 2 and has no gradient).
        beta: temperature, dimensionless.
        clip: where to clamp.
        clip_range: largest change of a probability ratio from 1.
        elements: latent elements that `log_ratio` sums over; 1 for a mean. beta is divided
            and the clamp multiplied by it.

    Returns:
        Loss of each row, [N]; log 2 where the policy equals the reference.
    """
    low, high = elements * math.log(1 - clip_range), elements * math.log(1 + clip_range)
    winner, loser = log_ratio.unbind(1)
    if clip == "ratio":
        winner, loser = winner.clamp(low, high), loser.clamp(low, high)
    elif clip == "one_sided":
        winner, loser = winner.clamp(max=high), loser.clamp(min=low)
    return -logsigmoid(beta / elements * preference * (winner - loser))


@dataclass(frozen=True)
class D3PO:
    """Defaults follow the published code, in log space and with the mean log-probability.

    Table 2 of the paper prints beta and no clip range; the code clips at 0.1.
    """

    beta: float = 0.1
    """The loss's temperature: 0.1 in paper and code, in the code on means."""
    clip: Literal["ratio", "one_sided", "none"] = "ratio"
    """Where log-ratios are cut; the code cuts both, the paper says only that one can."""
    clip_range: float = 0.1
    """Largest change of a probability ratio from 1. The code's; the paper prints none."""
    log_prob: Literal["mean", "sum"] = "mean"
    """Over latent elements: the code's mean, or the joint density of the paper's Eq. 14."""
    reference: Reference = "pretrained"
    """Algorithm 1's fixed copy, or, as in section 5.2, the model at the start of the round."""
    shared_noise: bool = True
    """Start the images of a prompt from the same noise, as paper and code do."""
    pairs: Literal["all", "extremes"] = "all"
    """Of more than two images of a prompt: every pair, or the best against the worst."""
    skip_ties: bool = False
    """Leave ties out instead of letting them dilute the mean at zero gradient, as the code does."""

    images_per_prompt: ClassVar[int] = 2
    least_images: ClassVar[int] = 2
    """There is nothing to compare one image with."""

    def __post_init__(self) -> None:
        """Refuse options without a meaning.

        Raises:
            UserError: naming them.
        """
        if not (0 < self.clip_range < 1 and self.beta > 0):
            raise UserError(
                "D3PO needs clip_range between 0 and 1 and beta above 0; these are "
                f"{self.clip_range} and {self.beta}. Change them with --set."
            )

    @property
    def search(self) -> dict[str, Any]:
        """See `launch.space`."""
        return {"clip_range": (0.02, 0.5), "pairs": ["all", "extremes"]}

    def images_used(self, rollout: Rollout) -> Tensor:
        """Images that are in a pair, [P, K] bool."""
        prompt, images, _ = pairs_of(rollout.scores, self.pairs)
        chosen = torch.zeros(rollout.scores.shape[:2], dtype=torch.bool)
        chosen[prompt.unsqueeze(1), images] = True
        return chosen

    def rows(self, rollout: Rollout, rng: Generator) -> Pairs:
        """Pair up the images of each prompt, winner first."""
        prompt, images, preference = pairs_of(rollout.scores, self.pairs, self.skip_ties)
        if rollout.reference is None:
            raise ValueError("D3PO needs rollout.reference: see diffusion.sampling.with_reference")
        index = prompt.unsqueeze(1), images
        latents = rollout.latents[index].transpose(1, 2)
        step = step_numbers(rollout, len(prompt))
        image = (prompt.unsqueeze(1) * rollout.scores.shape[1] + images).to(latents.device)
        return Pairs(
            x_t=latents[:, :-1],
            x_next=latents[:, 1:],
            reference=rollout.reference[index].transpose(1, 2),
            step=step,
            conditions=rollout.conditions.take(prompt.to(latents.device)),
            preference=preference.to(latents.device).unsqueeze(1).expand(step.shape),
            same=image.unsqueeze(1) * rollout.steps + step.unsqueeze(2),
        )

    def loss(self, policy: Policy, items: Pairs) -> tuple[Tensor, Metrics]:
        r"""Mean of Eq. 14 over the items, each image of all pairs once in one network call.

        $$
        L = -\log \sigma\bigl(\beta\, h\, (q_w - q_l)\bigr), \qquad
        q = \log \frac{\pi_\theta(x_{t-1} \mid x_t, c)}{\pi_\mathrm{ref}(x_{t-1} \mid x_t, c)}
        $$

        w is the preferred image of a pair and l the other one; h is 1, or 0 for a tie.
        """
        step = steps_once(policy, items.x_t, items.step, items.conditions, items.same)
        reference = items.reference.flatten(0, 1)
        elements = reference[0].numel() if self.log_prob == "sum" else 1
        log_ratio = step.log_ratio(reference, items.x_next.flatten(0, 1)).view(-1, 2) * elements
        loss = d3po_loss(
            log_ratio,
            items.preference,
            beta=self.beta,
            clip=self.clip,
            clip_range=self.clip_range,
            elements=elements,
        )
        return loss.mean(), self._diagnostics(log_ratio.detach() / elements, items.preference)

    def _diagnostics(self, log_ratio: Tensor, preference: Tensor) -> Metrics:
        """What a loss that must stand near log 2 cannot show."""
        low, high = math.log(1 - self.clip_range), math.log(1 + self.clip_range)
        ahead = (log_ratio[:, 0] - log_ratio[:, 1]).sign()
        return {
            # A tie, and a pair of equal ratios, count as half right: so does chance.
            "accuracy": ((ahead * preference + 1) / 2).mean(),
            "abs_log_ratio": log_ratio.abs().mean(),
            "saturated": ((log_ratio < low) | (log_ratio > high)).float().mean(),
            "ties": 1 - preference.mean(),
        }


VARIANTS = {
    "d3po_of_two": {"images_per_prompt": 2, "pairs": "all"},
    "d3po_best_of_k": {"images_per_prompt": 8, "pairs": "extremes"},
    "d3po_random": {"choices": "random"},
}

METHOD: type[Method[Pairs]] = D3PO
