"""Kill runs with SIGKILL, resume them, and compare every byte with runs never killed.

    python -m tests.kills --kills 50                    every method in turn, embedded model
    python -m tests.kills --kills 5 --model FOLDER      a smaller pipeline

A third of the kills comes at a moment drawn from the whole run; a third is aimed at an
evaluation and a third at the writing of a checkpoint, at a moment drawn from within it. Runs are
forked from one process that has everything imported, and mark in shared memory what they are at,
so that the table says where each kill hit. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import ctypes
import filecmp
import functools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from d3po_bench import config, registry
from d3po_bench.models.parts import quieten
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.runs.store import RunStore
from d3po_bench.training import evaluation, trainer
from d3po_bench.training.run import Job, run_seed
from eval.tools import TOOLS

STAGES = ("starting", "learning", "evaluating", "logging", "checkpoint", "saving")
"""What a run is at, as the table names it; `starting` is also all between the others."""

MARKED: dict[str, tuple[Any, str]] = {
    "learning": (trainer.Trainer, "train_round"),
    "evaluating": (evaluation.Evaluation, "__call__"),
    "logging": (RunStore, "log"),
    "checkpoint": (RunStore, "checkpoint"),
    "saving": (StableDiffusion, "save"),
}

AIMS = ("", "evaluating", "checkpoint")
"""Stages that kills are aimed at; "" is any moment of the run."""

SETTINGS = {
    "rounds": "4", "prompts_per_round": "2", "images_per_prompt": "2", "sampling_steps": "3",
    "skip_steps": "0", "units_per_update": "2", "eval_every": "2", "eval_prompts": "2",
    "eval_images": "1", "eval_scorers": "", "minimum": "2",
}  # fmt: skip
"""A run of seconds; `minimum` makes the rewards kept from round to round count."""

PROMPTS = ("cat", "dog", "horse")

OWN = ("timing.jsonl", "provenance.json", "checkpoints/last.safetensors",
       "checkpoints/previous.safetensors")  # fmt: skip
"""Files that hold the seconds a run took, which no two runs share."""

PATIENCE = 300.0
"""Seconds that a run may take."""


class Shared(ctypes.Structure):
    """What a run tells the process that kills it, which outlives the run."""

    _fields_ = (
        ("stage", ctypes.c_int),
        ("entered", ctypes.c_int * len(STAGES)),
        ("seconds", ctypes.c_double * len(STAGES)),
    )


@dataclass
class Watch:
    """A run's stage, how often each was entered, and the seconds spent in it."""

    shared: Any = field(
        default_factory=lambda: Shared.from_buffer(mmap.mmap(-1, ctypes.sizeof(Shared)))
    )

    @property
    def stage(self) -> str:
        """The stage now, or at the end."""
        return STAGES[self.shared.stage]

    def entered(self, stage: str) -> int:
        """How often the stage began."""
        return int(self.shared.entered[STAGES.index(stage)])

    def length(self, stage: str) -> float:
        """Mean seconds of the stage."""
        return float(self.shared.seconds[STAGES.index(stage)]) / max(1, self.entered(stage))

    def marked(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, marking that it runs."""
        number = STAGES.index(stage)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before, start = self.shared.stage, time.monotonic()
            self.shared.stage = number
            self.shared.entered[number] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.shared.stage = before
                self.shared.seconds[number] += time.monotonic() - start

        return call


Run = tuple[config.RunConfig, config.Execution]


def run_of(method: str, model: str, prompts: Path) -> Run:
    """A tiny run of a method."""
    known = {name for group in config.settings(method).values() for name in group}
    given = {k: v for k, v in SETTINGS.items() if k in known} | {"prompts": str(prompts)}
    made, execution = config.make(method, "incompress", "quick", given, model=model)
    return made, replace(execution, device="cpu", threads=1)


def start(run: Run, folder: Path, watch: Watch) -> int:
    """Begin or resume the run in a forked process; returns its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    try:
        for stage, (owner, name) in MARKED.items():
            setattr(owner, name, watch.marked(stage, getattr(owner, name)))
        made, execution = run
        run_seed(Job(config=made, execution=execution, folder=folder, tools=TOOLS))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(number: int) -> int | None:
    """The exit status of a process, minus the signal that killed it; None while it runs."""
    found, status = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(
    number: int, until: Callable[[], bool] = lambda: False, every: float = 0.002
) -> int | None:
    """Wait until the process ends, returning its status, or until the condition holds."""
    end = time.monotonic() + PATIENCE
    while (status := ended(number)) is None and not until():
        if time.monotonic() > end:
            os.kill(number, signal.SIGKILL)
        time.sleep(every)
    return status


def finish(run: Run, folder: Path) -> tuple[Watch, float]:
    """Let a run come to its end; what it did, and its seconds."""
    watch, begun = Watch(), time.monotonic()
    status = wait(start(run, folder, watch))
    if status != 0:
        raise RuntimeError(f"the run in {folder} ended with {status}")
    return watch, time.monotonic() - begun


@dataclass(frozen=True)
class Reference:
    """A run that was never killed."""

    folder: Path
    watch: Watch
    seconds: float


def kill(run: Run, folder: Path, reference: Reference, aim: str, rng: random.Random) -> str | None:
    """Begin a run and kill it; returns the stage that was hit, None if it was over before."""
    watch = Watch()
    begun = time.monotonic()
    number = start(run, folder, watch)
    if aim:
        nth = rng.randint(1, reference.watch.entered(aim))
        status = wait(number, lambda: watch.entered(aim) >= nth, every=1e-4)
        begun, length = time.monotonic(), reference.watch.length(aim)
    else:
        status, length = None, reference.seconds
    if status is None:
        end = begun + rng.random() * length
        status = wait(number, lambda: time.monotonic() >= end, every=1e-4)
    if status is None:
        os.kill(number, signal.SIGKILL)
        status = wait(number)
    return watch.stage if status == -signal.SIGKILL else None


def different(one: Path, other: Path) -> list[str]:
    """Files that only one of two folders has, or whose bytes differ; `OWN` must be in both."""
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (one, other)]
    both = (names[0] & names[1]) - set(OWN)
    changed = {n for n in both if not filecmp.cmp(one / n, other / n, shallow=False)}
    return sorted((names[0] ^ names[1]) | changed)


@dataclass(frozen=True)
class Trial:
    """A kill, and what came of it."""

    method: str
    aim: str
    hit: str
    parts: int
    """Half-written files that the kill left."""
    difference: list[str]
    """Files that differ after resuming."""


def trials(kills: int, model: str, seed: int, folder: Path) -> Iterator[Trial]:
    """Kill and resume, the methods in turn, the aims in turn for each."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    methods = [n for n in registry.names("method") if not registry.variant(n)[1]]
    references: dict[str, Reference] = {}
    for number in range(kills):
        turn, which = divmod(number, len(methods))
        method, aim = methods[which], AIMS[(which + turn) % 3]
        run = run_of(method, model, prompts)
        if method not in references:
            place = folder / f"whole-{method}"
            references[method] = Reference(place, *finish(run, place))
        run = run[0], replace(run[1], checkpoint_every=1 + number % 2)
        yield trial(
            run, folder / "killed", references[method], aim, random.Random(f"{seed}/{number}")
        )


def trial(run: Run, folder: Path, reference: Reference, aim: str, rng: random.Random) -> Trial:
    """One kill that hits, and the run that is resumed after it."""
    hit = None
    while hit is None:
        shutil.rmtree(folder, ignore_errors=True)
        hit = kill(run, folder, reference, aim, rng)
    parts = len(list(folder.rglob("*.part")))
    finish(run, folder)
    return Trial(run[0].method, aim, hit, parts, different(reference.folder, folder))


def table(done: list[Trial]) -> Iterator[str]:
    """A line for each method: where it was hit, half-written files left, and what was equal."""
    width = max(len("method"), *(len(t.method) for t in done))
    columns = (*STAGES, "half-written", "kills", "equal")
    yield "  ".join(["method".ljust(width), *columns])
    groups = {m: [t for t in done if t.method == m] for m in dict.fromkeys(t.method for t in done)}
    for name, group in {**groups, "all": done}.items():
        hits = Counter(t.hit for t in group)
        numbers = (
            *(hits[stage] for stage in STAGES), sum(t.parts > 0 for t in group), len(group),
            sum(not t.difference for t in group),
        )  # fmt: skip
        cells = [str(n).rjust(len(c)) for n, c in zip(numbers, columns, strict=True)]
        yield "  ".join([name.ljust(width), *cells])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", default="tiny", help="tiny, or a pipeline folder")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    torch.set_num_threads(1)
    _import_all()
    done, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for one in trials(given.kills, given.model, given.seed, Path(folder)):
            done.append(one)
            for name in one.difference:
                print(f"kill {len(done)}, {one.method}, {one.hit}: {name} differs", flush=True)
    print("\n".join(table(done)))
    equal = sum(not t.difference for t in done)
    print(f"{equal} of {len(done)} equal, {time.monotonic() - begun:.0f} s")
    sys.exit(equal < len(done))


def _import_all() -> None:
    """Import what a run imports late, so that forked runs have it."""
    quieten()
    import peft  # noqa: F401
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


if __name__ == "__main__":
    main()
