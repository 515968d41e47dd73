"""The training loop of version 2: it resumes where a killed run stopped, on a CPU or a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d3po_bench.models.embedded.recipe import rate, share_gradients

EVERY = 180.0
"""Seconds between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and on what a stage trains."""

    name: str
    images: int
    """Pictures to see in all."""
    batch: int
    lr: float
    steady: float = 0.0
    """Share of the plan at the full rate; then the rate falls along half a cosine."""
    memory: int
    """Pictures over which the weights are averaged, about."""
    folder: Path
    device: torch.device
    bf16: bool
    seed: int
    minutes: float | None = None
    """Let this call's time, instead of `images`, bring the rate to its end."""
    lead: bool = True
    """Whether this process writes; the first of several does."""

    @property
    def checkpoint(self) -> Path:
        """Everything needed to resume."""
        return self.folder / f"{self.name}.checkpoint"

    @property
    def weights(self) -> Path:
        """The averaged weights, as safetensors."""
        return self.folder / f"{self.name}.safetensors"


@dataclass
class State:
    """What changes while training."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    loss: float = float("nan")


class Average:
    """Exponential moving average of a module's floating-point state."""

    def __init__(self, module: nn.Module) -> None:
        """Start at the module's state."""
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Move a share 1 - `decay` towards the module."""
        now = module.state_dict()
        names = [k for k, v in now.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.shadow[k] for k in names], [now[k] for k in names], 1 - decay)


def random(plan: Plan, step: int) -> torch.Generator:
    """Random numbers of one step, the same after a restart; each process has its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    seed = (plan.seed * 1_000_003 + step) * 64 + rank
    return torch.Generator(plan.device).manual_seed(seed)


def _save(plan: Plan, state: State, module: nn.Module, optimizer: Any, average: Average) -> None:
    from safetensors.torch import save_file

    whole = {
        "state": vars(state), "module": module.state_dict(), "average": average.shadow,
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    part = plan.checkpoint.with_suffix(".part")
    torch.save(whole, part)
    part.replace(plan.checkpoint)
    save_file({k: v.contiguous() for k, v in average.shadow.items()}, part)
    part.replace(plan.weights)
    with (plan.folder / f"{plan.name}.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(vars(state)) + "\n")
    print(plan.name, json.dumps(vars(state)), flush=True)


def _restored(plan: Plan, module: nn.Module, optimizer: Any, average: Average) -> State:
    if not plan.checkpoint.exists():
        return State()
    whole = torch.load(plan.checkpoint, map_location=plan.device, weights_only=True)
    module.load_state_dict(whole["module"])
    optimizer.load_state_dict(whole["optimizer"])
    average.shadow = whole["average"]
    state = State(**whole["state"])
    if not plan.minutes:
        state.progress = state.images / plan.images
    return state


def _agreed(value: float) -> float:
    """The first process's value."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def fit(
    plan: Plan,
    module: nn.Module,
    loss: Callable[[torch.Generator, int], Tensor],
    look: Callable[[dict[str, Tensor], State], None] | None = None,
) -> State:
    """Train with AdamW to the plan's end, from its checkpoint if there is one.

    Args:
        plan: how long, and where the checkpoint lies.
        module: on the plan's device.
        loss: of one batch of so many pictures, drawn with the given random numbers.
        look: called with the averaged weights after each checkpoint.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = Average(module)
    state = _restored(plan, module, optimizer, average)
    share = plan.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    cast = torch.autocast(plan.device.type, torch.bfloat16) if plan.bf16 else nullcontext()
    begun, before, first, saved = time.monotonic(), state.seconds, state.progress, 0.0
    losses: list[Tensor] = []
    while state.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * rate(_falling(plan, state), state.step, warmup=200)
        with cast:
            value = loss(random(plan, state.step), share)
        losses.append(value.detach())
        _descend(module, optimizer, value)
        decay = 1 - plan.batch / plan.memory
        average.update(module, min(decay, (1 + state.step) / (10 + state.step)))
        spent = _agreed(time.monotonic() - begun)
        state.step, state.images = state.step + 1, state.images + plan.batch
        state.seconds, state.progress = before + spent, _progress(plan, state, first, spent)
        if spent - saved >= EVERY or state.progress >= 1:
            state.loss, saved = torch.stack(losses).mean().item(), spent
            losses.clear()
            if plan.lead:
                _save(plan, state, module, optimizer, average)
            if plan.lead and look:
                look(average.shadow, state)
    return state


def _descend(module: nn.Module, optimizer: torch.optim.Optimizer, value: Tensor) -> None:
    """One step down the gradient, whose length is at most 1."""
    optimizer.zero_grad()
    value.backward()
    share_gradients(module)
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def _falling(plan: Plan, state: State) -> float:
    """Share of the fall of the rate that is over."""
    return max(0.0, state.progress - plan.steady) / (1 - plan.steady)


def _progress(plan: Plan, state: State, first: float, spent: float) -> float:
    """Share of the plan that is over; `first` was when this call began, `spent` seconds ago."""
    if plan.minutes:
        return first + (1 - first) * spent / 60 / plan.minutes
    return state.images / plan.images
