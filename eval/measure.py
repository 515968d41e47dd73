"""A policy, fixed prompts and fixed noise -> one row for each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
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
        those of `drifts`; and the images [P * images, 3, h, w] uint8 of each sampler, in the order
        of the rows.

    Raises:
        RunError: a latent, a score that a run learns from, or a drift is not finite.
    """
    rows: list[Row] = []
    pictures: dict[str, Tensor] = {}
    draws = Draws(
        seed=NOISE_SEED + what.noise, round=0, noise="eval-noise", steps="eval-steps",
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
            scores |= drifts(policy, rollout, draws, what.batch, moved=not what.untrained)
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


# ---- how far the model has moved from the pretrained one

LEVELS = 4
"""Noise levels at which the sampler-free drift is measured."""


def drifts(
    policy: Policy, rollout: Rollout, draws: Draws, batch: int, moved: bool = True
) -> dict[str, Tensor]:
    """Columns that say how far the model has moved, [P] each.

    `kl_1` to `kl_T`: KL of each step to the pretrained model's on the rollout's own latents, nats
    per latent element; NaN for a step without noise, such as the last of a flow. `kl`: their mean.
    Steps differ in how they react to the network by up to a hundredfold, and a method that does
    not train on one may drift there at no cost to it: compare what was trained on, or

    `drift`: mean squared difference of the two networks' predictions at fixed clean latents,
    levels and noises. It knows no sampler, no guidance and no step, so it means the same for
    every method. Its unit is the variance of the noise.

    Args:
        policy: of the training sampler.
        rollout: what it drew, one image of each of P prompts.
        draws: the random streams of that rollout.
        batch: most latents in one call.
        moved: whether anything was trained; if not, all is 0, at no pass of the network.

    Raises:
        RunError: one is not finite.
    """
    noisy, count = policy.table.std > 0, len(rollout.prompts)
    kl, drift = torch.zeros(count, int(noisy.sum())), torch.zeros(count)
    if moved:
        pretrained = pretrained_means(policy, rollout, batch=batch)
        ours, theirs = (m[:, 0, noisy].flatten(0, 1) for m in (rollout.means, pretrained))
        std = policy.table.std[noisy].float().to(ours.device).repeat(count)
        kl = Gaussian(ours, std).kl(theirs).view(count, -1).cpu()
        drift = _moved(policy, rollout, draws, batch)
    require_finite("evaluation kl to the pretrained model", kl)
    require_finite("difference of the network's outputs from the pretrained model's", drift)
    steps = torch.full((count, policy.steps), math.nan)
    steps[:, noisy] = kl
    named = {f"kl_{i + 1}": steps[:, i] for i in range(policy.steps)}
    return {"kl": kl.mean(1), "drift": drift, **named}


@torch.no_grad()
def _moved(policy: Policy, rollout: Rollout, draws: Draws, batch: int) -> Tensor:
    """Mean squared difference of predictions, [P], at `LEVELS` levels of training.

    The clean latents are what the pretrained model draws without noise on the way, from the
    rollout's first noise: the same for every run of a model, as levels and noises are.
    """
    clean = _pretrained_latents(policy, rollout, draws, batch)
    known = policy.model.process.training_levels.cpu()
    level = known[[(2 * i + 1) * len(known) // (2 * LEVELS) for i in range(LEVELS)]]
    noise = draws.along(range(len(clean)), 1, LEVELS, clean.shape[1:])[:, 0]

    def gap(part: Tensor) -> Tensor:
        i, j, device = part // LEVELS, part % LEVELS, policy.model.device
        text = rollout.conditions.take(i.to(rollout.latents.device)).to(device)
        at = clean[i].to(device), level[j].to(device), noise[i, j].to(device), text
        (now, _), (then, _) = policy.denoise(*at), policy.denoise(*at, weights="base")
        return (now - then).square().flatten(1).mean(1)

    pieces = torch.arange(len(clean) * LEVELS).split(batch)
    return parallel.joined(pieces, gap).view(-1, LEVELS).mean(1)


def _pretrained_latents(policy: Policy, rollout: Rollout, draws: Draws, batch: int) -> Tensor:
    """What the pretrained model draws without noise on the way; drawn once for a loaded model."""
    named = (policy.steps, policy.guidance, rollout.prompts, draws)
    if _drawn.get(policy.model, (None,))[0] != named:
        ode = Policy(
            policy.model, steps=policy.steps, eta=0.0, guidance=policy.guidance, sampler="ddim"
        )

        def walk(part: Tensor) -> Tensor:
            device = policy.model.device
            x = rollout.latents[part, 0, 0].to(device)
            text = rollout.conditions.take(part).to(device)
            for i in range(ode.steps):
                number = torch.full((len(x),), i, device=device)
                x = ode.step(x, number, text, weights="base").mean
            return x

        rows = torch.arange(len(rollout.prompts), device=rollout.latents.device)
        _drawn[policy.model] = named, parallel.joined(rows.split(batch), walk)
    return _drawn[policy.model][1]


_drawn: WeakKeyDictionary[Model, tuple[Any, Tensor]] = WeakKeyDictionary()
"""Model -> what names the latents, and those; they depend on nothing that is trained."""
