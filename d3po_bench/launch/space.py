"""What `d3po-bench tune` searches, and what becomes of a proposal: settings as after --set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3po_bench import registry
from d3po_bench.config import RunConfig, method_of
from d3po_bench.launch.grid import as_set

Space = Mapping[str, tuple[float, float] | list[Any]]
"""Setting -> from and to, on a logarithmic scale, or what is chosen from."""

RATE = "learning_rate"

COMMON: Space = {
    RATE: (1e-4, 1e-2),
    "updates_per_round": [1, 2, 4, 8, 16],
    "images_per_prompt": [2, 4, 8],
}
"""What every method is free in. A round has as many images whatever their number of a prompt."""


def space_of(config: RunConfig, given: Mapping[str, str]) -> Space:
    """What is searched for a method: what every method has, then what is its own.

    A method's own space is its attribute `search`. A setting that the command line gave, or a
    choice that makes a variant what it is, is not searched; a range of a variant's is.

    Args:
        config: of a run of the method.
        given: settings of the command line.
    """
    method, steps = method_of(config), config.sampling_steps
    found: dict[str, Any] = dict(COMMON)
    if getattr(method, "needs_chain", True):
        found["skip_steps"] = sorted({0, steps // 4, steps // 2})
    else:
        found["timestep_fraction"] = [0.25, 0.5, 1.0]
    if "shared_noise" in {option.name for option in fields(method)}:
        found["shared_noise"] = [False, True]
    found |= getattr(method, "search", {})
    fixed = {name for name in registry.variant(config.method)[1] if type(found.get(name)) is list}
    return {name: of for name, of in found.items() if name not in {*fixed, *given}}


SPREAD = 8
"""So many first trials lie evenly in the space."""


def spread(space: Space, number: int, seed: int) -> dict[str, Any]:
    """One of the `SPREAD` trials that cover a space evenly, a Latin hypercube.

    Each eighth of a range has one of them, in its middle, and each choice about as many. The rates
    and numbers of updates are the same for every method, so that none is lucky. Choices of two are
    tried as often at high rates as at low ones; with more, some are tried at one end alone.

    Args:
        space: of a method.
        number: of the trial, from 0 to `SPREAD` - 1.
        seed: of the hypercube.

    Returns:
        Setting -> value.
    """
    names = [*COMMON, *(name for name in space if name not in COMMON)]
    point = dict(zip(names, (_hypercube(len(names), seed)[:, number] + 0.5) / SPREAD, strict=True))
    return {
        name: float(of[0] * (of[1] / of[0]) ** point[name]) if isinstance(of, tuple)
        else of[int(point[name] * len(of))] for name, of in space.items()
    }  # fmt: skip


REFINED = 4
"""So many trials then repeat one of the first at other rates."""


def rescaled(space: Space, point: Mapping[str, Any], number: int, *, lower: bool) -> dict[str, Any]:
    """A point of a space with another rate, each a factor of 1.41 from the one before.

    Where the range ends within a factor of 4, they lie closer, up to its end.

    Args:
        space: of a method.
        point: setting -> value.
        number: of the new point, from 0 to `REFINED` - 1.
        lower: whether the rate is to fall.

    Returns:
        Setting -> value.
    """
    least, most = space[RATE]
    rate = point[RATE]
    whole = max(least / rate, 1 / 4) if lower else min(most / rate, 4.0)
    other = rate * whole ** ((number + 1) / REFINED)
    return {**point, RATE: float(min(max(other, least), most))}


TRIED = 2000
"""Permutations for each axis, of 40,320."""


@cache
def _hypercube(axes: int, seed: int) -> NDArray[np.int64]:
    """[axes, SPREAD] ranks from 0; of more axes, the first ones are the same.

    Each axis takes, of many permutations, the one that depends least on those before: up to the
    seventh, its upper half has half of each other upper half. Otherwise one of two choices would
    be tried at high rates alone.
    """
    rng = np.random.default_rng(seed)
    found = [rng.permutation(SPREAD)]
    for _ in range(1, axes):
        tried = (rng.permutation(SPREAD) for _ in range(TRIED))
        found.append(min(tried, key=partial(_dependence, found)))
    return np.array(found)


def _dependence(others: list[NDArray[np.int64]], ranks: NDArray[np.int64]) -> tuple[float, float]:
    """The largest correlation of an axis with others: of their halves, then of their ranks."""
    whole = np.array([*others, ranks])
    halves, all_ = (
        np.atleast_2d(np.corrcoef(part))[-1, :-1] for part in (whole >= SPREAD // 2, whole)
    )
    return round(float(abs(halves).max()), 6), float(abs(all_).max())


def settings_of(params: Mapping[str, Any], config: RunConfig, images: int = 0) -> dict[str, str]:
    """What a trial sets, as after --set.

    Args:
        params: setting -> value that was proposed; of a number, three digits count.
        config: of a run of the method.
        images: of a round; 0: as many as the config has.
    """
    found = {k: float(f"{v:.3g}") if type(v) is float else v for k, v in params.items()}
    usual = config.images_per_prompt or method_of(config).images_per_prompt
    of_one = found.get("images_per_prompt", usual)
    found["prompts_per_round"] = max(1, (images or config.prompts_per_round * usual) // of_one)
    return {name: as_set(value) for name, value in found.items()}
