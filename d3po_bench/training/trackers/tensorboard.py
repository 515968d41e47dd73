"""Metrics as TensorBoard event files."""

from __future__ import annotations

from pathlib import Path

from d3po_bench.runs.store import RunStore


def track(folders: list[Path]) -> None:
    """Write the metrics of runs as TensorBoard event files in each run folder."""
    from torch.utils.tensorboard import SummaryWriter

    for folder in folders:
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for line in RunStore(folder).metrics:
                for name in line.keys() - {"round"}:
                    writer.add_scalar(name, line[name], line["round"])
