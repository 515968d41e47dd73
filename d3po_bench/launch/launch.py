"""`d3po-bench run`: the seeds of one method on one objective."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from d3po_bench import errors, own, registry
from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.diffusion import parallel
from d3po_bench.errors import TryAgainError, UserError
from d3po_bench.launch import ranks
from d3po_bench.launch.job import End
from d3po_bench.launch.place import Work
from d3po_bench.launch.progress import Board
from d3po_bench.machine import device_of
from d3po_bench.models import start
from d3po_bench.models.sources import model_source
from d3po_bench.prompts import read_prompts
from d3po_bench.rewards import http
from d3po_bench.runs.store import require_same
from d3po_bench.training import tracking
from d3po_bench.training.progress import planned as before_run
from d3po_bench.training.run import Job
from d3po_bench.training.tools import Tools

Deterministic = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Where:
    """On which machines runs are made."""

    place: str = "local"
    asked: Mapping[str, str] = field(default_factory=dict)
    """What each run asks of a cluster."""


HERE = Where()


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the command line asked for."""

    method: str
    objective: str
    model: str
    preset: str | None
    settings: Mapping[str, str]
    seeds: range
    device: str
    out: Path
    tools: Tools
    rounds: int | None = None
    prompts: str | None = None
    """A list or a file; None for the objective's own."""
    lora: str | None = None
    """File or folder of the LoRA to begin with; None for the base model."""
    jobs: int | None = None
    ranks: int = 1
    """Processes on each run; where a launcher has started them, 1."""
    where: Where = HERE
    resume: bool = True
    track: Sequence[str] = ()
    deterministic: Deterministic = "auto"


def run(request: RunRequest, board: Board | None = None) -> list[Path]:
    """Run every seed of a request; a failed seed does not stop the others.

    Args:
        request: which runs.
        board: shows how far they are.

    Returns:
        The folder of each seed.

    Raises:
        UserError: bad input.
        RunError: a run failed, or its process was killed; the others have finished.
    """
    require_ranks(request.ranks, request.jobs, request.device, request.where)
    ranks.join(request.device, configured(request)[1].rank_timeout)
    found = parallel.together(lambda: planned(request))
    jobs = [replace(job, name=f"seed {job.config.seed}") for job in found]
    with board or Board() as shown:
        failed = execute(jobs, request.jobs, shown, request.ranks, request.where)
        alone = len(jobs) == 1
        require_all({"" if alone else name: why for name, why in failed.items()})
    return [job.folder for job in jobs]


def planned(request: RunRequest) -> list[Job]:
    """The runs of a request, one for each seed, after checking that they can be made.

    Raises:
        UserError: bad input.
    """
    config, execution = configured(request)
    if request.where.place == "local":
        device_of(request.device)
    trackers = tracking.require(request.track)
    jobs = []
    objects = own.held([*config.sources.values(), *config.eval_scorers])
    for seed in request.seeds:
        one = replace(config, seed=seed)
        folder = run_folder(request.out, one)
        # Refuse, before hours are spent, what would fail at the end of them.
        for listed in {one.prompt_source, one.eval_source}:
            read_prompts(listed)
        start.digest(one.lora)
        require_same(folder, one, request.resume)
        jobs.append(
            Job(
                config=one, execution=execution, folder=folder, tools=request.tools,
                resume=request.resume, trackers=trackers, objects=objects,
            )
        )  # fmt: skip
    return jobs


def run_folder(out: Path, config: RunConfig) -> Path:
    """Where a run lies below `out`: the name of a model may be a path."""
    model = config.model.replace("/", "--").strip("-.") or "model"
    return out / model / config.objective / config.method / f"seed-{config.seed}"


def execute(
    jobs: list[Job], count: int | None, board: Board, processes: int = 1, where: Where = HERE
) -> dict[str, UserError]:
    """Make the runs, side by side where there is room; what failed, by what it is called.

    A run that fails, for whatever reason, stops no other; the traceback of what nobody expected
    is printed on stderr.

    Args:
        jobs: the runs.
        count: how many side by side; None for as many as the model and machine allow.
        board: shows how far they are.
        processes: to start for each run; then runs are made one after the other, as they are
            where this process is a rank itself.
        where: on which machines.
    """
    failed: dict[str, UserError] = {}
    printed = {""}

    def ended(job: Job, end: End) -> bool:
        name = job.called
        if end.problem is not None:
            failed[name] = end.problem
            board.failed(name)
        if end.trace not in printed and (
            errors.leads() or parallel.lost()
        ):  # once for all runs that end in it
            printed.add(end.trace)
            print(f"{name}:\n{end.trace}", end="", file=sys.stderr)
        # What nobody expected may have left a process in which nothing works, a GPU's context say.
        return not end.trace

    def begin(count: int) -> None:
        board.expect([replace(before_run(job.config), run=job.called) for job in jobs], count)

    if where.place != "local":
        for job in jobs:
            own.require_portable(job.objects)
    registry.part("place", where.place)(
        Work(
            jobs=jobs, count=count, processes=processes, ended=ended, report=board.report,
            begin=begin, asked=where.asked,
        )
    )  # fmt: skip
    return {job.called: failed[job.called] for job in jobs if job.called in failed}


def require_ranks(count: int, jobs: int | None, device: str, where: Where) -> None:
    """Refuse several ranks where they cannot work.

    Raises:
        UserError: saying why.
    """
    if where.place == "local":
        ranks.require(count, jobs, device)
    elif count > 1:
        raise UserError(
            f"Several ranks work on one machine, not with --where {where.place}. Leave out one of "
            "the two."
        )


LISTED = 4
"""As many names as a line has."""


def listed(names: Sequence[str]) -> str:
    """Names of runs, of many the first ones."""
    more = len(names) - LISTED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:LISTED])} and {more} others"


def require_all(failed: Mapping[str, UserError]) -> None:
    """Raise what went wrong, if anything did; errors that are alike are said once.

    Args:
        failed: what to call a run -> its problem; "" for a run that was asked for alone.

    Raises:
        UserError: there are problems.
    """
    if failed:
        said: dict[str, list[str]] = {}
        for name, problem in failed.items():
            said.setdefault(str(problem), []).append(name)
        parts = [f"{listed(names)}: {text}" for text, names in said.items()]
        kinds = [type(problem) for problem in failed.values() if type(problem) is not TryAgainError]
        kind = kinds[0] if kinds else TryAgainError
        raise kind(" ".join(parts).removeprefix(": "))


def configured(request: RunRequest) -> tuple[RunConfig, Execution]:
    """The config of a request's first seed.

    Raises:
        UserError: an unknown name, or a setting that no run can have.
    """
    http.server.cache_clear()  # what one said in an earlier call from Python
    model = request.model.rstrip("/") or request.model
    preset = model_source(model).preset if request.preset is None else request.preset
    given: dict[str, Any] = {"model": model, "seed": request.seeds.start}
    given |= {
        name: value
        for name, value in (
            ("rounds", request.rounds),
            ("prompts", request.prompts),
            ("lora", request.lora),
        )
        if value is not None
    }
    config, execution = make(request.method, request.objective, preset, request.settings, **given)
    if request.deterministic != "auto":
        execution = replace(execution, deterministic=request.deterministic)
    return config, replace(execution, device=request.device)
