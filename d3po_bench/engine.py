"""sample() and update(): the only loops over prompts, denoising steps and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor

from d3po_bench import parallel
from d3po_bench.errors import RunError
from d3po_bench.policy import Policy
from d3po_bench.seeding import Purpose, normal, stream
from d3po_bench.types import Choosy, Method, Metrics, Rollout, Rows

R = TypeVar("R", bound=Rows)

_REMEDY = "Lower learning_rate, or use dtype fp32: what was written before this round is kept."


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Names the random streams of one rollout: noise and steps of image k of prompt p."""

    seed: int
    round: int
    noise: Purpose = "noise"
    steps: Purpose = "steps"
    first: int = 0
    """Number of the first prompt: a part of a list draws what it would in the whole."""

    def start(self, rows: range, images: int, shared: bool, shape: Sequence[int]) -> Tensor:
        """Initial noise [P, K, C, H, W] of the prompts `rows`; K equal ones where shared."""
        prompts = range(self.first + rows.start, self.first + rows.stop)
        index = [p * images + (0 if shared else k) for p in prompts for k in range(images)]
        unique = sorted(set(index))
        drawn = normal(shape, (stream(self.seed, self.noise, self.round, i) for i in unique))
        place = torch.tensor([unique.index(i) for i in index])
        return drawn[place].view(len(rows), images, *shape)

    def along(self, rows: range, images: int, steps: int, shape: Sequence[int]) -> Tensor:
        """Step noise [P, K, T, C, H, W] of the prompts `rows`."""
        index = range((self.first + rows.start) * images, (self.first + rows.stop) * images)
        streams = (stream(self.seed, self.steps, self.round, i) for i in index)
        return normal((steps, *shape), streams).view(len(rows), images, steps, *shape)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[str],
    draws: Draws,
    *,
    images_per_prompt: int = 1,
    shared_noise: bool = False,
    batch: int = 64,
    progress: Callable[[float], None] = lambda share: None,
) -> Rollout:
    """Draw images and keep every latent on the way; scores are left at zero.

    Args:
        policy: whose steps to take.
        prompts: P prompts.
        draws: the random streams to use.
        images_per_prompt: K.
        shared_noise: start the K images of a prompt from one noise; their first step is then
            computed once.
        batch: most images in flight at a time; it does not change what is drawn.
        progress: called with the share done.

    Raises:
        RunError: a mean is not finite.
    """
    k, total = images_per_prompt, len(prompts)
    model, t = policy.model, policy.timesteps
    shape, steps = model.latent_shape, len(t)
    text = model.encode(prompts)
    latents = torch.empty(total, k, steps + 1, *shape, device=model.device)
    means = torch.empty(total, k, steps, *shape, device=model.device)
    block = max(1, batch // k)
    blocks = [range(start, min(start + block, total)) for start in range(0, total, block)]
    for number, rows in enumerate(blocks):
        if not parallel.mine(number):
            continue
        part = slice(rows.start, rows.stop)
        latents[part, :, 0] = draws.start(rows, k, shared_noise, shape).to(model.device)
        noise = draws.along(rows, k, steps, shape).to(model.device)
        _walk(policy, latents[part], means[part], noise, text[part], shared_noise)
        progress(rows.stop / total)
    for number, rows in enumerate(blocks):
        parallel.send(latents[rows.start : rows.stop], number)
        parallel.send(means[rows.start : rows.stop], number)
    require_finite("means of the denoising steps", means)  # of which latents are made
    return Rollout(
        prompts=tuple(prompts), text=text, latents=latents, means=means, timesteps=t,
        scores=torch.zeros(total, k),
    )  # fmt: skip


def _walk(
    policy: Policy, latents: Tensor, means: Tensor, noise: Tensor, text: Tensor, shared: bool
) -> None:
    """Fill in the means of a block of prompts, and the latents after the first."""
    for i, t in enumerate(policy.timesteps):
        means[:, :, i] = _step_means(policy, latents[:, :, i], t, text, shared and i == 0)
        std = float(policy.schedule.std[i])
        latents[:, :, i + 1] = means[:, :, i] + std * noise[:, :, i]


def _step_means(
    policy: Policy, x: Tensor, t: Tensor, text: Tensor, shared: bool, frozen: bool = False
) -> Tensor:
    """Means [P, K, C, H, W] of one step; computed once per prompt where x is shared."""
    p, k = x.shape[:2]
    if shared:
        mean = policy.step(x[:, 0], t.expand(p), text, frozen=frozen).mean
        return mean.unsqueeze(1).expand_as(x)
    flat = policy.step(
        x.flatten(0, 1), t.expand(p * k), text.repeat_interleave(k, 0), frozen=frozen
    )
    return flat.mean.view_as(x)


@torch.no_grad()
def pretrained_means(
    policy: Policy,
    rollout: Rollout,
    *,
    batch: int = 256,
    skip: int = 0,
    images: Tensor | None = None,
) -> Tensor:
    """Step means [P, K, T - skip, C, H, W] of the pretrained model on a rollout's own latents.

    Depends on nothing trainable, so once per round is enough, in large batches.

    Args:
        policy: whose model and schedule.
        rollout: the latents.
        batch: most steps in one call.
        skip: last steps to leave out.
        images: [P, K] bool, which images; the others keep the rollout's own means. All if None.
    """
    out = rollout.means[:, :, : rollout.means.shape[2] - skip].clone()
    steps, device = out.shape[2], out.device
    chosen = torch.ones(out.shape[:2], dtype=torch.bool) if images is None else images
    prompt, image = chosen.to(device).nonzero(as_tuple=True)
    flat = torch.empty(len(prompt) * steps, *out.shape[3:], device=device)
    pieces = torch.arange(len(flat), device=device).split(batch)
    for number, items in enumerate(pieces):
        if parallel.mine(number):
            i, j, s = prompt[items // steps], image[items // steps], items % steps
            x, t, text = rollout.latents[i, j, s], rollout.timesteps[s], rollout.text[i]
            flat[items] = policy.step(x, t, text, frozen=True).mean
    for number, items in enumerate(pieces):
        parallel.send(flat[int(items[0]) : int(items[-1]) + 1], number)
    out[prompt, image] = flat.view(len(prompt), *out.shape[2:])
    return out


def learnt_images(method: Method[Any], rollout: Rollout) -> Tensor:
    """Which images of a scored rollout the method learns from, [P, K] bool."""
    if isinstance(method, Choosy):
        return method.learnt(rollout)
    return torch.ones(rollout.means.shape[:2], dtype=torch.bool)


def with_reference(
    policy: Policy,
    rollout: Rollout,
    method: Method[Any],
    *,
    untrained: bool,
    batch: int,
    skip: int = 0,
) -> Rollout:
    """Add the reference means that the method asks for.

    They are the rollout's own where the reference is the sampling policy, and also while the
    policy is `untrained`: then it equals the pretrained model, and wherever nothing is learnt
    from: the last `skip` steps, and images that the method does not choose.
    """
    if method.reference is None:
        return rollout
    if method.reference == "sampling" or untrained:
        return replace(rollout, reference=rollout.means)
    images = learnt_images(method, rollout)
    learnt = pretrained_means(policy, rollout, batch=batch, skip=skip, images=images)
    require_finite("means of the reference", learnt)
    rest = rollout.means[:, :, learnt.shape[2] :]
    return replace(rollout, reference=torch.cat([learnt, rest], 2))


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How a round's rows become optimizer steps."""

    units: int = 1
    """Update units in one optimizer step."""
    timestep_fraction: float = 1.0
    """Share of each unit's steps that are learnt from, a random subset for every unit."""
    skip: int = 0
    """Last denoising steps that are not learnt from."""
    every: Literal["unit", "timestep"] = "unit"
    """An optimizer step after all steps of its units, or after each (the paper's Algorithm 1)."""
    passes: int = 1
    """Times through the rows."""
    micro_batch: int = 64
    """Items in one forward and backward; it does not change the result beyond rounding."""
    max_grad_norm: float = 1.0


def update(
    policy: Policy,
    method: Method[R],
    rows: R,
    optimizer: torch.optim.Optimizer,
    updates: Updates,
    rng: Generator,
    scaler: torch.amp.GradScaler | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Learn from a round's rows; returns diagnostics averaged over items and optimizer steps.

    Weights are constant within an optimizer step, so all its timesteps are merged and run in
    micro-batches: the gradient is that of one timestep at a time. Of no rows nothing is learnt.

    Raises:
        RunError: a loss or gradient is not finite, and the weights are those before that step; or
            the last step has left weights that are not.
    """
    if len(rows) == 0:
        return {"updates": 0}
    groups = [g for _ in range(updates.passes) for g in _groups(rows, updates, rng)]
    parameters = list(policy.model.trainable().values())
    totals: dict[str, float] = {}
    for number, (unit, step) in enumerate(groups):
        metrics = _accumulate(policy, method, rows, unit, step, updates.micro_batch, scaler)
        parallel.add_up([*(p.grad for p in parameters if p.grad is not None), *metrics.values()])
        metrics["grad_norm"] = _clip(parameters, optimizer, updates.max_grad_norm, scaler)
        _require_finite(metrics, scaler, policy.model.trainable())
        _apply(optimizer, scaler)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) / len(groups)
        progress((number + 1) / len(groups))
    _require_finite_weights(policy.model.trainable())  # no loss is computed with the last ones
    return {**totals, "updates": len(groups)}


def _groups(rows: Rows, updates: Updates, rng: Generator) -> list[tuple[Tensor, Tensor]]:
    """The (unit, step) items of each optimizer step of one pass."""
    learnt = rows.steps - updates.skip
    kept = max(1, round(learnt * updates.timestep_fraction))
    order = torch.randperm(len(rows), generator=rng)
    steps = torch.stack([torch.randperm(learnt, generator=rng) for _ in order])[:, :kept]
    groups = []
    for start in range(0, len(order), updates.units):
        unit = order[start : start + updates.units].unsqueeze(1).expand(-1, kept)
        step = steps[start : start + updates.units]
        if updates.every == "timestep":
            groups += list(zip(unit.unbind(1), step.unbind(1), strict=True))
        else:
            groups.append((unit.flatten(), step.flatten()))
    return groups


def _accumulate(
    policy: Policy,
    method: Method[R],
    rows: R,
    unit: Tensor,
    step: Tensor,
    micro_batch: int,
    scaler: torch.amp.GradScaler | None,
) -> Metrics:
    """Gradients of the mean loss over the items, a micro-batch at a time; mean metrics."""
    totals: Metrics = {}
    size = max(1, min(micro_batch, len(unit) // parallel.world()))
    pieces = list(zip(unit.split(size), step.split(size), strict=True))
    for number, (u, s) in enumerate(pieces):
        mine = parallel.mine(number)
        # A rank without a piece does the last one at weight 0: all have the same sums to add.
        if not mine and (totals or number + 1 < len(pieces)):
            continue
        share = len(u) / len(unit) * mine
        loss, metrics = method.loss(policy, rows.take(u, s))
        scaled = loss * share if scaler is None else scaler.scale(loss * share)
        if scaled.requires_grad:
            scaled.backward()
        for name, value in {"loss": loss, **metrics}.items():
            part = value.detach().double() * share
            totals[name] = totals[name] + part if name in totals else part
    return totals


def _clip(
    parameters: list[Tensor],
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Clip the gradient norm; returns the norm before."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def _require_finite(
    metrics: Metrics, scaler: torch.amp.GradScaler | None, weights: Mapping[str, Tensor]
) -> None:
    """Refuse a step from a loss or gradient that is not finite.

    With loss scaling an overflowing gradient is expected: the scaler skips that step and halves
    its scale. From 65536 to below 1 no step has been taken for long, and none will be.
    """
    wrong = {name: float(value) for name, value in metrics.items() if not value.isfinite()}
    if scaler is not None and scaler.get_scale() >= 1:
        wrong.pop("grad_norm", None)
    if not wrong:
        return
    _require_finite_weights(weights)  # of which all the rest is made
    grads = {n: w.grad for n, w in weights.items() if w.grad is not None}
    where = f", first in {_not_finite(grads)}" if list(wrong) == ["grad_norm"] else ""
    # A loss is made of what the method measures beside it, such as abs_log_ratio.
    said = ", ".join(f"{value} for {name}" for name, value in wrong.items())
    raise RunError(f"Expected finite numbers in the update, got {said}{where}. {_REMEDY}")


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a number that is none; empty if all are finite."""
    fine = [torch.isfinite(tensor).all() for tensor in tensors.values()]
    if not fine or bool(torch.stack(fine).all()):
        return ""
    return next(name for name, holds in zip(tensors, fine, strict=True) if not holds)


def _require_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Stop before weights that are none are drawn with, or written as what was learnt."""
    name = _not_finite(weights)
    if name:
        require_finite(f"weights {name} after an optimizer step", weights[name])


def require_finite(name: str, values: Tensor) -> None:
    """Stop before numbers that are none are learnt from or scored.

    Args:
        name: what people call the tensor.
        values: of any shape.

    Raises:
        RunError: with the name, and how many are not finite.
    """
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise RunError(
            f"Expected finite {name}, got {wrong} of {values.numel()} that are not. {_REMEDY}"
        )


def _apply(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=False)
