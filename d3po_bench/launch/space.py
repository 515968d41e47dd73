"""What `d3po-bench tune` searches, and what becomes of a proposal: settings as after --set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from d3po_bench import registry
from d3po_bench.config import RunConfig, method_of
from d3po_bench.launch.grid import as_set

Space = Mapping[str, tuple[float, float] | list[Any]]
"""Setting -> from and to, on a logarithmic scale, or what is chosen from."""

COMMON: Space = {
    "learning_rate": (1e-4, 1e-2),
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
"""So many first trials lie evenly in the space; a power of two."""

AXES = 16
"""Of the points that are spread; of methods with fewer, some are not used."""


def spread(space: Space, number: int, seed: int) -> dict[str, Any]:
    """A trial of a set that covers the space evenly: a point of Sobol's sequence, scrambled.

    Every eighth of the rates' range has one of the `SPREAD` trials, and every choice of an option
    about as many. What methods have in common is the same in all their trials of a number, so that
    none is luckier with its rates than another.

    Args:
        space: of a method.
        number: of the trial, from 0 to `SPREAD` - 1.
        seed: of the scrambling.

    Returns:
        Setting -> value.
    """
    from scipy.stats.qmc import Sobol

    names = [*COMMON, *(name for name in space if name not in COMMON)]
    axes = max(AXES, len(names))
    point = dict(zip(names, Sobol(axes, rng=seed).random(SPREAD)[number].tolist(), strict=False))
    return {
        name: of[0] * (of[1] / of[0]) ** point[name] if isinstance(of, tuple)
        else of[int(point[name] * len(of))] for name, of in space.items()
    }  # fmt: skip


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
