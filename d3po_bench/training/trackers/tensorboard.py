"""TensorBoard: metrics and held-out scores as event files in the run folder (extra `track`)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from d3po_bench.training.listeners import Evaluated, Listener

Row = dict[str, Any]


class TensorBoard(Listener):
    """Writes to RUN/tensorboard while the run is in progress."""

    NEEDS = "tensorboard"
    """The package, which the extra `track` installs."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the run."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def round(self, metrics: Row, timing: Row) -> None:
        """Every metric of the round."""
        for name in metrics.keys() - {"round"}:
            self.writer.add_scalar(name, metrics[name], metrics["round"])
        self.writer.flush()

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """Means over the images of each sampler."""
        sums: dict[str, list[float]] = defaultdict(list)
        for row in found.rows:
            for name in row.keys() - {"sampler", "prompt", "index"}:
                if row[name] != "":
                    sums[f"held-out {row['sampler']}/{name}"].append(float(row[name]))
        for name, values in sums.items():
            self.writer.add_scalar(name, sum(values) / len(values), round_)
        self.writer.flush()

    def finished(self) -> None:
        """Close the file."""
        self.writer.close()

    def stopped(self) -> None:
        """Close the file."""
        self.writer.close()


TRACKER = TensorBoard
