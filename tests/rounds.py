"""Rounds of the micro model, and their gradients, for several test files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.dpok import DPOK, Regularised
from d3po_bench.config import Execution, RunConfig
from d3po_bench.d3po import D3PO, Pairs
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.models.sources import model_source
from d3po_bench.training.run import Job, on_policy
from d3po_bench.training.trainer import Trainer
from d3po_bench.types import Conditions, Model, Rollout, Weights
from eval.tools import TOOLS
from tests.conftest import CPU

PROMPTS = ["cat", "dog", "a dog on a red background"]


def rollout_of(policy: Policy, images: int = 2, *, shared: bool = True, seed: int = 0) -> Rollout:
    """Images of the three prompts, with random scores."""
    draws = Draws(seed=seed, round=0)
    drawn = sample(policy, PROMPTS, draws, images_per_prompt=images, shared_noise=shared)
    scores = torch.randn(len(PROMPTS), images, generator=torch.Generator().manual_seed(5))
    return replace(drawn, scores=scores)


def rows_of(policy: Policy, method: D3PO | None = None, *, untrained: bool = False) -> Pairs:
    """Three pairs."""
    method = method or D3PO()
    rollout = with_reference(policy, rollout_of(policy), method, untrained=untrained, batch=7)
    return method.rows(rollout, stream(0, "rows"))


def scored(
    prompts: Sequence[str], scores: Any, history: Mapping[str, Sequence[float]] | None = None
) -> Rollout:
    """A rollout with nothing but scores [P, K], and those of earlier rounds."""
    nothing = torch.empty(0)
    return Rollout(
        prompts=prompts, conditions=Conditions({}), latents=nothing, means=nothing,
        levels=nothing, training_levels=nothing, scores=torch.as_tensor(scores),
        history=history or {},
    )  # fmt: skip


def adam(model: Model, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(model.trainable().values()), lr, weight_decay=0.0)


def weights(model: Model) -> Tensor:
    """All trainable weights in one vector."""
    return torch.cat([w.detach().flatten() for w in model.trainable().values()])


def gradient(model: Model) -> Tensor:
    """The gradient of all of them."""
    grads = [w.grad for w in model.trainable().values() if w.grad is not None]
    return torch.cat([g.flatten() for g in grads])


def near(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` of the length of the vector."""
    assert expected.norm() > 0
    assert (ours - expected).norm() <= tolerance * expected.norm()


def trainer_of(config: RunConfig, execution: Execution) -> Trainer:
    """A trainer as `run` makes it, on the CPU."""
    job = Job(config=config, execution=execution, folder=Path("unused"), tools=TOOLS)
    experience = on_policy(job, CPU, model_source(config.model).scorers)
    return Trainer(config, execution, experience, CPU)


class KeepGradient(torch.optim.SGD):
    """Keeps the gradient of the last step instead of using it."""

    def __init__(self, model: Model) -> None:
        super().__init__(list(model.trainable().values()), lr=0.0)
        self.kept = torch.empty(0)
        self.model = model

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.kept = gradient(self.model)


@dataclass(frozen=True)
class _GivenRatio(Gaussian):
    ratio: Tensor

    def log_ratio(self, other_mean: Tensor, x: Tensor) -> Tensor:
        return self.ratio


class _GivenRatios(Policy):
    """A policy whose steps have log-ratios that a test gives."""

    def __init__(self, log_ratio: Tensor) -> None:
        self.log_ratio = log_ratio

    def step(
        self, x_t: Tensor, step: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Gaussian:
        return _GivenRatio(x_t, torch.ones(len(x_t)), self.log_ratio)


def dpok_losses(method: DPOK, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """DPOK's loss without a penalty, [N], of log-ratios and advantages [N], one item at a time."""
    x = torch.zeros(1, 1, 1, 1)
    losses = []
    for ratio, a in zip(log_ratio.split(1), advantage.split(1), strict=True):
        item = Regularised(
            x_t=x, x_next=x, sampled=x, pretrained=x, step=torch.zeros(1, dtype=torch.int64),
            conditions=Conditions({}), advantage=a,
        )  # fmt: skip
        losses.append(method.loss(_GivenRatios(ratio), item)[0])
    return torch.stack(losses)
