"""Checkpoints of a run, and the return to the newest whole one."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from d3po_bench.diffusion import parallel
from d3po_bench.errors import UserError
from d3po_bench.runs.files import Row
from d3po_bench.runs.run import require_inputs
from d3po_bench.runs.store import RunStore
from d3po_bench.training.listeners import Evaluated, Listener
from d3po_bench.training.stopping import asked
from d3po_bench.training.trainer import Trainer


def restore(trainer: Trainer, store: RunStore | None) -> int | None:
    """Go back to the newest whole checkpoint, and drop the rows of later rounds.

    Args:
        trainer: where it goes to.
        store: where it is read from; None on the ranks that the first one tells.

    Returns:
        The checkpoint's round; None without one.

    Raises:
        UserError: the folder has lost its checkpoint, the rows are not the checkpoint's, or the
            model or prompts are not.
    """
    checkpoint = parallel.tell(lambda: _checkpoint(trainer.inputs, store) if store else None)
    if checkpoint is None:
        return None
    trainer.restore(*checkpoint)
    return trainer.round


def _checkpoint(inputs: Row, store: RunStore) -> tuple[dict[str, Tensor], Row] | None:
    checkpoint = store.load_checkpoint()
    store.require_rest(checkpoint=checkpoint is not None)
    if checkpoint is None:
        store.keep_until(-1)
        return None
    facts = checkpoint[1]
    began = facts.get("inputs", {})  # none in those of an earlier version
    require_inputs(f"The run of the checkpoint in {store.folder}", began, inputs,
                   "remove that folder to start again")  # fmt: skip
    store.keep_until(facts["round"])
    store.require_digests(facts["rows"], facts["round"])
    return checkpoint


class Checkpoints(Listener):
    """One every few rounds, and one when the run is stopped in between."""

    def __init__(self, trainer: Trainer, store: RunStore) -> None:
        """`store` writes the state of `trainer`."""
        self.trainer, self.store = trainer, store
        self.pending: tuple[dict[str, Tensor], Row] | None = None
        """The state after the last finished round, where it is not on disk."""

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """The base model need not be evaluated again."""
        if round_ == 0:
            self._take()

    def round(self, metrics: Row, timing: Row) -> None:
        """Write the state, or only keep it while the next checkpoint is not due."""
        self._take()

    def _take(self) -> None:
        every, last = self.trainer.execution.checkpoint_every, self.trainer.config.rounds
        tensors, facts = self.trainer.state()
        facts |= {"rows": self.store.digests(), "inputs": self.trainer.inputs}
        due = self.trainer.round % every == 0 or self.trainer.round == last or bool(asked())
        if not due:  # the next round changes the tensors
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self.pending = tensors, facts
        if due:
            self.store.checkpoint(tensors, facts)
            self.pending = None

    def working(self, round_: int, share: float) -> None:
        """Write what is pending once the run is asked to stop: a kill may follow."""
        if asked():
            self.stopped()

    def stopped(self) -> None:
        """Write what is pending, whatever ended the run."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            with suppress(UserError, MemoryError):  # what ended the run is what is told
                self.store.checkpoint(*pending)
