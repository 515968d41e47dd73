"""How fast a round is, as ratios measured in one process on one thread: `nox -s bench`.

Prints the share of a training round that is spent inside the UNet, and the ratio of our round
to a plain loop over the same work in the way of the published code: the two images of a pair
rolled out one after the other, a second UNet as reference, and four network calls of batch 2
for each pair and timestep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from d3po_bench.config import make
from d3po_bench.d3po import d3po_loss
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws
from d3po_bench.models.adapters import DiffusersModel
from d3po_bench.training.trainer import Trainer
from d3po_bench.types import Conditions
from tests.rounds import trainer_of

PAIRS = 8
STEPS = 20


def trainer(**settings: str) -> Trainer:
    """A trainer on the embedded model: one pair per update, T = 20, as the published code."""
    changes = {"prompts_per_round": str(PAIRS), "dtype": "fp32", "learning_rate": "1e-4"}
    config, execution = make(
        "d3po", "incompress", "official_code", changes | settings, model="tiny"
    )
    return trainer_of(config, replace(execution, device="cpu"))


def published_round(policy: Policy, reference: Policy, ours: Trainer) -> None:
    """The same round, one call at a time, on any device."""
    pairs, steps, device = ours.config.prompts_per_round, policy.steps, policy.model.device
    prompts = list(ours.experience.prompts[:pairs])
    conditions = policy.model.encode(prompts)
    draws, shape = Draws(seed=0, round=0), policy.model.latent_shape
    noise = draws.start(range(pairs), 2, True, shape).to(device)
    along = draws.along(range(pairs), 2, steps, shape).to(device)
    chains = [_rollout(policy, noise[:, k], along[:, k], conditions) for k in (0, 1)]
    images = [policy.model.decode(chain[-1]) for chain in chains]
    scores = [ours.experience.scorer(image, prompts) for image in images]
    for pair in range(pairs):
        first = int(scores[1][pair] > scores[0][pair])
        own = conditions.take(slice(pair, pair + 1))
        for i in range(steps):
            ratios, number = [], torch.tensor([i], device=device)
            for k in (first, 1 - first):
                x, x_next = chains[k][i][pair : pair + 1], chains[k][i + 1][pair : pair + 1]
                step = policy.step(x, number, own)
                with torch.no_grad():
                    old = reference.step(x, number, own)
                ratios.append(step.log_prob(x_next) - old.log_prob(x_next))
            won = torch.ones(1, device=device)
            loss = d3po_loss(torch.stack(ratios, 1), won).mean()
            (loss / steps).backward()
        ours.optimizer.step()
        ours.optimizer.zero_grad()


@torch.no_grad()
def _rollout(policy: Policy, x: Tensor, noise: Tensor, conditions: Conditions) -> list[Tensor]:
    chain = [x]
    for i in range(policy.steps):
        step = policy.step(chain[-1], torch.full((len(x),), i, device=x.device), conditions)
        chain.append(step.sample(noise[:, i]))
    return chain


@contextmanager
def inside_unet(model: DiffusersModel) -> Iterator[list[float]]:
    """Seconds spent in the UNet's forward, and in backward passes."""
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return result

        return wrapped

    network, backward = model._called, Tensor.backward
    model._called = timed(network)
    Tensor.backward = timed(backward)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        model._called = network
        Tensor.backward = backward  # type: ignore[method-assign]


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Warm both up with a round each, then measure them in turn."""
    torch.set_num_threads(1)
    ours, theirs, frozen = trainer(), trainer(), trainer()
    reference = frozen.policy
    assert isinstance(ours.model, DiffusersModel)

    def our_round() -> None:
        ours.train_round(lambda share: None)

    def their_round() -> None:
        published_round(theirs.policy, reference, theirs)

    our_round()
    their_round()
    fast, slow = [], []
    for _ in range(3):
        with inside_unet(ours.model) as spent:
            fast.append((seconds(our_round), sum(spent)))
        slow.append(seconds(their_round))
    total, unet = (sum(f[i] for f in fast) for i in (0, 1))
    print(f"a round of {PAIRS} pairs, T = {STEPS}, one thread, {len(slow)} repeats")
    print(f"share inside UNet forward and backward: {unet / total:.1%} of {total / 3:.1f} s")
    print(f"plain loop of the published code: {sum(slow) / 3:.1f} s")
    print(f"ratio: {sum(slow) / total:.2f} times faster")


if __name__ == "__main__":
    main()
