"""ImageReward: how much people would like an image for its prompt (arXiv:2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d3po_bench.types import Scorer
from eval import weights as checkpoints
from eval.scorers import _blip

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards over ImageReward's validation set, from THUDM/ImageReward ImageReward.py."""

HEAD = (1024, 128, 64, 16)
"""Widths between the text feature and the reward."""


class Head(nn.Module):
    """Linear layers without activations: [N, E] -> [N, 1].

    Its dropouts, which do nothing in use, keep the official numbers of the layers.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        """Widths from the text feature to the last before the reward."""
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in pairwise([*widths, 1])]
        layers: list[nn.Module] = []
        for layer in linear[:-2]:
            layers += [layer, nn.Dropout(0.2)]
        self.layers = nn.Sequential(*layers, *linear[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """Raw rewards [N, 1]."""
        out: Tensor = self.layers(x)
        return out


def empty(config: BlipConfig, widths: Sequence[int] = HEAD) -> BlipForImageTextRetrieval:
    """BLIP with a reward head in place of its own; tensors to come, see `_blip.fill`."""
    network = _blip.empty(config)
    for name in ("vision_proj", "text_proj", "itm_head"):
        delattr(network, name)
    with torch.device("meta"):
        network.mlp = Head([config.text_config.hidden_size, *widths])
    return network


class ImageReward:
    """The reward of THUDM/ImageReward, about -2 to 2, in standard deviations of its own."""

    unit = "standard deviations"

    def __init__(
        self,
        network: BlipForImageTextRetrieval,
        words: BertTokenizer,
        device: torch.device,
        scale: tuple[float, float] = (MEAN, STD),
    ) -> None:
        """Keep a network that `_blip.fill` filled, its tokenizer, and its rewards' mean and std."""
        self.sources: tuple[Path, ...] = ()
        """The files that decide the scores."""
        self.network = network.to(device)
        self.words = words
        self.device = device
        self.mean, self.std = scale
        size = network.config.vision_config.image_size
        self.resize: _blip.Resize = partial(_blip.cropped, size=size)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [N] of `images` [N, 3, h, w] uint8.

        Raises:
            TypeError: the images are not of that kind, or not as many as the prompts.
        """
        _blip.check(images, prompts, "image_reward")
        return torch.cat([self._batch(i, p) for i, p in _blip.batches(images, prompts)]).cpu()

    def _batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with _blip.exact():
            tokens = _blip.tokenized(self.words, prompts, self.device)
            image = _blip.seen(self.network, _blip.pixels(images, self.resize).to(self.device))
            # The first token stays [CLS]: ImageReward was trained so, other than BLIP's ITM.
            reward: Tensor = self.network.mlp(_blip.understood(self.network, tokens, image))
        return (reward[:, 0] - self.mean) / self.std


def official(checkpoint: Path, vocabulary: Path, device: torch.device) -> ImageReward:
    """A checkpoint as the authors publish it.

    Args:
        checkpoint: ImageReward.pt.
        vocabulary: vocab.txt of bert-base-uncased.
        device: where to score.

    Raises:
        UserError: the file lacks a tensor, or cannot be read.
    """
    state = _blip.read(checkpoint)
    network = empty(_blip.sizes(state, checkpoint))
    _blip.fill(network, state, checkpoint)
    scorer = ImageReward(network, _blip.tokenizer(vocabulary, network.config), device)
    scorer.sources = (checkpoint, vocabulary)
    return scorer


def load(device: torch.device, weights: str = "official") -> Scorer:
    """The scorer on `device`.

    Args:
        device: where to score.
        weights: "official", "tiny", or a folder that `_blip.save` wrote, whose config.json also
            has `head_widths`, `reward_mean` and `reward_std`.

    Raises:
        UserError: the weights are absent or broken.
    """
    if weights == "official":
        reward, words = checkpoints.find_all("image_reward", "bert-base-uncased")
        return official(reward / "ImageReward.pt", words / "vocab.txt", device)
    found = _blip.opened(_blip.folder(weights, "image_reward"))
    network = empty(found.config, found.options.get("head_widths", HEAD))
    _blip.fill(network, found.state, found.tensors)
    scale = (found.options.get("reward_mean", MEAN), found.options.get("reward_std", STD))
    words = _blip.tokenizer(found.vocabulary, found.config)
    scorer = ImageReward(network, words, device, scale)
    scorer.sources = (found.tensors, found.vocabulary)
    return scorer
