"""Sheets of samples with their captions, to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from d3po_bench.models.embedded.v2.captions import ANIMALS

CAPTIONS = (
    "one cat", "two dogs", "three foxes", "four frogs", "two wolves", "four pigs",
    "a fox and a frog", "a bee and a whale", "a cat left of a dog", "a lion right of a snake",
    "a duck above a bear", "a pig below a turtle", "a fox on a red card", "a frog on a white card",
    "a fox on a red card and a frog on a blue card",
    "a pig on a green card and a bee on a black card",
    "a cat on a red striped background", "a whale on a pink background",
)  # fmt: skip
"""Two of each kind or more."""

_LINE = 14


def save_sheet(
    pictures: Sequence[NDArray[np.uint8]], labels: Sequence[str], path: Path, columns: int = 9
) -> None:
    """Write pictures [s, s, 3], twice enlarged without blur, each over its label."""
    side = 2 * pictures[0].shape[0]
    lines = [textwrap.wrap(label, side // 6) for label in labels]
    height = side + _LINE * max(map(len, lines))
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * side, rows * height), "white")
    for i, (pixels, label) in enumerate(zip(pictures, lines, strict=True)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        x, y = i % columns * side, i // columns * height
        whole.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(label):
            ImageDraw.Draw(whole).text((x + 2, y + side + n * _LINE), line, fill=0)
    path.parent.mkdir(exist_ok=True)
    whole.save(path)


def draw_sheet(pipe: Any, path: Path, steps: int = 20) -> None:
    """Draw each animal and CAPTIONS with a diffusers pipeline, guidance 5, and write the sheet."""
    captions = [*ANIMALS, *CAPTIONS]
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    for start in range(0, len(captions), 21):
        rng = torch.Generator(pipe.device.type).manual_seed(start)
        drawn = pipe(
            captions[start : start + 21], num_inference_steps=steps, guidance_scale=5.0,
            generator=rng, output_type="np",
        ).images  # fmt: skip
        pictures.extend((drawn * 255).round().astype(np.uint8))
    save_sheet(pictures, captions, path)
