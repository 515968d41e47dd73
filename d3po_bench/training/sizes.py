"""How much a run computes at a time: what fits its device, recorded, and kept by whoever resumes.

Sizes decide bits. On a CPU, and for models that are not counted (the embedded one, families of
somebody's own), they are the same for everybody unless a run says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from d3po_bench.config import BATCHES, Execution, RunConfig, least_images, method_of
from d3po_bench.diffusion import parallel
from d3po_bench.errors import TooLarge, is_out_of_memory
from d3po_bench.models.adapters import DiffusersModel
from d3po_bench.models.memory import ROOM, SHARE, Needs
from d3po_bench.models.sources import model_source
from d3po_bench.types import Model

STAGES = {"sample": "sample_batch", "score": "decode_batch", "reference": "reference_batch",
          "update": "micro_batch", "evaluate": "sample_batch"}  # fmt: skip
"""What decides how much a stage of a round computes at a time."""

KEPT = (*BATCHES, "gradient_checkpointing")


def settled(
    asked: Execution, config: RunConfig, model: Model, recorded: Mapping[str, Any],
    note: Callable[[str], None],
) -> Execution:  # fmt: skip
    """The sizes of a run: those asked for, else those it began with, else those that fit.

    All ranks come to the same.

    Args:
        asked: batches of 0 are to be chosen.
        config: of the run.
        model: loaded, its prompts encoded.
        recorded: how the part of the run that is there was computed; empty at its beginning.
        note: called with what people should know.
    """
    began = {n: recorded[n] for n in KEPT if n in recorded}
    wanted = {n: getattr(asked, n) or value for n, value in began.items()}
    # Tensor cores take channels last; fp32 does without them.
    faster = model.device.type == "cuda" and config.dtype != "fp32"
    faster &= isinstance(model, DiffusersModel)
    known = replace(asked, channels_last=asked.channels_last or faster, **wanted)
    counted = asked.memory > 0 or model.device.type == "cuda"
    if model_source(config.model).small or not isinstance(model, DiffusersModel) or not counted:
        return known.usual()
    needs = Needs(model, model.encode([""]))
    limit = min(parallel.gather(free(asked.memory, needs, model.device)))
    found = chosen(known, config, needs, limit)
    if (most := peak(found, config, needs)) > limit:
        which = "The batches that this run began with" if began else "The smallest batches"
        card = ((needs.weights + most) / SHARE + ROOM) / 1e9
        remedy = "choose less, such as --set micro_batch=1" if began else "take a larger card"
        note(
            f"{which} need {most / 1e9:.1f} GB beside the weights, and {max(limit, 0) / 1e9:.1f} "
            f"GB are free. If memory runs out, {remedy}: {card:.0f} GB are enough for these."
        )
    return found


def free(memory: float, needs: Needs, device: torch.device) -> int:
    """Bytes that a run may fill beside its weights.

    Args:
        memory: GB that it may take in all; 0 for what is free.
        needs: of its model.
        device: where it is loaded.
    """
    if memory:
        return int((memory * 1e9 - ROOM) * SHARE) - needs.weights
    available, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((available + held - ROOM) * SHARE)


def chosen(asked: Execution, config: RunConfig, needs: Needs, limit: int) -> Execution:
    """The largest batches that fit, powers of two; what was asked for stays as it is.

    Args:
        asked: batches of 0 are chosen.
        config: of the run.
        needs: of its model.
        limit: bytes beside the weights.
    """
    left = limit - needs.optimizer - _held(config, needs)
    careful = asked.gradient_checkpointing
    if not asked.micro_batch and not careful:
        careful = _each(asked, config, needs)["micro_batch"] > left
    given = replace(asked, gradient_checkpointing=careful)
    found: dict[str, Any] = {}
    for name, each in _each(given, config, needs).items():
        size = getattr(asked, name) or BATCHES[name]
        while not getattr(asked, name) and size > 1 and size * each > left:
            size //= 2
        found[name] = size
    return replace(given, **found)


def peak(execution: Execution, config: RunConfig, needs: Needs) -> int:
    """The most bytes that a run takes beside its weights."""
    each = _each(execution, config, needs)
    most: int = max(getattr(execution, name) * size for name, size in each.items())
    return most + needs.optimizer + _held(config, needs)


def _each(execution: Execution, config: RunConfig, needs: Needs) -> dict[str, int]:
    """Bytes of one more in each batch: its passes, and what is on the device for them."""
    update = needs.checkpointed if execution.gradient_checkpointing else needs.update
    guided = 1 if config.guidance == 1 else 2  # latents in a pass for one of an image
    of_item = min(2, least_images(method_of(config)))  # images, both of a pair
    image = guided * (needs.sampling + 2 * needs.prompt)
    # A chain's latents, means and noise.
    chain = (3 * config.sampling_steps + 1) * needs.latent
    item = of_item * (guided * (update + 2 * needs.prompt) + 3 * needs.latent)
    return {
        "sample_batch": image + chain, "micro_batch": item,
        "reference_batch": image + 2 * needs.latent, "decode_batch": needs.decoding,
    }  # fmt: skip


def _held(config: RunConfig, needs: Needs) -> int:
    """Of a round, beside its batches: the conditions of its prompts, while it is sampled."""
    return config.prompts_per_round * needs.prompt


def recorded(execution: Execution) -> dict[str, Any]:
    """What provenance keeps of it: not the memory, of which the batches were made."""
    return {name: value for name, value in vars(execution).items() if name != "memory"}


@contextmanager
def watched(stage: str, execution: Execution) -> Iterator[None]:
    """Around a stage of a round: what it runs out of memory with is a setting.

    Raises:
        TooLarge: there was no memory for it.
    """
    try:
        yield
    except Exception as problem:
        if not is_out_of_memory(problem) or isinstance(problem, TooLarge):
            raise
        name = STAGES[stage]
        size = getattr(execution, name)
        least = "--set gradient_checkpointing=true" if stage == "update" else "a larger card"
        remedy = f"--set {name}={size // 2}" if size > 1 else least
        raise TooLarge(name, size, remedy) from problem
