"""TensorBoard: event files in RUN/tensorboard, shown by `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from d3po_bench.training.tracking import Scalars, Tracked, Tracker

FIRST = ("held-out eta1/score", "held-out eta1/gain", "reward_mean")
"""What the table of hyperparameters shows beside them."""


class TensorBoard(Tracker):
    """Writes while the run is in progress."""

    NEEDS = "tensorboard"

    def __init__(self, run: Tracked) -> None:
        """Begin a file, which hides what earlier ones have of the rounds that come again."""
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run)
        begin = 0 if run.after is None else run.after + 1
        self.writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=begin)
        if run.after is None:
            self._introduce(run)

    def _introduce(self, run: Tracked) -> None:
        from torch.utils.tensorboard.summary import hparams

        kinds = (bool, int, float, str)
        given = {k: v if isinstance(v, kinds) else str(v) for k, v in run.settings.items()}
        for summary in hparams(given, dict.fromkeys(FIRST, 0.0)):
            self.writer.file_writer.add_summary(summary)
        self.writer.add_text("command", f"    {run.command}")
        self.writer.flush()

    def log(self, round_: int, scalars: Scalars, pictures: Mapping[str, Tensor]) -> None:
        """Write them at once."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, round_)
        for prompt, picture in pictures.items():
            self.writer.add_image(f"samples/{prompt}", picture, round_)
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self.writer.close()


TRACKER = TensorBoard
