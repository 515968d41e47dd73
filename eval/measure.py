"""A policy, fixed prompts and fixed noise -> one row for each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.finite import require_finite
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, pretrained_means, sample
from d3po_bench.diffusion.sampling import pictures as drawn
from d3po_bench.errors import RunError
from d3po_bench.scoring import apart, require_scores
from d3po_bench.training.tools import EvaluationSet
from d3po_bench.types import Model, Rollout, Scorer, ScorerWithColumns

NOISE_SEED = 20231122
"""Seed of the evaluation streams: the same for every run, so that runs can be paired."""

TRAINING = "eta1"
"""The sampler of training; the other, eta0, is the ODE: DDIM without noise."""

OBJECTIVE = "score"
"""Column of the score that a run trains on."""

Row = dict[str, Any]


def evaluate(
    model: Model,
    what: EvaluationSet,
    scorers: Mapping[str, Scorer],
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Draw the set with both samplers and score it.

    Args:
        model: with its adapter as it now is.
        what: prompts and noise.
        scorers: column name -> scorer.
        progress: called with the share that is done.

    Returns:
        Rows of sampler, prompt, index, a column for each scorer and, for the training sampler,
        `kl`, the drift from the pretrained model; and the images [P * images, 3, h, w] uint8 of
        each sampler, in the order of the rows.

    Raises:
        RunError: a latent, a score that a run learns from, or `kl` is not finite.
    """
    rows: list[Row] = []
    pictures: dict[str, Tensor] = {}
    draws = Draws(
        seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps",
        first=what.first * what.images,
    )  # fmt: skip
    prompts = [p for p in what.prompts for _ in range(what.images)]
    for number, sampler in enumerate(what.samplers):

        def told(share: float, number: int = number) -> None:
            progress((number + share / 2) / len(what.samplers))

        policy = _as_in_training(model, what) if sampler == TRAINING else _ode(model, what)
        rollout = sample(policy, prompts, draws, batch=what.batch, progress=told)
        images = drawn(model, rollout.latents[:, 0, -1], what.decode_batch)
        scores = parallel.tell(partial(scored, images, prompts, scorers))
        if OBJECTIVE in scores:  # further scorers may have nothing to say about an image
            require_scores(scorers[OBJECTIVE], scores[OBJECTIVE])
        if sampler == TRAINING:
            scores["kl"] = _kl(policy, rollout, what.batch)
            require_finite("evaluation kl to the pretrained model", scores["kl"])
        for i, prompt in enumerate(prompts):
            row = {"sampler": sampler, "prompt": prompt, "index": i % what.images}
            rows.append(row | {name: cell(float(s[i])) for name, s in scores.items()})
        pictures[sampler] = images
    return rows, pictures


def _as_in_training(model: Model, what: EvaluationSet, **how: Any) -> Policy:
    how = {"sampler": what.sampler, "eta": what.eta, **how}
    return Policy(
        model, steps=what.steps, guidance=what.guidance, timestep_spacing=what.timestep_spacing,
        **how,
    )  # fmt: skip


def _ode(model: Model, what: EvaluationSet) -> Policy:
    return _as_in_training(model, what, sampler="ddim", eta=0.0)


def cell(value: float) -> float | str:
    """The number of a row; empty where a further scorer has nothing to say about an image."""
    return round(value, 6) if math.isfinite(value) else ""


def scored(
    images: Tensor, prompts: Sequence[str], scorers: Mapping[str, Scorer]
) -> dict[str, Tensor]:
    """Column -> scores [N] of images [N, 3, h, w] uint8; some scorers have several columns.

    Raises:
        RunError: two scorers have a column of the same name.
    """
    columns: dict[str, Tensor] = {}
    for name, scorer in scorers.items():
        if isinstance(scorer, ScorerWithColumns) and name != OBJECTIVE:
            found = scorer.columns(images, prompts)
        else:
            whole, parts = apart(scorer, images, prompts)
            found = {name: whole, **parts}
        if twice := sorted(columns.keys() & found.keys()):
            raise RunError(
                f"The scorer {name} has a column {twice[0]}, as another scorer has. Leave one of "
                "the two out."
            )
        columns |= found
    return columns


def _kl(policy: Policy, rollout: Rollout, batch: int) -> Tensor:
    """KL of a step to the pretrained model's, nats per latent element, mean over steps, [P].

    A step without noise, such as the last of a flow, has none and is left out.
    """
    noisy = policy.table.std > 0
    pretrained = pretrained_means(policy, rollout, batch=batch)
    ours, theirs = (m[:, 0, noisy].flatten(0, 1) for m in (rollout.means, pretrained))
    count = len(rollout.prompts)
    std = policy.table.std[noisy].float().to(ours.device).repeat(count)
    return Gaussian(ours, std).kl(theirs).view(count, -1).mean(1)
