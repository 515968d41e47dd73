"""`d3po-bench doctor` and `weights`: what is here, and what each missing thing needs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from d3po_bench import registry
from d3po_bench.errors import UserError
from d3po_bench.text import section

EMBEDDED = registry.HOME / "eval" / "embedded"
"""Small scorers that ship with the project."""

EXTRAS = {"open-clip": "open_clip", "feedback": "fastapi", "track": "tensorboard", "cluster": "ray"}
"""Extra -> a module that it brings."""


def everything() -> Iterator[str]:
    """Packages, devices, extras, weights and scorers, a line each."""
    yield from section("python", {platform.python_version(): sys.executable})
    yield from section("packages", {name: _version(name) for name in _required()})
    yield from section("extras", {name: _extra(name) for name in EXTRAS})
    yield from section("device", _devices())
    yield from section("weights", _weights())
    yield from section("scorers", {name: _scorer(name) for name in _checkable()})


def _required() -> list[str]:
    """What the project needs, without extras."""
    plain = (line for line in requires("d3po-bench") or [] if "extra ==" not in line)
    return sorted(line.split(">")[0].split("=")[0].strip() for line in plain)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing: pip install -c constraints.txt d3po-bench"


def _extra(name: str) -> str:
    if find_spec(EXTRAS[name]):
        return "installed"
    return f"not installed: pip install -c constraints.txt 'd3po-bench[{name}]'"


def _devices() -> dict[str, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{cores} cores"}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    return found


def _weights() -> dict[str, str]:
    from eval.weights import WEIGHTS, home, state

    told = {}
    for name, entry in WEIGHTS.items():
        what = state(name)
        need = f" (`d3po-bench weights fetch {name}`)" if what == "absent" else ""
        told[name] = f"{what}{need}: {entry.summary}"
    return {"folder": str(home()), **told}


def _checkable() -> list[str]:
    """Scorers by name and, where they have any, by weights."""
    found = []
    for name in registry.names("scorer"):
        if name == "open_clip":
            continue  # its weights are the user's choice
        if not registry.takes_weights(name):
            found.append(name)
            continue
        found += [f"{name}:tiny"] if (EMBEDDED / name).is_dir() else []
        found.append(f"{name}:official")
    return found


def _scorer(name: str) -> str:
    """Whether a scorer loads and gives its golden scores."""
    import torch

    from eval import selfcheck

    try:
        scorer = registry.load_scorer(name, torch.device("cpu"))
        known = selfcheck.check(name, scorer)
    except UserError as problem:
        return str(problem)
    words = "gives its golden scores" if known else "no golden scores of these weights: --record"
    return f"{words} ({selfcheck.fingerprint(scorer)})"


def record() -> Iterator[str]:
    """Record the golden scores of every scorer that loads here; its line."""
    import torch

    from eval import selfcheck

    for name in _checkable():
        try:
            scorer = registry.load_scorer(name, torch.device("cpu"))
        except UserError as problem:
            yield f"{name}: not recorded. {problem}"
            continue
        selfcheck.record(name.partition(":")[0], scorer)
        yield f"{name}: recorded for {selfcheck.fingerprint(scorer)}"


# ---- weights


def list_weights() -> Iterator[str]:
    """Everything that can be fetched: size, licence, files, state."""
    from eval.weights import WEIGHTS, readable, state

    for name, entry in WEIGHTS.items():
        size = readable(entry.size)
        yield f"{name}: {entry.summary}; {size}, {entry.licence}; {state(name)}"
        for file in entry.files:
            yield f"  {file.url}"
            yield f"    sha256 {file.sha256 or 'not published: kept from the first fetch'}"


def fetch(names: Sequence[str]) -> Iterator[Path]:
    """Fetch these weights with a bar for each file; the folder of each.

    Raises:
        UserError: an unknown name, no network, or a file is not what its checksum says.
    """
    from rich.console import Console
    from rich.progress import Progress

    from eval import weights

    for name in names:
        if name not in weights.WEIGHTS:
            raise registry.unknown("name of weights", name, list(weights.WEIGHTS))
    for name in names:
        with Progress(console=Console(stderr=True)) as bars:
            yield weights.fetch(name, _shown_by(bars))


def _shown_by(bars: Any) -> Callable[[str, int, int], None]:
    tasks: dict[str, Any] = {}

    def show(file: str, done: int, total: int) -> None:
        if file not in tasks:
            tasks[file] = bars.add_task(file)
        bars.update(tasks[file], completed=done, total=total or None)

    return show


def echo(lines: Iterator[str]) -> None:
    """Print as it comes: a check can take seconds."""
    for line in lines:
        click.echo(line)
