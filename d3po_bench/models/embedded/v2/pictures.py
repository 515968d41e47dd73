"""The rendered pictures on disk: shards that are drawn in parallel and read by memory map."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3po_bench.models.embedded.v2 import render

CPU = torch.device("cpu")
SHARD = 2000
"""Pictures in a file."""


def _render_shard(number: int, *, seed: int, folder: Path) -> None:
    """Write images-N.npy [SHARD, 64, 64, 4] and scenes-N.jsonl, unless they are there."""
    images, scenes = (folder / f"{kind}-{number:04}" for kind in ("images", "scenes"))
    if images.with_suffix(".npy").exists():
        return
    first = number * SHARD
    drawn = [render.sample(seed, index) for index in range(first, first + SHARD)]
    lines = "\n".join(json.dumps(asdict(scene)) for _, scene in drawn)
    scenes.with_suffix(".jsonl").write_text(lines + "\n", encoding="utf-8")
    with images.with_suffix(".part").open("wb") as file:
        np.save(file, np.stack([pixels for pixels, _ in drawn]))
    images.with_suffix(".part").replace(images.with_suffix(".npy"))


def render_pictures(folder: Path, seed: int, count: int, processes: int) -> None:
    """Draw pictures 0 to `count` of data set `seed`, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(_render_shard, seed=seed, folder=folder), range(count // SHARD)))


class Pictures:
    """All pictures in a folder."""

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        """Map the shards that are there, or copy them to a device that is not the CPU."""
        self.paths = sorted(folder.glob("images-*.npy"))
        self.shards = [np.load(path, mmap_mode="r") for path in self.paths]
        self.copy = (
            None if device.type == "cpu"
            else torch.cat([torch.from_numpy(np.array(s)).to(device) for s in self.shards])
        )  # fmt: skip

    def __len__(self) -> int:
        """How many."""
        return SHARD * len(self.shards)

    def scenes(self) -> list[dict[str, Any]]:
        """What each shows, as `scenes.Scene` has it."""
        files = (p.with_name(p.name.replace("images", "scenes")) for p in self.paths)
        texts = (f.with_suffix(".jsonl").read_text(encoding="utf-8") for f in files)
        return [json.loads(line) for text in texts for line in text.splitlines()]

    def batch(self, index: Tensor) -> Tensor:
        """Pictures [N, 4, 64, 64] uint8: colours, and where animals are."""
        if self.copy is not None:
            return self.copy[index].permute(0, 3, 1, 2)
        rows = [self.shards[i // SHARD][i % SHARD] for i in index.tolist()]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
