"""`d3po-bench doctor` and `weights`: what is here, and what each missing thing needs."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d3po_bench import registry
from d3po_bench.cache import home
from d3po_bench.errors import UserError, install
from eval import downloads

"""Small scorers that ship with the project."""

EXTRAS = {
    "open-clip": "open_clip", "feedback": "fastapi", "parquet": "pyarrow", "tune": "optuna",
    "track": "tensorboard", "cluster": "ray", "storage": "obstore",
}  # fmt: skip
"""Extra -> a module that it brings."""


def everything() -> Iterator[tuple[str, dict[str, str]]]:
    """Packages, devices, extras, weights and scorers: title, and what stands below it."""
    yield "python", {platform.python_version(): sys.executable}
    yield "packages", _packages()
    extras = {
        name: "installed" if find_spec(module) else f"not installed: {install(name)}"
        for name, module in EXTRAS.items()
    }
    yield "extras", extras
    yield "device", _devices()
    weights = {"folder": str(home())}
    for name, entry in downloads.known().items():
        state = downloads.state(name)
        need = f" (`d3po-bench weights fetch {name}`)" if state == "absent" else ""
        weights[name] = f"{state}{need}: {entry.summary}"
    yield "weights", weights
    yield "scorers", {name: _scorer(name) for name in checkable()}


def _packages() -> dict[str, str]:
    """What the project needs, without extras, and the versions that are installed."""
    found = {}
    for line in sorted(requires("d3po-bench") or []):
        if "extra ==" not in line:
            name = re.split(r"[\[><=]", line)[0].strip()
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing: pip install -c constraints.txt d3po-bench"
    return found


def _devices() -> dict[str, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{cores} cores"}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    return found


def checkable() -> list[str]:
    """Scorers by name and, where they have any, by weights."""
    from eval.scorers._clip import EMBEDDED, SHIPPED
    from eval.scorers._features import SHIP_WITH_CLIP

    found = []
    for name in registry.names("scorer"):
        if name == "open_clip":
            continue  # its weights are the user's choice
        usual = registry.usual_weights(name)
        if usual is None:
            found.append(name)
        elif usual in SHIPPED:  # it has no others
            found += [f"{name}:{which}" for which in SHIPPED]
        else:
            own = "clip" if name in SHIP_WITH_CLIP else name
            there = [w for w, folder in SHIPPED.items() if (EMBEDDED / folder / own).is_dir()]
            found += [f"{name}:{which}" for which in (*there, "official")]
    return found


def _scorer(name: str) -> str:
    """Whether a scorer loads and gives its golden scores."""
    import torch

    from eval import golden

    try:
        scorer = registry.load_scorer(name, torch.device("cpu"))
        known = golden.check(name, scorer)
    except UserError as problem:
        return str(problem)
    words = (
        "gives its golden scores" if known else "has no golden scores of these weights: --record"
    )
    return f"{words} ({golden.fingerprint(scorer)})"


def record() -> Iterator[str]:
    """Record the golden scores of every scorer that loads here; its line."""
    import torch

    from eval import golden

    for name in checkable():
        try:
            scorer = registry.load_scorer(name, torch.device("cpu"))
        except UserError as problem:
            yield f"{name}: not recorded. {problem}"
            continue
        base, of = name.partition(":")[0], golden.fingerprint(scorer)
        if of in golden.recorded().get(base, {}):
            yield f"{name}: on record for {of}"  # writing it again would hide that it moved
            continue
        golden.record(base, scorer)
        yield f"{name}: recorded for {of}"


def list_weights() -> Iterator[str]:
    """Everything that can be fetched: size, licence, files, state."""
    for name, entry in downloads.known().items():
        size = downloads.readable(entry.size)
        yield f"{name}: {entry.summary}; {size}, {entry.licence}; {downloads.state(name)}"
        for file, (sha256, _) in entry.files.items():
            yield f"  {entry.url(file)}"
            yield f"    sha256 {sha256 or 'not published: kept from the first fetch'}"


def weights() -> dict[str, Any]:
    """The same for programs."""
    return {
        name: {
            "summary": entry.summary, "bytes": entry.size, "licence": entry.licence,
            "state": downloads.state(name),
            "files": {entry.url(file): sha256 for file, (sha256, _) in entry.files.items()},
        }
        for name, entry in downloads.known().items()
    }  # fmt: skip


def fetch(names: Sequence[str]) -> Iterator[Path]:
    """Fetch these weights; the folder of each.

    Raises:
        UserError: an unknown name, no network, or what came is another file.
        RunError: the connection broke; what has come is kept.
    """
    for name in names:
        if name not in downloads.known():
            raise registry.unknown("checkpoint", name, list(downloads.known()))
    yield from map(downloads.fetch, names)
