"""ImageReward: how much people would like an image for its prompt (arXiv:2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor, nn

from d3po_bench.types import Scorer
from eval import downloads
from eval.scorers import _blip
from eval.scorers._clip import exact

WEIGHTS = {
    "image_reward": {
        "summary": "ImageReward-v1.0 (scorer image_reward)",
        "licence": "Apache-2.0",
        "address": "https://huggingface.co/THUDM/ImageReward/resolve/7a9e21fc5c7873859f160173d502cc82f6709e33/",
        "files": {
            "ImageReward.pt": (
                "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
                1_786_880_927,
            ),
        },
    },
}

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


class ImageReward:
    """The reward of THUDM/ImageReward, about -2 to 2, in standard deviations of its own."""

    unit = "standard deviations"

    def __init__(self, parts: _blip.Parts, device: torch.device) -> None:
        """Build BLIP with a reward head in place of its own.

        Raises:
            UserError: the parts do not fit together.
        """
        self.sources = (parts.checkpoint, parts.vocabulary)
        network = _blip.empty(parts.config)
        for name in ("vision_proj", "text_proj", "itm_head"):
            delattr(network, name)
        widths = parts.options.get("head_widths", HEAD)
        with torch.device("meta"):
            network.mlp = Head([parts.config.text_config.hidden_size, *widths])
        _blip.fill(network, parts.state, parts.checkpoint)
        self.network = network.to(device)
        self.words = _blip.tokenizer(parts.vocabulary, parts.config)
        self.device = device
        self.mean: float = parts.options.get("reward_mean", MEAN)
        self.std: float = parts.options.get("reward_std", STD)
        size = parts.config.vision_config.image_size
        self.resize: _blip.Resize = partial(cropped, size=size)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [N] of `images` [N, 3, h, w] uint8.

        Raises:
            TypeError: the images are not of that kind, or not as many as the prompts.
        """
        parts = _blip.batches(images, prompts, "image_reward")
        return torch.cat([self._batch(i, p) for i, p in parts]).cpu()

    def _batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with exact():
            tokens = _blip.tokenized(self.words, prompts, self.device)
            pixels = _blip.pixels(images, self.resize).to(self.device)
            image = self.network.vision_model(pixel_values=pixels).last_hidden_state
            # The first token stays [CLS]: ImageReward was trained so, other than BLIP's ITM.
            reward: Tensor = self.network.mlp(_blip.understood(self.network, tokens, image))
        return (reward[:, 0] - self.mean) / self.std


def cropped(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size`, bicubic, then the centre square, as ImageReward does."""
    width, height = image.size
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


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
        files = downloads.find("image_reward", "bert-base-uncased")
        return ImageReward(_blip.official(*files), device)
    return ImageReward(_blip.opened(weights, "image_reward"), device)
