"""The weights that training begins with: those of the base model, or a LoRA that is there."""

from __future__ import annotations

from pathlib import Path

import torch

from d3po_bench.digests import sha256_of
from d3po_bench.errors import UserError
from d3po_bench.models.adapters import DiffusersModel
from d3po_bench.models.lora import Layer, file_of, layers_of
from d3po_bench.models.parts import refused
from d3po_bench.types import Model


def digest(lora: str) -> dict[str, str]:
    """What names the content of the LoRA that a run begins with; nothing where it has none.

    Raises:
        UserError: there is no file, or there are several.
    """
    return {"lora": sha256_of(file_of(Path(lora)))[:12]} if lora else {}


def begin(model: Model, seed: int, lora: str = "") -> None:
    """Install what trains, as `add_adapter` does, and let it begin where a LoRA ended.

    The base model stays what drift is measured from.

    Args:
        model: without an adapter.
        seed: of the parts of the adapter that the LoRA does not fill.
        lora: its file or folder; empty for none.

    Raises:
        UserError: the LoRA does not fit the model, its rank or its layers.
    """
    if not lora:
        model.add_adapter(seed)
        return
    if not isinstance(model, DiffusersModel):
        raise UserError("A model family of your own cannot begin with a LoRA. Leave out --lora.")
    remedy = f"Give --lora one of the {model.NETWORK} of --model."
    with refused(f"The LoRA in {lora} cannot be trained on:", remedy):
        layers = layers_of(model.pipeline, model.network, Path(lora))
    model.add_adapter(seed)
    _fill(model, layers, lora)


def _fill(model: DiffusersModel, layers: dict[str, Layer], lora: str) -> None:
    """Put the layers of a LoRA into those that train; what is wider there adds nothing yet.

    Raises:
        UserError: a layer does not train, or with a lower rank.
    """
    training, trainable = model.training, model.trainable()
    scale = (training.lora_alpha or training.lora_rank) / training.lora_rank
    places = {name: f"{name}.lora_{{}}.default.weight" for name in layers}
    rank = max(len(layer.down) for layer in layers.values())
    absent = [name for name, place in places.items() if place.format("A") not in trainable]
    if absent or rank > training.lora_rank:
        targets = sorted({_ending(name) for name in layers} | {*training.lora_targets})
        rank = max(rank, training.lora_rank)
        raise UserError(
            f"The LoRA in {lora} does not fit what trains here. Add --set lora_rank={rank} --set "
            f"lora_targets={','.join(targets)}."
        )
    with torch.no_grad():
        for name, layer in layers.items():
            down, up = (trainable[places[name].format(side)] for side in "AB")
            down[: len(layer.down)] = layer.down
            up[:, : len(layer.down)] = layer.up / scale


def _ending(name: str) -> str:
    """A layer as `lora_targets` names it: from its last part that is no number on."""
    parts = name.split(".")
    count = next(n for n, part in enumerate(reversed(parts), 1) if not part.isdecimal())
    return ".".join(parts[-count:])
