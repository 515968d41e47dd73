"""Checkpoints of a run, and the return to the newest whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.runs.files import Row
from d3po_bench.runs.store import RunStore
from d3po_bench.training.progress import Progress, Report, label
from d3po_bench.training.trainer import Trainer


def restore(trainer: Trainer, store: RunStore, report: Report) -> int | None:
    """Go back to the newest whole checkpoint, and drop the rows of later rounds.

    Returns:
        The checkpoint's round; None without one.
    """
    checkpoint = store.load_checkpoint()
    store.require_rest(checkpoint=checkpoint is not None)
    if checkpoint is None:
        store.keep_until(-1)
        return None
    tensors, facts = checkpoint
    trainer.restore(tensors, facts)
    store.keep_until(trainer.round)
    store.require_digests(facts["rows"])
    if store.damaged:
        place = trainer.round / trainer.config.rounds
        text = f"the newest checkpoint is damaged: going on from round {trainer.round}"
        report(Progress(label(trainer.config), place, text))
    return trainer.round


class Checkpoints:
    """The checkpoints of a run: one every few rounds, and one when it is stopped in between."""

    def __init__(self, trainer: Trainer, store: RunStore) -> None:
        self.trainer, self.store = trainer, store
        self.pending: tuple[dict[str, Tensor], Row] | None = None
        """The state after the last finished round, where it is not on disk."""

    def take(self) -> None:
        """Write the state after a round, or only keep it while the next checkpoint is not due."""
        every, last = self.trainer.execution.checkpoint_every, self.trainer.config.rounds
        tensors, facts = self.trainer.state()
        facts["rows"] = self.store.digests()
        due = self.trainer.round % every == 0 or self.trainer.round == last
        if not due:  # the next round changes the tensors
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self.pending = tensors, facts
        if due:
            self.store.checkpoint(tensors, facts)
            self.pending = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write what is pending if the run ends on the way, whatever ended it."""
        try:
            yield
        except BaseException:
            if self.pending is not None:
                with suppress(UserError, MemoryError):  # what ended the run is what is told
                    self.store.checkpoint(*self.pending)
            raise
