"""HPS v2.1: how much people would prefer a picture for its prompt (arXiv:2306.09341)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from d3po_bench.errors import UserError
from d3po_bench.models.parts import refused
from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _clip

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

WEIGHTS = {
    "hps_v2_1": {
        "summary": "HPS v2.1 on CLIP ViT-H/14 (scorer hps_v2_1)",
        "licence": "Apache-2.0",
        "address": "https://huggingface.co/xswu/HPSv2/resolve/697403c78157020a1ae59d23f111aa58ced35b0a/",
        "files": {
            "HPS_v2.1_compressed.pt": (
                "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
                1_970_000_000,
            ),
        },
    },
}

HEADS = {"visual.": 80, "": 64}
"""Width of an attention head in ViT-H/14's image and text towers."""

RENAMED = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""open_clip's name -> transformers' name, applied in this order."""

TURNED = ("visual.proj", "text_projection")
"""Matrices that open_clip multiplies from the other side."""


class HpsV21:
    """Cosine of picture and prompt, about 0.2 to 0.35, without a scale.

    CLIP ViT-H/14 of LAION, trained on the choices of HPD v2. As `hpsv2.score(hps_version="v2.1")`
    has it with a torchvision of 0.17 or later, in float32: the longest side goes to 224 pixels,
    bicubic with antialiasing on numbers that are not rounded, and black bars fill the square.
    Older torchvisions resize without antialiasing, and a GPU's autocast to half precision moves
    the fourth digit. Papers often print 100 times this. v2.0 is another checkpoint, whose scores
    are not comparable.
    """

    unit = "cosine"

    def __init__(self, clip: _clip.Clip, sources: tuple[Path, ...]) -> None:
        """Score with `clip`, which came from the files `sources`."""
        self.clip, self.sources = clip, sources

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8."""
        return self.clip.cosines(images, prompts)


def letterboxed(images: Tensor, size: int) -> Tensor:
    """Pictures with their longest side scaled to `size`, black bars around them, standardised.

    Args:
        images: [N, 3, h, w] uint8.
        size: pixels a side.

    Returns:
        [N, 3, size, size] float32.
    """
    scale = size / max(images.shape[2:])
    height, width = (round(side * scale) for side in images.shape[2:])
    pixels = images.cpu().float() / 255
    if scale != 1:
        pixels = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    above, left = (size - height) // 2, (size - width) // 2
    square = pad(pixels, (left, size - width - left, above, size - height - above))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_clip.MEAN, _clip.STD))
    return (square - mean) / std


def official(path: Path) -> CLIPModel:
    """The model of a checkpoint as its authors publish it, for transformers.

    Args:
        path: a `torch.save` of open_clip's tensors under the key "state_dict".

    Raises:
        UserError: it holds something else, or lacks a tensor.
    """
    from transformers import CLIPModel

    remedy = "Fetch it again: `d3po-bench weights fetch hps_v2_1`."
    with refused(f"{path} is no checkpoint of HPS v2.1:", remedy):
        theirs = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        with torch.device("meta"):
            model = CLIPModel(_sizes(theirs))
        wanted, found = model.state_dict(), _renamed(theirs)
        if missing := sorted(wanted.keys() - found.keys()):
            raise UserError(f"{path} lacks {missing[0]}. {remedy}")
        model.load_state_dict({name: found[name] for name in wanted}, assign=True)
        for tower in (model.text_model, model.vision_model):  # made on no device, and in no file
            places = tower.embeddings
            places.position_ids = torch.arange(places.position_ids.shape[-1]).unsqueeze(0)
    return model


def _sizes(state: Mapping[str, Tensor]) -> CLIPConfig:
    """Sizes of the network that open_clip's tensors belong to."""
    from transformers import CLIPConfig

    towers = []
    for prefix, head in HEADS.items():
        blocks = rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.ln_1\.weight"
        width = state[f"{prefix}positional_embedding"].shape[1]
        towers.append({
            "hidden_size": width,
            "num_attention_heads": width // head,
            "num_hidden_layers": sum(bool(re.fullmatch(blocks, name)) for name in state),
            "intermediate_size": state[f"{prefix}transformer.resblocks.0.mlp.c_fc.bias"].shape[0],
            "hidden_act": "gelu",
        })  # fmt: skip
    words, places = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
    patch, patches = state["visual.conv1.weight"].shape[-1], state["visual.positional_embedding"]
    return CLIPConfig(
        vision_config=towers[0] | {
            "patch_size": patch, "image_size": patch * round((len(patches) - 1) ** 0.5),
        },
        # The last word is the end of text, where CLIP reads a prompt.
        text_config=towers[1] | {
            "vocab_size": words, "max_position_embeddings": places, "bos_token_id": words - 2,
            "eos_token_id": words - 1, "pad_token_id": words - 1,
        },
        projection_dim=state["text_projection"].shape[1],
    )  # fmt: skip


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names, in float32."""
    found: dict[str, Tensor] = {}
    for theirs, value in state.items():
        name, tensor = theirs, value.float()
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".attn.in_proj_" in name:  # one matrix for queries, keys and values
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third
        else:
            found[name] = tensor.T.contiguous() if theirs in TURNED else tensor
    return found


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The score on `device`.

    Args:
        device: where to score.
        weights: "official", or a folder of transformers' layout with a tokenizer.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        checkpoint, *words = downloads.find("hps_v2_1", "clip-words")
        clip = _clip.Clip(official(checkpoint), words[0].parent, device, letterboxed)
        return HpsV21(clip, (checkpoint,))
    folder = _clip.folder("hps_v2_1", weights)
    clip = _clip.opened(folder, device, "gelu")
    clip.prepare = letterboxed
    return HpsV21(clip, (folder / "model.safetensors",))
