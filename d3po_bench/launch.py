"""`d3po-bench run`: seeds one after the other or side by side, with progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from d3po_bench import registry, train
from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.errors import RunError, UserError, is_out_of_memory
from d3po_bench.prompts import read_prompts
from d3po_bench.reading import read_facts
from d3po_bench.store import RunStore, require_same
from d3po_bench.train import Report

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
    failed = execute(work, request.jobs, {train.label(c): f"seed {c.seed}" for c, *_ in work})
    if request.track:
        track([folder for _, _, folder, _ in work])
    finish(list(failed.values()), request.out)


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

    Args:
        work: the runs.
        jobs: how many side by side; None for as many as the model and machine allow.
        names: label of a run -> what to call it in the progress.
    """
    jobs = jobs or _jobs(*work[0][:2])
    with _bars(names) as bars, _terminable():
        report = _noting(bars)
        side_by_side = min(jobs, len(work)) > 1
        return _side_by_side(work, jobs, report) if side_by_side else _in_turn(work, report)


def finish(failed: list[UserError], out: Path) -> None:
    """Say where the runs are, or raise what went wrong."""
    if failed:
        worst = failed[0] if len(failed) == 1 else _joined(failed)
        raise worst
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
    train.model_source(work[0][0].model)
    train.device_of(request.device)
    for config, _, folder, resume in work:
        read_prompts(config.prompts or registry.objective(config.objective).prompts)
        if (folder / "config.json").exists():
            read_facts(folder)
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
    preset = train.model_source(model).preset if request.preset is None else request.preset
    given: dict[str, Any] = {"model": model, "seed": request.seeds.start}
    if request.rounds is not None:
        given["rounds"] = request.rounds
    config, execution = make(request.method, request.objective, preset, request.settings, **given)
    if request.deterministic != "auto":
        execution = replace(execution, deterministic=request.deterministic)
    return config, replace(execution, device=request.device)


def _jobs(config: RunConfig, execution: Execution) -> int:
    """One seed per core for the embedded model on a CPU; else the model may not fit twice."""
    if config.model != "tiny" or train.device_of(execution.device).type != "cpu":
        return 1
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _folder(request: Request, config: RunConfig) -> Path:
    model = config.model.replace("/", "--").strip("-.") or "model"
    return request.out / model / config.objective / config.method / f"seed-{config.seed}"


# ---- one after the other, or side by side: the same bytes

Work = tuple[RunConfig, Execution, Path, bool]


def _one(work: Work, report: Report) -> None:
    config, execution, folder, resume = work
    try:
        train.run_seed(config, execution, folder, resume=resume, report=report)
    except (MemoryError, RuntimeError, OSError) as problem:
        if is_out_of_memory(problem):
            raise out_of_memory() from problem
        raise


SMALLER = (
    "Make the batches smaller: --set micro_batch=8 --set sample_batch=16 --set "
    "reference_batch=16, or --set gradient_checkpointing=true."
)


def out_of_memory() -> RunError:
    """The error for a device or machine without enough memory."""
    return RunError(f"Expected enough memory for a batch, got none left. {SMALLER}")


def _in_turn(work: list[Work], report: Report) -> dict[str, UserError]:
    failed: dict[str, UserError] = {}
    for item in work:
        try:
            _one(item, report)
        except UserError as problem:
            failed[train.label(item[0])] = problem
    return failed


_events: Any = None


def _share(events: Any) -> None:
    """In a worker process: keep the queue, and leave Ctrl-C to the parent, who ends us."""
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))


def _remote(work: Work) -> None:
    """In a worker process: run one seed, sending its progress to the parent."""
    try:
        _one(work, _tell)
    except SystemExit:
        os._exit(1)  # what was open is closed; the pool would go on with the next seed


def _tell(progress: train.Progress) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    _events.put(progress)


def _side_by_side(work: list[Work], jobs: int, report: Report) -> dict[str, UserError]:
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    with ProcessPoolExecutor(jobs, context, _share, (events,)) as pool:
        futures = [pool.submit(_remote, item) for item in work]
        try:
            while not all(f.done() for f in futures):
                _drain(events, report, wait=0.2)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        _drain(events, report, wait=0.0)
    found = zip(work, map(_failure, futures), strict=True)
    return {train.label(item[0]): problem for item, problem in found if problem is not None}


def _drain(events: Any, report: Report, wait: float) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            report(events.get(timeout=wait) if wait else events.get_nowait())


def _failure(future: Future[None]) -> UserError | None:
    problem = future.exception()
    if problem is None or isinstance(problem, UserError):
        return problem
    if isinstance(problem, RuntimeError) and "terminated abruptly" in str(problem):
        return RunError(
            "Expected a worker process that finishes, got one that was killed (out of memory?). "
            "Run the same command again: it goes on from the last checkpoint. If memory is short, "
            f"add --jobs 1. {SMALLER}"
        )
    raise problem


def _joined(failed: list[UserError]) -> UserError:
    """Several seeds' errors as one; equal ones are said once."""
    kind = type(failed[0])
    return kind(" ".join(dict.fromkeys(str(problem) for problem in failed)))


# ---- progress and tracking

MANY = 10
"""Runs that still get a bar each from the start."""


@contextlib.contextmanager
def _bars(names: Mapping[str, str]) -> Iterator[Report]:
    """A bar for each run with the time left; without a terminal, a line now and then.

    Of many runs only those at work have a bar, below one for all.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, names)
        return
    columns = (TextColumn("{task.fields[name]}"), BarColumn(20), TaskProgressColumn(),
               TimeRemainingColumn(), TextColumn("{task.description}"))  # fmt: skip
    many = len(names) > MANY
    with Progress(*columns, console=console) as bars:
        whole = bars.add_task("", total=len(names), name="all runs", visible=many)
        tasks = {
            run: bars.add_task("waiting", total=1.0, name=name, start=False, visible=not many)
            for run, name in names.items()
        }
        done = dict.fromkeys(names, 0.0)

        def show(p: train.Progress) -> None:
            task, done[p.run] = tasks[p.run], p.done
            if p.text and not bars.tasks[task].started:
                bars.start_task(task)
            visible = not many or p.done < 1
            bars.update(task, completed=p.done, description=p.text, visible=visible)
            bars.update(whole, completed=sum(done.values()))

        yield show


def _noting(report: Report) -> Report:
    """Print each note once, above the bars; pass all else on."""
    said: set[str] = set()

    def told(progress: train.Progress) -> None:
        if not progress.note:
            report(progress)
        elif progress.note not in said:
            said.add(progress.note)
            click.echo(f"note: {progress.note}", err=True)

    return told


class _Lines:
    """Progress for logs: a line each time a run has done another tenth."""

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        self.console, self.names = console, names
        self.last: dict[str, int] = {}
        self.began: dict[str, tuple[float, float]] = {}

    def __call__(self, progress: train.Progress) -> None:
        """Print the line, if it is time."""
        tenth = int(progress.done * 10)
        if self.last.get(progress.run) != tenth:
            self.last[progress.run] = tenth
            text = f"{self.names[progress.run]}  {progress.done:4.0%}  {progress.text}"
            self.console.print(text + self._left(progress), highlight=False, soft_wrap=True)

    def _left(self, progress: train.Progress) -> str:
        """The time left, once there is something to tell it from."""
        now, done = time.monotonic(), progress.done
        start, before = self.began.setdefault(progress.run, (now, done))
        if not before < done < 1:
            return ""
        seconds = (now - start) * (1 - done) / (done - before)
        return f"  {timedelta(seconds=round(seconds))} left"


def track(folders: list[Path]) -> None:
    """Write the metrics of runs as TensorBoard event files in each run folder."""
    from torch.utils.tensorboard import SummaryWriter

    for folder in folders:
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for line in RunStore(folder).metrics:
                for name in line.keys() - {"round"}:
                    writer.add_scalar(name, line[name], line["round"])
