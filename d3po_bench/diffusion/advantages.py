"""Advantages over a prompt's own scores, and PPO's loss: what policy gradients share."""

from __future__ import annotations

import torch
from torch import Tensor

from d3po_bench.types import Rollout

LARGEST = 20.0
"""Log-ratios are cut here: exp of more than 88 has a gradient of 0 * inf behind the clip."""


def advantages(rollout: Rollout, buffer: int = 16, minimum: int = 16) -> Tensor:
    """Scores in standard deviations above the mean of their prompt, [P, K].

    Statistics are those of a prompt's last `buffer` scores, this round's included, or of this
    whole round while it has fewer than `minimum` (Black et al. 2023, appendix).

    Args:
        rollout: with scores and history.
        buffer: scores of a prompt that count; 0: the round's statistics for every prompt.
        minimum: scores that a prompt needs before its own statistics count.
    """
    scores = rollout.scores.double()
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
