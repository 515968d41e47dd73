"""How well an image and its prompt match, by BLIP fine-tuned for retrieval on COCO."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from d3po_bench.types import Scorer
from eval import weights as checkpoints
from eval.scorers import _blip

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipForImageTextRetrieval

WORDS = 50
"""Words of a caption that LAVIS keeps."""


class Blip:
    """The three scores of LAVIS' `blip_image_text_matching` (arXiv:2201.12086, section 3.2).

    `blip_itm_logit` is the raw output "matched" of the image-text matching head, not its
    difference to "not matched"; `blip_itm_prob` the softmax of both, 0 to 1; `blip_itc` the
    cosine of the contrastive embeddings, -1 to 1. Called, it gives the logit: that is the
    likeliest reading of the "BLIP" of 1.95 to 2.06 in Table 1 of arXiv:2311.13231, too large for
    the other two.
    """

    unit = "logit"

    def __init__(
        self, network: BlipForImageTextRetrieval, words: BertTokenizer, device: torch.device
    ) -> None:
        """Keep a network that `_blip.fill` filled and its tokenizer."""
        self.sources: tuple[Path, ...] = ()
        """The files that decide the scores."""
        self.network = network.to(device)
        self.words = words
        self.device = device
        self.encode = words.convert_tokens_to_ids("[ENC]")
        size = network.config.vision_config.image_size
        self.resize: _blip.Resize = partial(_blip.square, size=size)

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The three scores, each [N], of `images` [N, 3, h, w] uint8.

        Raises:
            TypeError: the images are not of that kind, or not as many as the prompts.
        """
        _blip.check(images, prompts, "blip")
        parts = [self._batch(i, p) for i, p in _blip.batches(images, prompts)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Match logits [N]."""
        return self.columns(images, prompts)["blip_itm_logit"]

    def _batch(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        captions = [caption(prompt) for prompt in prompts]
        with _blip.exact():
            tokens = _blip.tokenized(self.words, captions, self.device)
            image = _blip.seen(self.network, _blip.pixels(images, self.resize).to(self.device))
            both = _blip.understood(self.network, tokens.starting(self.encode), image)
            logits = self.network.itm_head(both)
            text = self.network.text_proj(_blip.understood(self.network, tokens))
            cosine = normalize(self.network.vision_proj(image[:, 0])) * normalize(text)
        return {
            "blip_itm_logit": logits[:, 1],
            "blip_itm_prob": logits.softmax(1)[:, 1],
            "blip_itc": cosine.sum(1),
        }


def caption(prompt: str) -> str:
    """A prompt as LAVIS' `blip_caption` processor leaves it: lower case, little punctuation."""
    plain = re.sub(r"[.!\"()*#:;~]", " ", prompt.lower())
    plain = re.sub(r"\s{2,}", " ", plain).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:WORDS])


def official(checkpoint: Path, vocabulary: Path, device: torch.device) -> Blip:
    """A checkpoint as Salesforce publishes it.

    Args:
        checkpoint: such as model_base_retrieval_coco.pth, of ViT-B or ViT-L.
        vocabulary: vocab.txt of bert-base-uncased.
        device: where to score.

    Raises:
        UserError: the file lacks a tensor, or cannot be read.
    """
    state = _blip.read(checkpoint)
    network = _blip.empty(_blip.sizes(state, checkpoint))
    _blip.fill(network, state, checkpoint)
    scorer = Blip(network, _blip.tokenizer(vocabulary, network.config), device)
    scorer.sources = (checkpoint, vocabulary)
    return scorer


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The scorer on `device`.

    Args:
        device: where to score.
        weights: "official", "tiny", or a folder that `_blip.save` wrote.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        blip, words = checkpoints.find_all("blip", "bert-base-uncased")
        checkpoint = blip / "model_base_retrieval_coco.pth"
        return official(checkpoint, words / "vocab.txt", device)
    found = _blip.opened(_blip.folder(weights, "blip"))
    network = _blip.empty(found.config)
    _blip.fill(network, found.state, found.tensors)
    scorer = Blip(network, _blip.tokenizer(found.vocabulary, found.config), device)
    scorer.sources = (found.tensors, found.vocabulary)
    return scorer
