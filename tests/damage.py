"""Ways to damage bytes, and functions that fail, for tests of several files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Harm = Callable[[bytes, random.Random], bytes]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flipped_in_the_header(data: bytes, rng: random.Random) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    return flipped(data[:size], rng) + data[size:]


def failing(problem: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise problem

    return fail


def listed(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
