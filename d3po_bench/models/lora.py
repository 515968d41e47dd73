"""LoRAs of any trainer, read by diffusers' own loader, and wholly or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.models.one_file import in_one_file

NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for first."""

WHOLE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
"""How names of tensors begin in a model in one file."""


def put_on(pipeline: Any, place: Path) -> None:
    """Load a LoRA into the networks and text encoders of a pipeline.

    Args:
        pipeline: of diffusers, with `load_lora_weights`.
        place: a file, or a folder that holds one.

    Raises:
        UserError: there is no file, there are several, or it is a whole model.
        ValueError: diffusers leaves a tensor out, or makes one up.
    """
    from safetensors import safe_open

    from d3po_bench.models.low_rank import quicken

    file = file_of(place)
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
    if any(name.startswith(WHOLE) for name in names):
        raise in_one_file(file)
    if any(name.endswith("dora_scale") for name in names):
        raise ValueError("it is a DoRA in a form of which diffusers leaves out the dora_scale.")
    with _heard() as said:
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True
        )
    # Every part without layers of its own in the file is told of, which is no fault.
    said = [line for line in said if not line.startswith("No LoRA keys associated to")]
    tensors = sum(not name.endswith(".alpha") for name in names)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    placed = sum("lora_" in name for part in parts for name, _ in part.named_parameters())
    if said or placed != tensors:
        raise ValueError(f"the pipeline takes {placed} of its {tensors} tensors. {' '.join(said)}")
    for part in parts:
        quicken(part)


def file_of(place: Path) -> Path:
    """The file of a LoRA: `place` itself, or the one in it.

    Raises:
        UserError: none, or more than one.
    """
    if place.is_file() or (place / NAME).is_file():
        return place if place.is_file() else place / NAME
    files = sorted(place.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(
            f"{place} holds {len(files)} files, of which any can be the LoRA: "
            f"{', '.join(f.name for f in files[:3])}. Give the path of one file."
        )
    if not place.exists():
        raise UserError(f"{place} is not there. Give the folder or the file of a LoRA.")
    raise UserError(f"{place} holds no LoRA as .safetensors; no other files are loaded.")


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to a layer: up times down, the scale in `up`."""

    down: Tensor
    """[rank, in], or more dimensions for a convolution."""
    up: Tensor
    """[out, rank], as `down`."""


def layers_of(pipeline: Any, network: Any, place: Path) -> dict[str, Layer]:
    """What a LoRA adds to each layer of a network; the pipeline is left as it was.

    Args:
        pipeline: of diffusers, without a LoRA.
        network: its part that trains.
        place: a file, or a folder that holds one.

    Raises:
        UserError: there is no file, there are several, or it is a whole model.
        ValueError: it does not fit the pipeline, has layers of another part, or is a DoRA.
    """
    found: dict[str, Layer] = {}
    with _as_float32(network), ExitStack() as stack:
        stack.callback(pipeline.unload_lora_weights)
        put_on(pipeline, place)
        for name, part in pipeline.components.items():
            if part is not network and getattr(part, "_hf_peft_config_loaded", False):
                raise ValueError(f"it has layers of the {name}, which does not train here.")
        for name, module in network.named_modules():
            for adapter, scale in getattr(module, "scaling", {}).items():
                if module.use_dora[adapter]:
                    raise ValueError("it is a DoRA, and only a plain LoRA trains here.")
                down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                found[name] = Layer(down.detach().float(), up.detach().float() * scale)
    return found


@contextmanager
def _as_float32(network: torch.nn.Module) -> Iterator[None]:
    """Let a network look as if it were in float32: peft rounds a LoRA to what it lies on."""
    kept = {parameter: parameter.data for parameter in network.parameters()}
    for parameter in kept:
        like = torch.zeros((), dtype=torch.float32, device=parameter.device)
        parameter.data = like.expand(parameter.shape)  # which takes no memory
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what the loaders warn of: they go on where a tensor does not fit."""
    notes = _Notes()
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(library.level, library.handlers) for library in libraries]
    for library in libraries:
        library.level, library.handlers = logging.WARNING, [notes]
    try:
        yield notes.said
    finally:
        for library, (level, handlers) in zip(libraries, before, strict=True):
            library.level, library.handlers = level, handlers
