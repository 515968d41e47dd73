"""What preference methods share: pairs and liked images read from scores, and the error gap.

Pairs of one prompt share images, whose steps are computed once: see `steps_once`.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
from torch import Generator, Tensor

from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.errors import UserError
from d3po_bench.types import Conditions, Policy, Step, Weights


def pairs_of(
    scores: Tensor, which: Literal["all", "extremes"], skip_ties: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of every prompt, as `preferred` or `extremes` returns them, or without ties."""
    prompt, images, preference = extremes(scores) if which == "extremes" else preferred(scores)
    if not skip_ties:
        return prompt, images, preference
    kept = preference > 0
    return prompt[kept], images[kept], preference[kept]


def preferred(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of images of each prompt, the one with the larger score first.

    Args:
        scores: [P, K], or [P, K, m] for m criteria: then an image wins only if it is at least
            as good in all and better in one (Pareto), else the pair is a tie.

    Returns:
        prompt [M], images [M, 2] and preference [M] (0 for a tie, whose images keep their
        order), pairs in lexicographic order.

    Raises:
        UserError: there are no two images to compare.
    """
    if scores.shape[1] < 2:
        raise UserError(
            f"Pairs are made of at least 2 images of a prompt, not {scores.shape[1]}. Use --set "
            "images_per_prompt=2."
        )
    scores = scores if scores.ndim == 3 else scores.unsqueeze(-1)
    pairs = torch.tensor(list(combinations(range(scores.shape[1]), 2)))
    first, second = scores[:, pairs[:, 0]], scores[:, pairs[:, 1]]
    wins = (first >= second).all(-1) & (first > second).any(-1)
    loses = (second >= first).all(-1) & (second > first).any(-1)
    images = torch.where(loses.unsqueeze(-1), pairs.flip(1), pairs).flatten(0, 1)
    prompt = torch.arange(len(scores)).repeat_interleave(len(pairs))
    return prompt, images, (wins | loses).flatten().float()


def extremes(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best and the worst image of each prompt, as `preferred` returns pairs.

    With two images of a prompt this is `preferred`. Of scores [P, K, m] the first counts.
    """
    if scores.shape[1] < 2:
        return preferred(scores)
    first = scores if scores.ndim == 2 else scores[..., 0]
    # The last of equally bad images: a tie keeps two different ones.
    worst = first.shape[1] - 1 - first.flip(1).argmin(1)
    images = torch.stack([first.argmax(1), worst], 1)
    return torch.arange(len(first)), images, (first.amax(1) > first.amin(1)).float()


def shuffled(scores: Tensor, rng: Generator) -> Tensor:
    """Scores [P, K], those of each prompt in a random order: preferences that say nothing."""
    order = torch.stack([torch.randperm(scores.shape[1], generator=rng) for _ in scores])
    return scores.gather(1, order)


def liking(scores: Tensor, value: float | None = None) -> Tensor:
    """Which images are liked, [P, K]: 1 above `value`, -1 below, 0 where neither.

    Args:
        scores: [P, K], larger is better; NaN: nobody judged, which is neither.
        value: to compare with; None for the mean of the prompt's images.
    """
    wide = scores.double()  # in which the mean of equal scores is that score
    middle = wide.mean(1, keepdim=True) if value is None else torch.full_like(wide, value)
    return (wide > middle).float() - (wide < middle).float()


def steps_once(
    policy: Policy, x_t: Tensor, step: Tensor, conditions: Conditions, same: Tensor
) -> Step:
    """`Policy.step` of both images of N pairs, [2N], each image's step computed once.

    Args:
        policy: whose steps.
        x_t: [N, 2, C, H, W].
        step: [N].
        conditions: of N.
        same: [N, 2] numbers, equal where all of these are equal.
    """
    every = same.flatten()
    found, back = every.unique(return_inverse=True)
    place = torch.arange(len(every), device=every.device)
    if len(found) < len(every):
        place = torch.empty_like(found).scatter_(0, back, place)
    pair = place // 2
    once = policy.step(x_t.flatten(0, 1)[place], step[pair], conditions.take(pair))
    if len(found) == len(every):
        return once
    return Gaussian(mean=once.mean[back], std=once.std[back])


def denoising_error(
    policy: Policy, x_0: Tensor, level: Tensor, noise: Tensor, conditions: Conditions, *,
    weights: Weights = "current",
) -> Tensor:  # fmt: skip
    """Squared error of the network's output, mean over latent elements, [N].

    Arguments as those of `Policy.denoise`.
    """
    predicted, target = policy.denoise(x_0, level, noise, conditions, weights=weights)
    return (predicted - target).square().flatten(1).mean(1)


def error_gap(
    policy: Policy, x_0: Tensor, level: Tensor, noise: Tensor, conditions: Conditions
) -> Tensor:
    """By how much `denoising_error` exceeds the pretrained model's, [N]."""
    place = x_0, level, noise, conditions
    now = denoising_error(policy, *place)
    with torch.no_grad():
        before = denoising_error(policy, *place, weights="base")
    return now - before
