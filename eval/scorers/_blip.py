"""BLIP (Li et al. 2022, arXiv:2201.12086): official checkpoints in transformers' classes.

Shared by the scorers that are BLIP inside; not a scorer itself. Preprocessing is that of the
official packages, bit for bit, in PIL instead of torchvision. Everything is float32.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d3po_bench.errors import UserError
from eval.scorers._clip import MEAN, STD, shipped

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

WEIGHTS = {
    "bert-base-uncased": {
        "summary": "vocabulary of BERT (scorers blip and image_reward)",
        "licence": "Apache-2.0",
        "address": "https://huggingface.co/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594/",
        "files": {
            "vocab.txt": (
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                231_508,
            ),
        },
    },
}

State = Mapping[str, Tensor]
Resize = Callable[[Image.Image], Image.Image]

TOKENS = 35
"""A prompt's tokens, [CLS] and [SEP] included; both official packages cut there."""

BATCH = 16
"""Images that go through the networks at once: 600 MB of activations for ViT-L at 384 px."""

_HEAD_WIDTH = 64
"""Width of an attention head in all official BLIPs: ViT-B, ViT-L and the text encoder."""

_RENAMED = [
    (r"^blip\.", ""),
    (r"^visual_encoder\.", "vision_model."),
    (r"^vision_model\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^vision_model\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"^vision_model\.blocks\.", "vision_model.encoder.layers."),
    (r"(^vision_model\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"(^vision_model\..*)\.attn\.", r"\1.self_attn."),
    (r"(^vision_model\..*)\.norm([12])\.", r"\1.layer_norm\2."),
]
"""Official name -> transformers' name, applied in this order; other names are the same in both."""

_log = logging.getLogger(__name__)


# ---- checkpoints


class Parts(NamedTuple):
    """What a scorer is built from."""

    config: BlipConfig
    state: State
    """Tensors under transformers' names."""
    checkpoint: Path
    vocabulary: Path
    options: Mapping[str, Any] = {}
    """Further keys of a config.json of our own."""


def official(checkpoint: Path, vocabulary: Path) -> Parts:
    """The parts of a checkpoint as its authors publish it.

    Args:
        checkpoint: a `torch.save` of named tensors, or of these under the key "model".
        vocabulary: vocab.txt of bert-base-uncased.

    Raises:
        UserError: it holds something else, or lacks a tensor.
    """
    state = _read(checkpoint)
    return Parts(_sizes(state, checkpoint), state, checkpoint, vocabulary)


def _read(path: Path) -> State:
    """The tensors of a file under transformers' names, nothing executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("model", content)
        if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise TypeError(f"{strange[0]} is no tensor")
    except Exception as problem:  # truncated, no archive, or code in it: torch raises many kinds
        reason = str(problem).partition("\n")[0]
        raise UserError(
            f"{path} does not hold named tensors ({reason}). Remove it and fetch it again."
        ) from problem
    return {rename(name): tensor for name, tensor in state.items()}


def rename(name: str) -> str:
    """transformers' name of a tensor that LAVIS or ImageReward calls `name`."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _sizes(state: State, path: Path) -> BlipConfig:
    """Sizes of the network that the tensors of an official checkpoint belong to.

    Constants that no shape shows are those of the official code: 64 wide heads, GELU, and
    epsilons of 1e-6 (vision) and 1e-12 (text), where transformers has others by default.
    """
    from transformers import BlipConfig

    try:
        vision, text = _vision_sizes(state), _text_sizes(state)
        shared = state["vision_proj.weight"].shape[0]
    except KeyError as problem:
        raise _incomplete(path, [problem.args[0]]) from problem
    return BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=shared)


def _vision_sizes(state: State) -> dict[str, Any]:
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    positions = state["vision_model.embeddings.position_embedding"].shape[1]
    return {
        "hidden_size": width,
        "num_attention_heads": width // _HEAD_WIDTH,
        "num_hidden_layers": _layers(state, "vision_model.encoder.layers"),
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.bias"].shape[0],
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions - 1),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
    }


def _text_sizes(state: State) -> dict[str, Any]:
    words, width = state["text_encoder.embeddings.word_embeddings.weight"].shape
    hidden = state["text_encoder.encoder.layer.0.intermediate.dense.bias"].shape[0]
    positions = state["text_encoder.embeddings.position_embeddings.weight"].shape[0]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_attention_heads": width // _HEAD_WIDTH,
        "num_hidden_layers": _layers(state, "text_encoder.encoder.layer"),
        "intermediate_size": hidden,
        "max_position_embeddings": positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
        "bos_token_id": words - 2,  # [DEC]; scoring has no use for it
        "is_decoder": True,  # what transformers calls having cross-attention
    }


def _layers(state: State, prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def empty(config: BlipConfig) -> BlipForImageTextRetrieval:
    """The network without its tensors: no memory, no random draws; see `fill`."""
    from transformers import BlipForImageTextRetrieval

    with torch.device("meta"):
        return BlipForImageTextRetrieval(config)


def fill(network: BlipForImageTextRetrieval, state: State, path: Path) -> None:
    """Put `state` into an `empty` network, as float32 and ready to score.

    Tensors that are left over are named in a log line: checkpoints from training carry momentum
    encoders and queues.

    Args:
        network: changed in place.
        state: tensors under transformers' names.
        path: their file, for messages.

    Raises:
        UserError: a tensor is missing, or has another shape.
    """
    wanted = network.state_dict()
    if missing := sorted(wanted.keys() - state.keys()):
        raise _incomplete(path, missing)
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{name} in {path} has the shape {tuple(state[name].shape)} and should have "
                f"{tuple(tensor.shape)}. Fetch the file again, or correct its config.json."
            )
    network.load_state_dict({name: state[name].float() for name in wanted}, assign=True)
    # The one tensor that no checkpoint holds in transformers' layout.
    embeddings = network.text_encoder.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1]).unsqueeze(0)
    network.eval().requires_grad_(False)

    left = state.keys() - wanted.keys() - {"text_encoder.embeddings.position_ids"}
    if left:
        counts = Counter(name.partition(".")[0] for name in sorted(left))
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        _log.warning("%s: ignored what scoring does not need: %s", path, listed)


def _incomplete(path: Path, missing: Sequence[str]) -> UserError:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return UserError(
        f"{path} is no complete BLIP: it lacks {missing[0]}{more}. Fetch the file again, or use "
        "the checkpoint of this scorer."
    )


# ---- folders of our own layout


def save(
    target: Path, network: BlipForImageTextRetrieval, vocabulary: Path, **options: Any
) -> None:
    """Write a folder that a scorer loads: config.json, model.safetensors, vocab.txt.

    Args:
        target: made if absent.
        network: its tensors keep their names.
        vocabulary: a BERT vocabulary, a token a line, without [DEC] and [ENC].
        options: further keys of config.json, read by the scorer.
    """
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    config = network.config.to_dict() | options
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "vocab.txt").write_bytes(vocabulary.read_bytes())


def opened(weights: str, scorer: str) -> Parts:
    """The parts in a folder that `save` wrote.

    Args:
        weights: the folder, or "tiny" or "tiny2" for that of `scorer` which ships for that model.
        scorer: its name, such as blip.

    Raises:
        UserError: it, or one of its files, is absent.
    """
    from safetensors.torch import load_file
    from transformers import BlipConfig

    folder = shipped(scorer, weights)
    config, tensors, vocabulary = paths = [
        folder / name for name in ("config.json", "model.safetensors", "vocab.txt")
    ]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise UserError(
            f"{folder} has no {', '.join(absent)}. Give a folder with config.json, "
            "model.safetensors and vocab.txt, or 'official'."
        )
    options = json.loads(config.read_text(encoding="utf-8"))
    return Parts(BlipConfig.from_dict(options), load_file(tensors), tensors, vocabulary, options)


# ---- prompts


def tokenizer(vocabulary: Path, config: BlipConfig) -> BertTokenizer:
    """BERT's, with BLIP's two tokens [DEC] and [ENC] after the vocabulary's last.

    Args:
        vocabulary: vocab.txt, a token a line.
        config: of the network that it is for.

    Raises:
        UserError: the network has another number of tokens.
    """
    from transformers import BertTokenizer

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    found = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    found.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(found) != config.text_config.vocab_size:
        raise UserError(
            f"{vocabulary} has {len(words)} tokens, but the checkpoint was trained with "
            f"{config.text_config.vocab_size - 2}. Use its own vocabulary."
        )
    return found


class Tokens(NamedTuple):
    """Prompts as [N, L] integers, and which of them are no padding."""

    ids: Tensor
    mask: Tensor

    def starting(self, token: int) -> Tokens:
        """The same with another first token."""
        ids = self.ids.clone()
        ids[:, 0] = token
        return Tokens(ids, self.mask)


def tokenized(words: BertTokenizer, prompts: Sequence[str], device: torch.device) -> Tokens:
    """[CLS], the prompt, [SEP], padded and cut to `TOKENS`.

    LAVIS pads to the longest prompt of a batch instead: padding is masked, so that only the
    rounding could differ, and would then depend on the batch.
    """
    rows = words(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=TOKENS,
        return_tensors="pt",
    ).to(device)
    return Tokens(rows.input_ids, rows.attention_mask)


# ---- images


def batches(
    images: Tensor, prompts: Sequence[str], scorer: str
) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """At most `BATCH` images at a time, with their prompts.

    Raises:
        TypeError: `images` are not [N, 3, h, w] uint8, or the prompts not N.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(
            f"{scorer} scores uint8 images of shape [N, 3, h, w], got {images.dtype} "
            f"{tuple(images.shape)}. Multiply float images by 255 and round."
        )
    if len(images) != len(prompts):
        raise TypeError(
            f"{scorer} scores a prompt with each image, got {len(images)} images and "
            f"{len(prompts)} prompts. Repeat a prompt for each of its images."
        )
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH], prompts[start : start + BATCH]


def pixels(images: Tensor, resize: Resize) -> Tensor:
    """`images` [N, 3, h, w] uint8, resized and normalised: [N, 3, size, size] float32."""
    arrays = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    resized = np.stack([np.asarray(resize(Image.fromarray(a))) for a in arrays])
    x = torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return x.sub(mean).div(std)


# ---- the network


def understood(
    network: BlipForImageTextRetrieval, tokens: Tokens, image: Tensor | None = None
) -> Tensor:
    """Features [N, E] at the first token, of a prompt with its image's tokens or of it alone.

    Calls the text encoder and not the network: transformers' own `forward` makes its mask on the
    CPU. No mask is needed, for every image token counts.
    """
    found = network.text_encoder(
        input_ids=tokens.ids, attention_mask=tokens.mask, encoder_hidden_states=image
    )
    first: Tensor = found.last_hidden_state[:, 0]
    return first
