"""update(): the only loop over micro-batches and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Generator, Tensor

from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.finite import REMEDY, first_not_finite, require_finite_weights
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.transfer import items_sent
from d3po_bench.errors import RunError
from d3po_bench.types import Method, Metrics, Rows

R = TypeVar("R", bound=Rows)


@runtime_checkable
class SharesMean(Protocol):
    """A method whose loss needs a mean over all items of an optimizer step.

    Its rows have a tensor `shared` [M, T], in which `loss` finds that mean, whatever the split
    into micro-batches and ranks, and may have a tensor `own` [M, T] for what was averaged.
    """

    def shared(self, policy: Policy, items: Any) -> Tensor:
        """What is averaged, [N]; called without gradient."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How a round's rows become optimizer steps."""

    units: int = 1
    """Update units in one optimizer step."""
    count: int = 0
    """Optimizer steps of a pass, where it is not `units` that decides; 0: it does."""
    timestep_fraction: float = 1.0
    """Share of each unit's steps that are trained on, a random subset for every unit."""
    skip: int = 0
    """Last denoising steps that are not trained on."""
    first: int = 0
    """First denoising step that is trained on."""
    every: Literal["unit", "timestep"] = "unit"
    """An optimizer step after all steps of its units, or after each (the paper's Algorithm 1)."""
    passes: int = 1
    """Times through the rows."""
    micro_batch: int = 64
    """Items in one forward and backward; it does not change the result beyond rounding."""
    max_grad_norm: float = 1.0
    step_gradients: bool = False
    """Also measure the gradient norm of each denoising step, before the first optimizer step."""


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
    micro-batches: the gradient is that of one timestep at a time. Without rows nothing changes.
    With loss scaling, `skipped` counts the steps that it passes over, whose gradient overflowed;
    `grad_norm` is a mean of the others, and absent where there are none.

    Raises:
        RunError: a loss or gradient is not finite, and the weights are those before that step; or
            the last step has left weights that are not; or autograd is switched off.
    """
    if len(rows) == 0:
        return {"updates": 0}
    if not torch.is_grad_enabled():  # a loss without a gradient would be passed over
        raise RunError(
            "Autograd is switched off, so nothing would be trained: a package called "
            "torch.set_grad_enabled(False). Make it use `with torch.no_grad():` instead."
        )
    groups = [g for _ in range(updates.passes) for g in _groups(rows, updates, rng)]
    parameters = list(policy.model.trainable().values())
    found: list[Metrics] = []
    by_step: dict[str, float] = {}
    if scaler is not None:  # a rank without a micro-batch of its own has to have a scale, too
        scaler.scale(torch.zeros((), device=policy.model.device))
    accumulate = partial(_accumulate, policy, method, rows, updates.micro_batch, scaler)
    if updates.step_gradients:
        by_step = _by_step(policy, accumulate, *groups[0], scaler)
    for number, (unit, step) in enumerate(groups):
        metrics = accumulate(unit, step)
        metrics["grad_norm"] = _clip(parameters, optimizer, updates.max_grad_norm, scaler)
        _require_finite(metrics, scaler, policy.model.trainable())
        _apply(optimizer, scaler)
        found.append(metrics)
        progress((number + 1) / len(groups))
    require_finite_weights(policy.model.trainable())  # no loss is computed with the last ones
    return {**_means(found, scaler), **by_step, "updates": len(groups)}


def _means(found: Sequence[Metrics], scaler: torch.amp.GradScaler | None) -> dict[str, float]:
    """Over optimizer steps; the gradient norm over those alone that a scaler did not skip."""
    norms = [float(metrics.pop("grad_norm")) for metrics in found]
    taken = [norm for norm in norms if math.isfinite(norm)]
    names = dict.fromkeys(name for metrics in found for name in metrics)
    means = {n: sum(float(m[n]) / len(found) for m in found if n in m) for n in names}
    if taken:
        means["grad_norm"] = sum(norm / len(taken) for norm in taken)
    return means if scaler is None else {**means, "skipped": len(found) - len(taken)}


def _by_step(
    policy: Policy,
    accumulate: Callable[[Tensor, Tensor], Metrics],
    unit: Tensor,
    step: Tensor,
    scaler: torch.amp.GradScaler | None,
) -> dict[str, float]:
    """Gradient norm of the mean loss over the items of each denoising step; nothing is learned.

    Named grad_norm/0 for the first step, and so on; none where it overflows. Its passes do not
    count as the run's.
    """
    spent, found = (policy.model.forwards, policy.model.backwards), {}
    parameters = list(policy.model.trainable().values())
    scale = 1.0 if scaler is None else scaler.get_scale()
    for number in step.unique().tolist():
        own = step == number
        accumulate(unit[own], step[own])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.isfinite():
            found[f"grad_norm/{number}"] = float(norm) / scale
        _set_gradients(parameters, [None] * len(parameters))
    policy.model.forwards, policy.model.backwards = spent
    return found


def require_own_names(method: str, found: Iterable[str], ours: Iterable[str]) -> None:
    """Refuse what a method measures under a name that every run has: one would be lost.

    Raises:
        RunError: naming both.
    """
    if twice := sorted({*found} & {*ours}):
        raise RunError(
            f"The method {method} measures {twice[0]}, as every run does. Rename it in its loss."
        )


def _groups(rows: Rows, updates: Updates, rng: Generator) -> list[tuple[Tensor, Tensor]]:
    """The (unit, step) items of each optimizer step of one pass."""
    trained = rows.steps - updates.skip - updates.first
    kept = max(1, round(trained * updates.timestep_fraction))
    order = torch.randperm(len(rows), generator=rng)
    steps = torch.stack([torch.randperm(trained, generator=rng) for _ in order])[:, :kept]
    steps += updates.first
    groups = []
    count, places = min(updates.count, len(order)), torch.arange(len(order))
    for part in places.tensor_split(count) if count else places.split(updates.units):
        unit, step = order[part].unsqueeze(1).expand(-1, kept), steps[part]
        if updates.every == "timestep":
            groups += list(zip(unit.unbind(1), step.unbind(1), strict=True))
        else:
            groups.append((unit.flatten(), step.flatten()))
    return groups


def _accumulate(
    policy: Policy,
    method: Method[R],
    rows: R,
    micro_batch: int,
    scaler: torch.amp.GradScaler | None,
    unit: Tensor,
    step: Tensor,
) -> Metrics:
    """Gradients of the mean loss over the items, a micro-batch at a time; mean metrics.

    Micro-batches are the same whatever the number of ranks. Those that the ranks do at a time are
    a wave; a rank that has none in the last wave adds nothing.
    """
    pieces = _pieces(rows, unit, step, micro_batch)
    parameters = list(policy.model.trainable().values())
    ranks, totals = parallel.world(), Metrics()
    sums = [p.grad for p in parameters]
    complete = _with_mean(policy, method, rows, pieces)

    def backward(number: int) -> Metrics:
        if number >= len(pieces):
            return {}
        sent = items_sent(rows.take(*pieces[number]), policy.model.device)
        items = complete(number, sent)
        return _backward(policy, method, items, len(pieces[number][0]) / len(unit), scaler)

    for first in range(0, len(pieces), ranks):
        if ranks > 1:  # this piece's gradients alone; one rank's are added up by autograd
            _set_gradients(parameters, [None] * len(parameters))
        own = parallel.together(partial(backward, first + parallel.rank()))
        if ranks > 1:
            busy = min(ranks, len(pieces) - first)
            parallel.add_in_order(sums, [p.grad for p in parameters], busy)
            own = {name: value.cpu() for name, value in own.items()}
        for metrics in parallel.gather(own):
            for name, part in metrics.items():
                totals[name] = totals[name] + part if name in totals else part
    if ranks > 1:
        _set_gradients(parameters, sums)
    return totals


def _pieces(
    rows: Rows, unit: Tensor, step: Tensor, micro_batch: int
) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of the items of an optimizer step.

    Where items share parts that are computed once, those of a step that do lie next to each other,
    and a micro-batch is full when it has as many different parts as its items would have alone.
    """
    same: Tensor | None = getattr(rows, "same", None)
    parts = None if same is None else same[unit.to(same.device), step.to(same.device)].cpu()
    if parts is None or len(parts.unique()) == parts.numel():
        return list(zip(unit.split(micro_batch), step.split(micro_batch), strict=True))
    known = [sorted(own) for own in parts.tolist()]
    numbers = step.tolist()
    order = sorted(range(len(known)), key=lambda item: (numbers[item], known[item]))
    cuts, there = [0], set[int]()
    for place, item in enumerate(order):
        if place and len(there.union(known[item])) > micro_batch * parts.shape[1]:
            cuts.append(place)
            there.clear()
        there.update(known[item])
    sizes = [end - start for start, end in pairwise([*cuts, len(order)])]
    whole = torch.tensor(order)
    return list(zip(unit[whole].split(sizes), step[whole].split(sizes), strict=True))


@torch.no_grad()
def _with_mean(
    policy: Policy, method: Method[R], rows: R, pieces: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[int, R], R]:
    """What puts into the items of a piece the mean that the method shares over all, if it does.

    Each piece is computed by one rank, the one that learns from it, and added in their order.
    """
    if not isinstance(method, SharesMean):
        return lambda number, items: items
    own: dict[int, Tensor] = {}

    def compute(number: int) -> None:
        items = items_sent(rows.take(*pieces[number]), policy.model.device)
        own[number] = method.shared(policy, items)

    parallel.share(len(pieces), compute)
    shares = parallel.gather({n: found.cpu().double().sum() for n, found in own.items()})
    total = torch.stack([shares[n % len(shares)][n] for n in range(len(pieces))]).sum()
    mean = float(total) / sum(len(unit) for unit, _ in pieces)

    def filled(number: int, items: R) -> R:
        values = vars(items)
        found = {"shared": torch.full_like(values["shared"], mean), "own": own[number]}
        return type(items)(**values | {n: found[n] for n in found.keys() & values.keys()})

    return filled


def _set_gradients(parameters: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _backward(
    policy: Policy, method: Method[R], items: R, share: float, scaler: torch.amp.GradScaler | None
) -> Metrics:
    """Add to the gradients those of some items, of whose mean loss they are a share."""
    loss, metrics = method.loss(policy, items)
    require_own_names(type(method).__name__, metrics, ("loss", "grad_norm", "updates", "skipped"))
    scaled = loss * share if scaler is None else scaler.scale(loss * share)
    if not scaled.requires_grad:
        raise RunError(
            f"The loss of {type(method).__name__} has no gradient, so nothing would be "
            "trained. Compute it from policy.step or policy.denoise, without detach or no_grad."
        )
    scaled.backward()
    return {n: v.detach().double() * share for n, v in {"loss": loss, **metrics}.items()}


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
    require_finite_weights(weights)  # of which all the rest is made
    grads = {n: w.grad for n, w in weights.items() if w.grad is not None}
    where = f", first in {first_not_finite(grads)}" if list(wrong) == ["grad_norm"] else ""
    # A loss is made of what the method measures beside it, such as abs_log_ratio.
    said = ", ".join(f"{value} for {name}" for name, value in wrong.items())
    raise RunError(f"The update is not finite: {said}{where}. {REMEDY}")


def _apply(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=False)
