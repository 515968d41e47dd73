"""One seed reaches every random draw through a named stream.

A stream is a function of (seed, purpose, round, index) alone, so that no draw depends on the
batch split, the number of processes, or on whether evaluation is switched on. Noise is drawn
on the CPU, per image: it is the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Generator, Tensor

Purpose = Literal[
    "prompts",
    "noise",
    "steps",
    "rows",
    "shuffle",
    "adapter",
    "eval-noise",
    "eval-steps",
    "raters",
    "choices",
    "window",
]


def stream(seed: int, purpose: Purpose, round_: int = 0, index: int = 0) -> Generator:
    """An independent generator on the CPU."""
    key = f"{seed}/{purpose}/{round_}/{index}".encode()
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
    return Generator().manual_seed(number)


def normal(shape: Iterable[int], generators: Iterable[Generator]) -> Tensor:
    """Standard normal [len(generators), *shape], one stream for each entry."""
    shape = tuple(shape)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
