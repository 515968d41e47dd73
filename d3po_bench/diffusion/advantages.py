"""Advantages over a prompt's own scores, and PPO's loss: what policy gradients share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from d3po_bench.types import Rollout

Against = Literal["prompt", "group"]
"""What a score is compared with: the last scores of its prompt, or the images drawn beside it."""


class ComparesScores:
    """A method with an option `advantage`."""

    advantage: Against

    @property
    def least_images(self) -> int:
        """Of a prompt: one image is its group's mean."""
        return 2 if self.advantage == "group" else 1


MOST_KEPT = 64
"""Scores of a prompt that a run remembers."""


def known_statistics(buffer: int, minimum: int) -> bool:
    """Whether a prompt can ever have as many scores as its own statistics need."""
    return minimum >= 0 and (buffer == 0 or minimum <= buffer <= MOST_KEPT)


LARGEST = 20.0
"""Log-ratios are cut here: exp of more than 88 has a gradient of 0 * inf behind the clip."""


def advantages(
    rollout: Rollout, buffer: int = 16, minimum: int = 16, against: Against = "prompt"
) -> Tensor:
    """Scores in standard deviations above a mean, [P, K].

    Against "prompt", statistics are those of a prompt's last `buffer` scores, this round's
    included, or of this whole round while it has fewer than `minimum` (Black et al. 2023,
    appendix). Against "group" they are those of the K images of this draw (GRPO; Liu et al. 2025,
    2505.05470): where all are equal, all are 0.

    Args:
        rollout: with scores and history.
        buffer: scores of a prompt that count; 0: the round's statistics for every prompt.
        minimum: scores that a prompt needs before its own statistics count.
        against: what a score is compared with.
    """
    scores = rollout.scores.double()
    if against == "group":
        apart = scores - scores.mean(1, keepdim=True)
        return (apart / (scores.std(1, correction=0, keepdim=True) + 1e-4)).float()
    kept = {prompt: list(rollout.history.get(prompt, ())) for prompt in set(rollout.prompts)}
    for prompt, values in zip(rollout.prompts, scores.tolist(), strict=True):
        kept[prompt] += values
    rows = []
    for prompt, values in zip(rollout.prompts, scores, strict=True):
        own = torch.tensor(kept[prompt][-buffer:], dtype=torch.float64)
        seen = own if buffer and len(own) >= minimum else scores.flatten()
        rows.append((values - seen.mean()) / (seen.std(correction=0) + 1e-6))
    return torch.stack(rows).float()


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), with a gradient that stays finite."""
    return log_ratio.clamp(max=LARGEST).exp()


def ppo_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped loss max(-A r, -A clamp(r, 1 - c, 1 + c)), [N], for log r and A [N].

    Schulman et al. 2017, Eq. 7.
    """
    ratio = ratio_of(log_ratio)
    return torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
