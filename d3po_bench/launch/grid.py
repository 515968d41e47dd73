"""`d3po-bench sweep`: methods x objectives x seeds from a TOML grid.

methods = ["d3po", "ddpo"]
objectives = ["incompress", "compress"]
seeds = [0, 1, 2, 3, 4]                # or 5, for seeds 0 to 4
model = "tiny"                         # this is the default
preset = "quick"                       # default: the one made for the model

[set]                                  # as --set, for every cell
eval_images = 2
[method.ddpo]                          # for one method
learning_rate = 1e-3
[objective.compress]                   # for one objective
rounds = 10
[cell."ddpo.compress"]                 # for one method on one objective
clip_range = 0.1
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click

from d3po_bench import registry
from d3po_bench.config import RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch import launch
from d3po_bench.launch.launch import RunRequest
from d3po_bench.training.progress import label
from d3po_bench.training.run import Job
from d3po_bench.training.tools import Tools

Settings = Mapping[str, str]

MOST_SEEDS = 10_000
"""More are a slip: each is a run."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a grid file asks for."""

    methods: list[str]
    objectives: list[str]
    seeds: list[int]
    model: str = "tiny"
    preset: str | None = None
    settings: Mapping[str, Settings] = field(default_factory=dict)
    """Further settings: "" for all cells, "ddpo", "compress", or "ddpo.compress"."""

    def settings_of(self, method: str, objective: str) -> dict[str, str]:
        """What `--set` would say for one cell; the more special wins."""
        names = ("", objective, method, f"{method}.{objective}")
        return {k: v for name in names for k, v in self.settings.get(name, {}).items()}


def run(
    path: Path, tools: Tools, *, out: Path, jobs: int | None, device: str, resume: bool
) -> None:
    """Make every run of the grid at `path`; finished ones are skipped, failed ones stop no other.

    Raises:
        UserError: bad input, before anything runs.
        RunError: some runs failed, each named; the others have finished.
    """
    grid = read(path)
    work = _jobs(grid, tools, out, device, resume)
    names = {label(job.config): label(job.config) for job in work}
    failed = launch.execute(work, jobs, names)
    for name, problem in failed.items():
        click.echo(f"{name}: {problem}", err=True)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(work)} runs failed: {', '.join(failed)}. Give the same command "
            "again to repeat those; the others are kept. Where a setting was wrong, correct the "
            "grid and remove the folders of those runs."
        )
    launch.finish({}, out)


def configs(grid: Grid, tools: Tools) -> list[RunConfig]:
    """The config of every run of a grid, wherever it is made.

    Raises:
        UserError: a setting that no run can have.
    """
    requests = _requests(grid, tools, Path(), "cpu", True)
    return [launch.configured(request)[0] for request in requests]


def _jobs(grid: Grid, tools: Tools, out: Path, device: str, resume: bool) -> list[Job]:
    work: list[Job] = []
    for request in _requests(grid, tools, out, device, resume):
        try:
            work += launch.planned(request)
        except UserError as problem:
            where = f"{request.method} on {request.objective}, seed {request.seeds.start}"
            raise UserError(f"{problem} This is about {where} of the grid.") from problem
    return work


def _requests(
    grid: Grid, tools: Tools, out: Path, device: str, resume: bool
) -> Iterator[RunRequest]:
    """All runs, seed by seed, so that a grid that is cut short is balanced."""
    for seed, objective, method in product(grid.seeds, grid.objectives, grid.methods):
        yield RunRequest(
            method=method, objective=objective, model=grid.model, preset=grid.preset,
            settings=grid.settings_of(method, objective), seeds=range(seed, seed + 1),
            device=device, out=out, tools=tools, resume=resume,
        )  # fmt: skip


# ---- the grid file


def read(path: Path) -> Grid:
    """The grid in a TOML file.

    Raises:
        UserError: it is not there, not TOML, or not a grid.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise UserError(
            f"Expected a grid file, got {path}: {problem.strerror}. Give the path of a TOML file; "
            "`d3po-bench sweep --help` shows one."
        ) from problem
    except (ValueError, RecursionError) as problem:  # no UTF-8, or no TOML
        raise UserError(
            f"Expected TOML in {path}, got something else: {problem}. Correct that place."
        ) from problem
    return _grid(found)


_KEYS = ("methods", "objectives", "seeds", "model", "preset", "set", "method", "objective", "cell")


def _grid(found: dict[str, Any]) -> Grid:
    for key in found:
        if key not in _KEYS:
            raise registry.unknown("grid key", key, _KEYS)
    methods = _names(found, "methods", "method")
    objectives = _names(found, "objectives", "objective")
    settings = {"": _settings(found.get("set", {}), "set")}
    cells = [f"{m}.{o}" for m, o in product(methods, objectives)]
    for table, known in (("method", methods), ("objective", objectives), ("cell", cells)):
        sections = found.get(table, {})
        _want(isinstance(sections, dict), f"[{table}.NAME] sections", f"{table} = {sections!r}")
        for name, values in sections.items():
            if name not in known:
                raise registry.unknown(f"{table} of the grid in [{table}.{name}]", name, known)
            settings[name] = _settings(values, f"{table}.{name}")
    for key in ("model", "preset"):
        text = found.get(key, "")
        _want(isinstance(text, str), f"a name in quotes for {key}", repr(text))
    return Grid(
        methods=methods, objectives=objectives, seeds=_seeds(found), settings=settings,
        model=found.get("model", "tiny"), preset=found.get("preset"),
    )  # fmt: skip


def _want(fine: bool, expected: str, got: str) -> None:
    if not fine:
        raise UserError(f"Expected {expected}, got {got}. Change it in the grid file.")


def _names(found: Mapping[str, Any], key: str, kind: registry.Kind) -> list[str]:
    """The methods or objectives of a grid, all known and no two alike."""
    names = found.get(key)
    fine = isinstance(names, list) and names and all(isinstance(n, str) for n in names)
    if not fine or not isinstance(names, list):
        raise UserError(
            f'Expected a list of names for {key}, got {names!r}. Write {key} = ["..."] into the '
            "grid file."
        )
    for name in names:
        if name not in registry.names(kind):
            raise registry.unknown(kind, name, registry.names(kind))
    _once(names, key)
    return names


def _seeds(found: Mapping[str, Any]) -> list[int]:
    seeds = found.get("seeds")
    if type(seeds) is int and 0 < seeds <= MOST_SEEDS:
        return list(range(seeds))
    fine = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    if not fine or not isinstance(seeds, list):
        raise UserError(
            f"Expected a number of seeds up to {MOST_SEEDS} or a list of seeds from 0 up, got "
            f"{seeds!r}. Write seeds = 5 or seeds = [0, 1, 2] into the grid file."
        )
    _once(seeds, "seeds")
    return seeds


def _once(values: list[Any], key: str) -> None:
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    _want(not twice, f"each of {key} once", f"{twice[0]!r} twice" if twice else "")


def _settings(values: object, where: str) -> dict[str, str]:
    """A table of settings as the text that `--set` takes."""
    if not isinstance(values, dict):
        raise UserError(
            f"Expected settings in [{where}], got {values!r}. Write KEY = VALUE lines below it."
        )
    return {key: _text(value, key) for key, value in values.items()}


def _text(value: object, key: str) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    simple = isinstance(value, str | int | float)
    _want(simple, f"text, a number, true or false for {key}", repr(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
