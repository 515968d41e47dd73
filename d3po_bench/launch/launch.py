"""`d3po-bench run`: the seeds of one method on one objective."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import click

from d3po_bench import registry
from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.errors import UserError
from d3po_bench.launch import devices
from d3po_bench.launch.job import End, Work, make_run
from d3po_bench.launch.local import side_by_side
from d3po_bench.launch.progress import bars, noting
from d3po_bench.models import sources
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.run import read_config
from d3po_bench.runs.store import require_same
from d3po_bench.training import progress
from d3po_bench.training.trackers.tensorboard import track

Deterministic = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    method: str
    objective: str
    model: str
    preset: str | None
    settings: Mapping[str, str]
    rounds: int | None
    seeds: range
    device: str
    jobs: int | None
    out: Path
    resume: bool
    track: str | None = None
    deterministic: Deterministic = "auto"


def run(request: Request) -> None:
    """Run every seed of a request; a failed seed does not stop the others.

    Raises:
        UserError: bad input.
        RunError: a run failed, or its process was killed; the others have finished.
    """
    work = planned(request)
    names = {progress.label(c): f"seed {c.seed}" for c, *_ in work}
    failed = execute(work, request.jobs, names)
    if request.track:
        track([folder for _, _, folder, _ in work])
    alone = len(work) == 1
    finish({"" if alone else names[run]: why for run, why in failed.items()}, request.out)


def planned(request: Request) -> list[Work]:
    """The runs of a request, one for each seed, after checking that they can be made.

    Raises:
        UserError: bad input.
    """
    config, execution = configured(request)
    runs = [replace(config, seed=seed) for seed in request.seeds]
    work = [(c, execution, _folder(request, c), request.resume) for c in runs]
    _check(request, work)
    return work


def execute(work: list[Work], jobs: int | None, names: Mapping[str, str]) -> dict[str, UserError]:
    """Make the runs, side by side where there are cores; what failed, by its label.

    A run that fails, whatever with, stops no other; the traceback of what nobody expected is
    printed on stderr.

    Args:
        work: the runs.
        jobs: how many side by side; None for as many as the model and machine allow.
        names: label of a run -> what to call it in the progress.
    """
    jobs, failures = jobs or _jobs(*work[0][:2]), _Failures()
    with bars(names) as shown, _terminable():
        report = noting(shown)
        if min(jobs, len(work)) > 1:
            side_by_side(work, jobs, report, failures.add)
        else:
            for item in work:
                failures.add(item, make_run(item, report))
    labels = [progress.label(config) for config, *_ in work]
    return {name: failures.found[name] for name in labels if name in failures.found}


def finish(failed: Mapping[str, UserError], out: Path) -> None:
    """Say where the runs are, or raise what went wrong.

    Args:
        failed: what to call a run -> its problem; "" for a run that was asked for alone.
        out: folder of the run folders.

    Raises:
        UserError: there are problems.
    """
    if failed:
        raise _joined(failed)
    click.echo(f"Runs are in {out}. Draw them: d3po-bench plot {out}", err=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM, as a cluster sends it, for Ctrl-C: no worker goes on without its parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(request: Request, work: list[Work]) -> None:
    """Refuse, before hours are spent, what would fail at the end of them."""
    sources.model_source(work[0][0].model)
    devices.device_of(request.device)
    for config, _, folder, resume in work:
        read_prompts(config.prompts or registry.objective(config.objective).prompts)
        if (folder / "config.json").exists():
            read_config(folder)
        require_same(folder, config, resume)
    if request.track and find_spec("tensorboard") is None:
        raise UserError(
            "Expected the extra `track` for --track tensorboard, got an environment without it. "
            "Install it: pip install -c constraints.txt 'd3po-bench[track]'."
        )


def configured(request: Request) -> tuple[RunConfig, Execution]:
    """The config of a request's first seed.

    Raises:
        UserError: an unknown name, or a setting that no run can have.
    """
    model = request.model.rstrip("/")
    preset = sources.model_source(model).preset if request.preset is None else request.preset
    given: dict[str, Any] = {"model": model, "seed": request.seeds.start}
    if request.rounds is not None:
        given["rounds"] = request.rounds
    config, execution = make(request.method, request.objective, preset, request.settings, **given)
    if request.deterministic != "auto":
        execution = replace(execution, deterministic=request.deterministic)
    return config, replace(execution, device=request.device)


def _jobs(config: RunConfig, execution: Execution) -> int:
    """One seed per core for the embedded model on a CPU; else the model may not fit twice."""
    if config.model != "tiny" or devices.device_of(execution.device).type != "cpu":
        return 1
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _folder(request: Request, config: RunConfig) -> Path:
    model = config.model.replace("/", "--").strip("-.") or "model"
    return request.out / model / config.objective / config.method / f"seed-{config.seed}"


class _Failures:
    """What failed, by the run's label."""

    def __init__(self) -> None:
        self.found: dict[str, UserError] = {}
        self.printed = {""}

    def add(self, work: Work, end: End) -> None:
        """Keep the problem, and print its traceback, once for all runs that end in the same."""
        name = progress.label(work[0])
        if end.problem is not None:
            self.found[name] = end.problem
        if end.trace not in self.printed:
            self.printed.add(end.trace)
            print(f"{name}:\n{end.trace}", end="", file=sys.stderr)


def _joined(failed: Mapping[str, UserError]) -> UserError:
    """Several runs' errors as one, after their names; equal ones are said once."""
    kind = type(next(iter(failed.values())))
    said: dict[str, list[str]] = {}
    for name, problem in failed.items():
        said.setdefault(str(problem), []).append(name)
    parts = [f"{', '.join(names)}: {text}" for text, names in said.items()]
    return kind(" ".join(parts).removeprefix(": "))
