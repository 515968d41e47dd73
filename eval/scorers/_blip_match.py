"""How well a picture and its prompt match, by any of BLIP's checkpoints with a matching head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from eval.scorers import _blip
from eval.scorers._clip import exact

WORDS = 50
"""Words of a caption that LAVIS keeps."""


class Blip:
    """The three scores of LAVIS' `blip_image_text_matching` (arXiv:2201.12086, section 3.2).

    Under names that begin with the scorer's, `_itm_logit` is the raw output "matched" of the
    image-text matching head, not its difference to "not matched"; `_itm_prob` the softmax of both,
    0 to 1; `_itc` the cosine of the contrastive embeddings, -1 to 1. Called, it gives the logit:
    that is the likeliest reading of the "BLIP" of 1.95 to 2.06 in Table 1 of arXiv:2311.13231, too
    large for the other two.
    """

    unit = "logit"

    def __init__(self, parts: _blip.Parts, device: torch.device, name: str = "blip") -> None:
        """Build the network.

        Args:
            parts: of a checkpoint.
            device: where to score.
            name: of the scorer, before the names of its columns.

        Raises:
            UserError: the parts do not fit together.
        """
        self.name = name
        self.sources = (parts.checkpoint, parts.vocabulary)
        network = _blip.empty(parts.config)
        _blip.fill(network, parts.state, parts.checkpoint)
        self.network = network.to(device)
        self.words = _blip.tokenizer(parts.vocabulary, parts.config)
        self.device = device
        self.encode = self.words.convert_tokens_to_ids("[ENC]")
        size = parts.config.vision_config.image_size
        self.resize: _blip.Resize = partial(square, size=size)

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The three scores, each [N], of `images` [N, 3, h, w] uint8.

        Raises:
            TypeError: the images are not of that kind, or not as many as the prompts.
        """
        parts = [self._batch(i, p) for i, p in _blip.batches(images, prompts, self.name)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Match logits [N]."""
        return self.columns(images, prompts)[f"{self.name}_itm_logit"]

    def _batch(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        captions = [caption(prompt) for prompt in prompts]
        with exact():
            tokens = _blip.tokenized(self.words, captions, self.device)
            pixels = _blip.pixels(images, self.resize).to(self.device)
            image = self.network.vision_model(pixel_values=pixels).last_hidden_state
            both = _blip.understood(self.network, tokens.starting(self.encode), image)
            logits = self.network.itm_head(both)
            text = self.network.text_proj(_blip.understood(self.network, tokens))
            cosine = normalize(self.network.vision_proj(image[:, 0])) * normalize(text)
        return {
            f"{self.name}_itm_logit": logits[:, 1],
            f"{self.name}_itm_prob": logits.softmax(1)[:, 1],
            f"{self.name}_itc": cosine.sum(1),
        }


def caption(prompt: str) -> str:
    """A prompt as LAVIS' `blip_caption` processor leaves it: lower case, little punctuation."""
    plain = re.sub(r"[.!\"()*#:;~]", " ", prompt.lower())
    plain = re.sub(r"\s{2,}", " ", plain).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:WORDS])


def square(image: Image.Image, size: int) -> Image.Image:
    """`size` x `size` pixels whatever the shape was, bicubic, as LAVIS does."""
    return image.resize((size, size), Image.Resampling.BICUBIC)
