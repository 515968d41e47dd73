"""Several processes on one run: equal weights on every rank, whatever their number.

Every rank holds the whole rollout and draws from the same streams. Sampling and gradients are
shared out and put together again, so that a run on four devices is the run on one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(number: int) -> bool:
    """Whether this rank does piece `number` of the work."""
    return number % world() == rank()


def send(piece: Tensor, number: int) -> None:
    """Give piece `number`, filled in by the rank that did it, to all others."""
    if world() > 1:
        whole = piece.contiguous()
        dist.broadcast(whole, number % world())
        piece.copy_(whole)


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in one message."""
    if world() == 1:
        return
    parts = list(tensors)
    flat = torch.cat([p.flatten().double() for p in parts])
    dist.all_reduce(flat)
    for part, total in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        part.copy_(total.view_as(part))
