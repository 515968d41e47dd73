"""A LoRA under the names that other programs look up, and the facts that they show of it.

Web UIs and ComfyUI know a layer of a UNet as `lora_unet_` and its path, with `_` for each dot.
kohya's tools hold SDXL in the blocks of its first release instead (`input_blocks`), so that their
names differ there. No names but diffusers' own are defined for SD3, which ComfyUI reads, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import UserError
from d3po_bench.models.sources import Source, model_index

Form = Literal["diffusers", "kohya", "comfyui"]

FLOW = "StableDiffusion3Pipeline"
XL = "StableDiffusionXLPipeline"
UNETS = ("StableDiffusionPipeline", XL)
"""Pipelines whose layers have names in every program."""


def renamed(layers: Mapping[str, Tensor], form: Form, source: Source) -> dict[str, Tensor]:
    """The tensors of a LoRA by the names of `form`.

    Args:
        layers: as `load_lora_weights` has them, the scale in the weights.
        form: whose names.
        source: its base model.

    Raises:
        UserError: there are no such names for a layer, or for this kind of model.
    """
    kind = _kind(source)
    if form == "diffusers" or (form == "comfyui" and kind == FLOW):
        return dict(layers)
    if kind not in UNETS:
        others = "comfyui or diffusers" if kind == FLOW else "diffusers"
        raise UserError(f"{form} has no names for the layers of a {kind}. Use --format {others}.")
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    found: dict[str, Tensor] = convert_state_dict_to_kohya(dict(layers))
    if form == "kohya" and kind == XL:
        deep = int(_network(source)["layers_per_block"]) + 1
        return {_in_first_blocks(name, deep): tensor for name, tensor in found.items()}
    return found


def _in_first_blocks(name: str, deep: int) -> str:
    """A layer of SDXL's attention by its place in the first release; what diffusers' loader undoes.

    Args:
        name: begins with lora_unet_ and a block of diffusers.
        deep: layers of a block there, the one that changes the size included.

    Raises:
        UserError: it is no layer of an attention.
    """
    found = re.fullmatch(r"lora_unet_(down|mid|up)_blocks?_(?:(\d+)_)?attentions_(\d+)_(.*)", name)
    if found is None:
        raise UserError(
            f"kohya's tools train no layer {name.partition('.')[0]} of SDXL. Use --format comfyui "
            "or diffusers."
        )
    part, block, layer, rest = found.groups()
    number = int(block or 0) * deep + int(layer) + 1
    place = {
        "down": f"input_blocks_{number}_1", "mid": "middle_block_1",
        "up": f"output_blocks_{number - 1}_1",
    }[part]  # fmt: skip
    return f"lora_unet_{place}_{rest}"


def facts_of(layers: Mapping[str, Tensor], source: Source) -> dict[str, str]:
    """What kohya's tools and web UIs show of a LoRA: its base, its rank and its alpha.

    Args:
        layers: as for `renamed`; alpha is the rank, as the scale is in the weights.
        source: its base model.
    """
    ranks = {len(tensor) for name, tensor in layers.items() if "lora_A" in name}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    shown = {"ss_network_module": "networks.lora", "ss_network_dim": rank,
             "ss_network_alpha": rank}  # fmt: skip
    kind = _kind(source)
    if kind == FLOW:
        return {**shown, "modelspec.architecture": "stable-diffusion-3/lora"}
    if kind == XL:
        return {**shown, "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False",
                "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}  # fmt: skip
    if kind not in UNETS:
        return shown
    two = _network(source)["cross_attention_dim"] == WIDE
    velocity = _config(source, "scheduler").get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v1"
    if two:
        architecture = f"stable-diffusion-v2-{'768-v' if velocity else '512'}"
    return {
        **shown, "ss_v2": str(two), "modelspec.architecture": f"{architecture}/lora",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "ss_base_model_version": f"sd_v{1 + two}{'_v' if velocity else ''}",
    }  # fmt: skip


WIDE = 1024
"""Width of the text of Stable Diffusion 2; that of 1 is 768."""


def file_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content.

    safetensors writes the facts in an order that differs from call to call.
    """
    from safetensors.torch import save

    data = save({name: t.contiguous() for name, t in tensors.items()}, metadata=dict(facts))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(facts.items()))
    # Aligned to eight bytes with spaces, as the format asks for.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _kind(source: Source) -> str:
    """The pipeline class of a base model.

    Raises:
        UserError: it is a Python file, whose layers nobody else knows.
    """
    if source.is_code:
        raise UserError(
            f"{source.path} is a model family of your own, so no other program can load its "
            "weights. They are in the run's folder lora/."
        )
    kind = str(model_index(source).get("_class_name", ""))
    family: Any = registry.family(kind, source.path)
    return str(family.PIPELINES[0])


def _network(source: Source) -> dict[str, Any]:
    return _config(source, "unet")


def _config(source: Source, part: str) -> dict[str, Any]:
    """The config.json of a part, or a scheduler's."""
    import diffusers

    kind = diffusers.DDIMScheduler if part == "scheduler" else diffusers.UNet2DConditionModel
    found = kind.load_config(source.path, subfolder=part, revision=source.revision)
    return dict(found)
