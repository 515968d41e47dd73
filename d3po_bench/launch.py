"""`d3po-bench run`: seeds one after the other or side by side, with progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from d3po_bench import registry, train
from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.errors import RunError, UserError, is_out_of_memory, of_file
from d3po_bench.prompts import read_prompts
from d3po_bench.reading import read_config
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
    names = {train.label(c): f"seed {c.seed}" for c, *_ in work}
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
    with _bars(names) as bars, _terminable():
        report = _noting(bars)
        if min(jobs, len(work)) > 1:
            _side_by_side(work, jobs, report, failures.add)
        else:
            for item in work:
                failures.add(item, _one(item, report))
    labels = [train.label(config) for config, *_ in work]
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
    train.model_source(work[0][0].model)
    train.device_of(request.device)
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


@dataclass(frozen=True)
class _End:
    """How a run ended.

    It goes from process to process, so the error is one of ours; and it holds no frames of the
    run, whose model would fill the memory of the next one.
    """

    problem: UserError | None = None
    trace: str = ""
    """The traceback, where nobody expected the problem."""


def _one(work: Work, report: Report) -> _End:
    """Make one run; only what is no Exception, such as Ctrl-C, goes through."""
    config, execution, folder, resume = work
    try:
        train.run_seed(config, execution, folder, resume=resume, report=report)
    except UserError as problem:
        kind = RunError if isinstance(problem, RunError) else UserError
        return _End(kind(str(problem)))
    except (Exception, SystemExit) as problem:  # a plug-in that exits is one that failed
        if is_out_of_memory(problem):
            return _End(out_of_memory())
        if isinstance(problem, OSError) and problem.filename is not None:
            return _End(of_file(problem))
        return _unexpected(problem)
    return _End()


LONGEST = 300
"""Characters of a foreign exception that a line quotes."""


def _unexpected(problem: BaseException) -> _End:
    """A mistake in the package or in a plug-in: its author needs the traceback."""
    said = " ".join("".join(traceback.format_exception_only(problem)).split())
    shown = said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."
    told = RunError(
        f"Expected a run that finishes, got {shown} (traceback above). Mend what the traceback "
        "names, and run the same command again: it goes on from the last checkpoint."
    )
    return _End(told, "".join(traceback.format_exception(problem)))


class _Failures:
    """What failed, by the run's label."""

    def __init__(self) -> None:
        self.found: dict[str, UserError] = {}
        self.printed = {""}

    def add(self, work: Work, end: _End) -> None:
        """Keep the problem, and print its traceback, once for all runs that end in the same."""
        name = train.label(work[0])
        if end.problem is not None:
            self.found[name] = end.problem
        if end.trace not in self.printed:
            self.printed.add(end.trace)
            print(f"{name}:\n{end.trace}", end="", file=sys.stderr)


SMALLER = (
    "Make the batches smaller: --set micro_batch=8 --set sample_batch=16 --set "
    "reference_batch=16, or --set gradient_checkpointing=true."
)


def out_of_memory() -> RunError:
    """The error for a device or machine without enough memory."""
    return RunError(f"Expected enough memory for a batch, got none left. {SMALLER}")


class _Worker:
    """A process that makes one run after the other, and what it is at.

    Each has a pipe of its own: a queue that several share can stay locked when one is killed,
    and does not tell whose run that was.
    """

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.give(work)

    def give(self, work: Work) -> None:
        """Let it make that run."""
        self.work = work
        with contextlib.suppress(OSError):  # it has died, and `end` will say so
            self.pipe.send(work)

    def end(self, report: Report) -> _End | None:
        """Pass on the progress that has come; how the run ended, if it has."""
        while (said := self._said()) is not None:
            if isinstance(said, _End):
                return said
            report(said)
        return None

    def _said(self) -> train.Progress | _End | None:
        alive = self.process.is_alive()  # asked first: what it said before it died is in the pipe
        try:
            if self.pipe.poll():
                said: train.Progress | _End = self.pipe.recv()
                return said
        except (EOFError, OSError):
            self.process.join()
            alive = False
        return None if alive else _died(self.process.exitcode or 0)


class _Stopped(BaseException):
    """A worker is to end: no mistake of the run that it is at."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def _serve(pipe: connection.Connection[Any, Any]) -> None:
    """In a worker process: make the runs that come, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    signal.signal(signal.SIGTERM, _stop)

    def tell(progress: train.Progress) -> None:
        try:
            pipe.send(progress)
        except OSError:
            raise _Stopped from None  # the parent is gone

    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                pipe.send(_one(pipe.recv(), tell))
    except _Stopped:
        os._exit(1)  # what was open is closed; threads of a plug-in hold nobody up


def _died(code: int) -> _End:
    """The end of a run whose process ended on the way; a signal's number is below 0."""
    how = f"ended with status {code}"
    if code == -signal.SIGKILL:
        how = "was killed (out of memory?)"
    elif code < 0:
        how = f"died of signal {-code} ({signal.strsignal(-code)})"
    told = RunError(
        f"Expected a worker process that finishes, got one that {how}. "
        "Run the same command again: it goes on from the last checkpoint. If memory is short, "
        f"add --jobs 1. {SMALLER}"
    )
    return _End(told)


def _side_by_side(
    work: list[Work], jobs: int, report: Report, ended: Callable[[Work, _End], None]
) -> None:
    """Make the runs in worker processes, a new one where one died."""
    waiting, workers, started = deque(work), list[_Worker](), list[_Worker]()
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(waiting.popleft()))
                started.append(workers[-1])
            connection.wait([worker.pipe for worker in workers], timeout=0.2)
            workers = [w for w in workers if _at_work(w, waiting, report, ended)]
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        for worker in started:
            worker.process.join()


def _at_work(
    worker: _Worker, waiting: deque[Work], report: Report, ended: Callable[[Work, _End], None]
) -> bool:
    """Hear a worker, and give it the next run when its run has ended; False if it gets none."""
    end = worker.end(report)
    if end is None:
        return True
    ended(worker.work, end)
    # What nobody expected may have left a process in which nothing works, a GPU's context say.
    if waiting and not end.trace and worker.process.is_alive():
        worker.give(waiting.popleft())
        return True
    worker.pipe.close()
    return False


def _joined(failed: Mapping[str, UserError]) -> UserError:
    """Several runs' errors as one, after their names; equal ones are said once."""
    kind = type(next(iter(failed.values())))
    said: dict[str, list[str]] = {}
    for name, problem in failed.items():
        said.setdefault(str(problem), []).append(name)
    parts = [f"{', '.join(names)}: {text}" for text, names in said.items()]
    return kind(" ".join(parts).removeprefix(": "))


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
