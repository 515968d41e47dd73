"""One run, from its first round to its last."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from d3po_bench import own, registry
from d3po_bench.config import Execution, RunConfig, method_of
from d3po_bench.diffusion import parallel
from d3po_bench.experience import Experience
from d3po_bench.experience.on_policy import OnPolicy
from d3po_bench.machine import determine, device_of
from d3po_bench.models.sources import model_source, threads_of
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import Row
from d3po_bench.runs.provenance import environment
from d3po_bench.runs.run import LAST, RunFolder
from d3po_bench.runs.sessions import sessions
from d3po_bench.runs.store import RunStore
from d3po_bench.scoring import Sum
from d3po_bench.training.checkpoints import Checkpoints, restore
from d3po_bench.training.evaluation import BaseEvaluation, Evaluation
from d3po_bench.training.inputs import inputs_today
from d3po_bench.training.listeners import (
    Listener,
    OfFirstRank,
    ProgressListener,
    Recorder,
    by_round,
)
from d3po_bench.training.progress import Report, ended_before, label
from d3po_bench.training.sizes import recorded, settled
from d3po_bench.training.stopping import Stopping
from d3po_bench.training.tools import Tools
from d3po_bench.training.tracking import Tracked, Tracker
from d3po_bench.training.trainer import Trainer

WITHOUT_LOCKS = (
    "The file system of the run folders has no locks: let no other machine run in the same folders."
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to make: everything that a process needs to make it."""

    config: RunConfig
    execution: Execution
    folder: Path
    tools: Tools
    resume: bool = True
    """Continue what is in the folder, or refuse it."""
    trackers: tuple[str, ...] = ()
    command: str = ""
    """What makes the run, for people; "" for the `d3po-bench run` of its config."""
    experience: Experience | None = None
    """None for images that the policy draws."""
    facts: dict[str, Any] = field(default_factory=dict)
    """To keep in provenance.json."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """What the config names that a Python caller gave as an object."""
    name: str = ""
    """What it is called among others that are made with it; "" for its label."""

    @property
    def called(self) -> str:
        """Its name where several are shown."""
        return self.name or label(self.config)


def run_seed(job: Job, report: Report = lambda progress: None) -> None:
    """Make a run, from its checkpoint if there is one.

    Args:
        job: which run.
        report: called with how far it is.

    Raises:
        UserError: bad input, found before the first round, or a run in the folder that was begun
            with other inputs or packages.
        RunError: the run failed on the way; what it had written is kept.
    """
    config, execution = job.config, job.execution
    own.adopt(job.objects)
    if parallel.rank():
        job = replace(job, tools=replace(job.tools, scorer=lambda *_: Elsewhere()))
    with contextlib.ExitStack() as held, parallel.at("loading"):
        opened = RunStore.open(job.folder, config, resume=job.resume)
        store = parallel.lead(lambda: held.enter_context(opened))
        if parallel.tell(lambda: store is not None and _made_before(job)):
            report(ended_before(config))
            return
        progress = ProgressListener(config, report)
        if store and store.hold and not store.hold.everywhere:
            progress.note(WITHOUT_LOCKS)
        parallel.lead(lambda: store.require_packages() if store else None)
        torch.set_num_threads(threads_of(model_source(config.model), execution.threads))
        device = device_of(execution.device)
        deterministic = determine(device, execution.deterministic)
        trainer = parallel.together(lambda: _trainer(job, device))
        after = restore(trainer, store)
        before = None if after is None else store
        job = parallel.together(lambda: _settled(job, trainer, before, progress))
        evaluation = parallel.together(lambda: _evaluation(job, trainer, device))

        def begin(store: RunStore) -> list[Listener]:
            how = {"device": str(device), "deterministic": deterministic, **_ranks()}
            return _begun(job, store, trainer, evaluation, progress, after=after, **how)

        listeners = parallel.lead(lambda: begin(store) if store else [])
        measured = parallel.tell(lambda: store is not None and bool(store.evaluation))
        trainer.train(evaluation, [OfFirstRank(listeners or [])], measured)

        def end(store: RunStore) -> None:
            store.save_lora(trainer.model.save)
            store.finish()

        parallel.lead(lambda: end(store) if store else None)


def _begun(
    job: Job, store: RunStore, trainer: Trainer, evaluation: Evaluation,
    progress: ProgressListener, *, after: int | None, **how: Any,
) -> list[Listener]:  # fmt: skip
    """Record how the run begins or resumes; who hears of it from now on."""
    if store.damaged:
        progress.note(
            f"{job.called}: the newest checkpoint is damaged: resuming from round {trainer.round}"
        )
    evaluation.try_out(trainer.model)
    scorers = {n: job.tools.fingerprint(s) for n, s in evaluation.named.items()}
    store.start(
        job.config, {**trainer.inputs, "scorers": scorers}, after=after,
        facts=_facts(job, trainer, evaluation, progress), threads=torch.get_num_threads(),
        execution=recorded(job.execution), **how, **_plugins(job.config, evaluation),
    )  # fmt: skip
    listeners: list[Listener] = [Recorder(store), progress, Checkpoints(trainer, store)]
    listeners += [*_trackers(job, after, store, progress), Stopping(job.config.rounds)]
    progress.begin(trainer.round, trainer.experience.scorer.unit, store)
    return listeners


EVALUATED = ("model", "objective", "long_prompts", "dtype", "full", "eval_scorers")
"""Settings that the base model's evaluation depends on, beside those of its own set."""


def _evaluation(job: Job, trainer: Trainer, device: torch.device) -> Evaluation:
    """The evaluations of a run, of which other methods and seeds share the base model's.

    Not where code of the user's own takes part: what that does is not told by its text.
    """
    config, source = job.config, model_source(job.config.model)
    found = Evaluation(config, job.execution, trainer.experience, job.tools, device)
    own_scorer = any(registry.is_own("scorer", text) for text in found.texts.values())
    if own_scorer or source.is_code or job.objects or job.experience:
        return found
    facts = {
        **environment(), **trainer.inputs, **_plugins(config, found), **_ranks(),
        "scorers": {n: job.tools.fingerprint(s) for n, s in found.named.items()},
        "config": {name: getattr(config, name) for name in EVALUATED}, "what": vars(found.what),
        "execution": recorded(job.execution), "device": str(device),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip
    del facts["started"]
    found.kept = BaseEvaluation(job.folder, facts)
    return found


def _settled(
    job: Job, trainer: Trainer, resumed: RunStore | None, progress: ProgressListener
) -> Job:
    """The job with batches that are chosen, by which its trainer then computes."""
    began = parallel.tell(lambda: _computed(resumed) if resumed else {})
    execution = settled(job.execution, job.config, trainer.model, began, progress.note)
    trainer.take(execution)
    return replace(job, execution=execution)


def _computed(store: RunStore) -> Row:
    """How the newest part of a run was computed, as far as that is on record."""
    found: Row = sessions(store.provenance())[-1].get("execution", {})
    return found


class Elsewhere:
    """Stands where the first rank has its scorers, which tells the others what they say."""

    unit = ""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Not possible.

        Raises:
            TypeError: always.
        """
        raise TypeError("the first rank scores")


def _trainer(job: Job, device: torch.device) -> Trainer:
    scorers = model_source(job.config.model).scorers
    experience = job.experience or on_policy(job, device, scorers)
    return Trainer(job.config, job.execution, experience, device)


def _ranks() -> dict[str, int]:
    return {"ranks": parallel.world()} if parallel.world() > 1 else {}


def _made_before(job: Job) -> bool:
    """Whether the run is there already, after checking that it is whole and still the same.

    One that ended after fewer rounds than are wanted now continues from its end.
    """
    before = RunFolder(job.folder)
    if not before.finished:
        return False
    extended = before.config.rounds != job.config.rounds
    before.require_content(*([LAST] if extended else []))
    today = inputs_today(before, _prompts(job), job.tools)
    before.require_inputs(today, "give another --out")
    return not extended


def _trackers(
    job: Job, after: int | None, store: RunStore, progress: ProgressListener
) -> list[Tracker]:
    """What shows the run elsewhere."""
    config = job.config
    run = Tracked(
        folder=job.folder,
        name=label(config),
        settings={**asdict(config), **asdict(job.execution)},
        command=job.command or job.tools.command(config, job.folder),
        after=after,
        first=by_round(store.evaluation).get(0, []),
    )
    found: list[Tracker] = [registry.part("tracker", name)(run) for name in job.trackers]
    for tracker in found:
        if tracker.where:
            progress.note(f"{job.called}: {tracker.where}")
    return found


def _prompts(job: Job) -> Sequence[str]:
    return job.experience.prompts if job.experience else read_prompts(job.config.prompt_source)


def on_policy(job: Job, device: torch.device, weights: str) -> OnPolicy:
    """The experience of a run that draws its own images.

    Args:
        job: whose config names objective and prompts.
        device: where the scorer computes.
        weights: of the scorer, where the objective does not say.

    Raises:
        UserError: prompts or scorer are not there.
    """
    config, method = job.config, method_of(job.config)
    objective = registry.objective(config.source("objective"))
    return OnPolicy(
        prompts=_prompts(job),
        objective=objective,
        scorer=job.tools.scorer(str(objective.scorer), device, weights),
        seed=config.seed,
        prompts_per_round=config.prompts_per_round,
        images_per_prompt=config.images_per_prompt or method.images_per_prompt,
        shared_noise=method.shared_noise,
        batch=job.execution.usual().sample_batch,
        decode_batch=job.execution.usual().decode_batch,
    )


def _facts(
    job: Job, trainer: Trainer, evaluation: Evaluation, progress: ProgressListener
) -> dict[str, Any]:
    """What provenance keeps beside the inputs, such as what a score means.

    The objective need not be installed where the run is read.
    """
    objective, scorer = trainer.experience.objective, trainer.experience.scorer
    name = registry.name_of("scorer", str(objective.scorer))
    if isinstance(scorer, Sum):
        name = scorer.name
    return {
        "score": {"scorer": name, "unit": scorer.unit, "sign": objective.sign},
        "unchecked_scorers": _unchecked(job, evaluation, progress),
        **job.facts,
    }


def _unchecked(job: Job, evaluation: Evaluation, progress: ProgressListener) -> list[str]:
    """The scorers that nothing was compared with, after saying so."""
    known = registry.names("scorer")  # which does not name people's votes
    named = {n: s for n, s in evaluation.named.items() if n.partition(":")[0] in known}
    names = job.tools.unchecked(named)
    if names:
        progress.note(job.tools.note(names))
    return names


def _plugins(config: RunConfig, evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """Which packages brought what a run uses, if any did."""
    used: list[tuple[registry.Kind, str]] = [
        ("method", config.source("method")), ("objective", config.source("objective")),
        ("model", config.model), *(("scorer", text) for text in evaluation.texts.values()),
    ]  # fmt: skip
    return registry.plugins(used)
