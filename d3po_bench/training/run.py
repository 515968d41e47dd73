"""One run, from its first round to its last."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import RunError
from d3po_bench.launch.devices import device_of, threads_of
from d3po_bench.machine import determine
from d3po_bench.runs.files import Row, write_folder
from d3po_bench.runs.store import RunStore
from d3po_bench.training.checkpoints import Checkpoints, restore
from d3po_bench.training.evaluation import Evaluation
from d3po_bench.training.inputs import inputs_today, plugins_of, tell_unchecked
from d3po_bench.training.progress import Progress, Report, label
from d3po_bench.training.trainer import Trainer


def run_seed(
    config: RunConfig,
    execution: Execution,
    folder: Path,
    *,
    resume: bool = True,
    report: Report = lambda progress: None,
    make: Callable[[RunConfig, Execution], Trainer] = Trainer,
    facts: Row | None = None,
    prompts: Sequence[str] | None = None,
) -> None:
    """Run one seed into `folder`, going on from its checkpoint if there is one.

    Args:
        config: of the run.
        execution: where and how fast.
        folder: the run's.
        resume: go on, or refuse a folder with a run in it.
        report: called with how far it is.
        make: the trainer.
        facts: to keep in provenance.json.
        prompts: those of `make`'s trainers; None for those that the config names.

    Raises:
        UserError: bad input, found before the first round, or a run in the folder that was begun
            with other inputs or packages.
        RunError: the run failed on the way; what it had written is kept.
    """
    with RunStore.open(folder, config, resume=resume) as store:
        if store.finished:
            store.require_content()
            store.require_inputs(inputs_today(config, store, prompts))
            report(Progress(label(config), 1.0, "finished before"))
            return
        store.require_packages()
        torch.set_num_threads(threads_of(config, execution))
        on = determine(device_of(execution.device), execution.deterministic)
        trainer = make(config, execution)
        after = restore(trainer, store, report)
        evaluation = Evaluation(trainer)
        unchecked = tell_unchecked(trainer, evaluation, report)
        store.start(
            config, {**trainer.inputs, "scorers": evaluation.fingerprints()}, after=after,
            facts={"unchecked_scorers": unchecked, **(facts or {})},
            device=str(trainer.device), threads=torch.get_num_threads(), deterministic=on,
            execution=vars(execution).copy(), **plugins_of(config, evaluation),
        )  # fmt: skip
        _rounds(trainer, store, evaluation, report)
        write_folder(folder / "lora", trainer.model.save)
        store.finish()


def _rounds(trainer: Trainer, store: RunStore, evaluation: Evaluation, report: Report) -> None:
    """Rounds until the last, each written before its checkpoint."""
    config, text = trainer.config, ""
    checkpoints = Checkpoints(trainer, store)
    with checkpoints.kept():
        if trainer.round == 0 and evaluation.due() and not store.evaluation:
            report(Progress(label(config), 0.0, "evaluating the base model"))
            text = f"held-out {evaluation.run(store):.3f} {trainer.scorer.unit}"
            checkpoints.take()
        while trainer.round < config.rounds:
            text = _round(trainer, store, evaluation, report, text)
            checkpoints.take()
    report(Progress(label(config), 1.0, text))


def _round(
    trainer: Trainer, store: RunStore, evaluation: Evaluation, report: Report, before: str
) -> str:
    """One round, evaluated if that is due, and written; returns what to show of it."""
    config, done = trainer.config, trainer.round

    def stage(name: str, share: float) -> None:
        place = (done + share) / config.rounds
        report(Progress(label(config), place, f"round {done + 1}/{config.rounds} {before}"))

    try:
        metrics, timing = trainer.train_round(stage)
    except RunError as problem:
        raise RunError(f"Round {done + 1}, seed {config.seed}: {problem}") from problem
    start = time.monotonic()
    if evaluation.due():
        evaluation.run(store)
    store.log(metrics, timing | {"evaluate": round(time.monotonic() - start, 3)})
    return f"reward {metrics['reward_mean']:+.3f} {trainer.scorer.unit}"
