"""A folder of pictures with their metadata, to score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def gallery(folder: Path, count: int) -> Path:
    """Pictures of several sizes, all of a cat."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file_name,text"]
    for number in range(count):
        side = 8 + number % 5
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
        lines.append(f"{number}.png,a cat")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder
