"""A sheet of samples with their captions, to look at while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def draw_sheet(pipe: Any, path: Path, steps: int = 20) -> None:
    """Draw each animal and CAPTIONS with guidance 5, and write the sheet, twice enlarged."""
    captions = [*ANIMALS, *CAPTIONS]
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    for start in range(0, len(captions), 21):
        rng = torch.Generator(pipe.device.type).manual_seed(start)
        pictures.extend(pipe(
            captions[start : start + 21], num_inference_steps=steps, guidance_scale=5.0,
            generator=rng, output_type="np",
        ).images)  # fmt: skip
    side = 2 * pictures[0].shape[0]
    sheet = Image.new("RGB", (9 * side, 7 * (side + 14)), "white")
    for i, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        place = (i % 9 * side, i // 9 * (side + 14))
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
        ImageDraw.Draw(sheet).text((place[0] + 2, place[1] + side), caption[:22], fill=0)
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
