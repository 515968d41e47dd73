"""`d3po-bench sweep`: methods x objectives x seeds from a TOML grid.

methods = ["d3po", "ddpo"]
objectives = ["incompress", "compress"]
seeds = [0, 1, 2, 3, 4]                # or 5, for seeds 0 to 4
model = "tiny"                         # this is the default
preset = "quick"                       # default: the one made for the model
lora = "style.safetensors"             # where runs begin; default: untrained

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

import contextlib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from d3po_bench import registry
from d3po_bench.config import MOST_SEEDS, RunConfig
from d3po_bench.diffusion import parallel
from d3po_bench.errors import RunError, TryAgainError, UserError, leads
from d3po_bench.launch import launch
from d3po_bench.launch import ranks as processes
from d3po_bench.launch.launch import HERE, RunRequest, Where
from d3po_bench.launch.progress import Board
from d3po_bench.launch.state import State, read_states
from d3po_bench.prompts.tables import read_text
from d3po_bench.rewards import sums
from d3po_bench.training.run import Job
from d3po_bench.training.tools import Tools

# ---- the grid file


def _known(kind: registry.Kind) -> AfterValidator:
    """A name that something of that kind answers to."""

    def check(name: str) -> str:
        text = sums.normal(name) if kind == "objective" else name
        if registry.name_of(kind, text) == text and name not in registry.names(kind):
            raise registry.unknown(kind, name, registry.names(kind))
        return name

    return AfterValidator(check)


def _once(values: list[Any]) -> list[Any]:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return values


def _counted(seeds: Any) -> Any:
    """A number of seeds stands for the first so many."""
    if type(seeds) is not int:
        return seeds
    if not 0 < seeds <= MOST_SEEDS:
        raise ValueError(f"a grid has 1 to {MOST_SEEDS} seeds, not {seeds}")
    return list(range(seeds))


def as_set(value: Any) -> str:
    """A setting as the text that `--set` takes.

    Raises:
        ValueError: it is something that no setting is.
    """
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    if not isinstance(value, str | int | float):
        raise ValueError("a setting is text, a number, true, false, or a list of texts")
    return str(value).lower() if isinstance(value, bool) else str(value)


Settings = dict[str, Annotated[str, BeforeValidator(as_set)]]


class Grid(BaseModel):
    """What a grid file asks for."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    methods: Annotated[
        list[Annotated[str, _known("method")]], Field(min_length=1), AfterValidator(_once)
    ]
    objectives: Annotated[
        list[Annotated[str, _known("objective")]], Field(min_length=1), AfterValidator(_once)
    ]
    seeds: Annotated[
        list[NonNegativeInt], Field(min_length=1), BeforeValidator(_counted), AfterValidator(_once)
    ]
    model: str = "tiny"
    preset: str | None = None
    lora: str | None = None
    settings: Settings = Field(default={}, alias="set")
    method: dict[str, Settings] = {}
    objective: dict[str, Settings] = {}
    cell: dict[str, Settings] = {}
    """By METHOD.OBJECTIVE."""

    @model_validator(mode="after")
    def _refuse_settings_for_nothing(self) -> Grid:
        cells = [f"{m}.{o}" for m, o in product(self.methods, self.objectives)]
        tables = (("method", self.methods), ("objective", self.objectives), ("cell", cells))
        for table, known in tables:
            for name in getattr(self, table):
                if name not in known:
                    raise registry.unknown(f"{table} of this grid", name, known)
        return self

    def settings_of(self, method: str, objective: str) -> dict[str, str]:
        """What `--set` would say for one cell; the more special wins."""
        return {
            **self.settings,
            **self.objective.get(objective, {}),
            **self.method.get(method, {}),
            **self.cell.get(f"{method}.{objective}", {}),
        }


def read(path: Path) -> Grid:
    """The grid in a TOML file.

    Raises:
        UserError: it is not there, not TOML, or not a grid.
    """
    try:
        return Grid.model_validate(tomllib.loads(read_text(path)))
    except OSError as problem:
        raise UserError(
            f"The grid {path} cannot be read: {problem.strerror}. Give the path of a TOML file; "
            "`d3po-bench sweep --help` shows one."
        ) from problem
    except ValidationError as problem:
        fault = problem.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            keys = [f.alias or name for name, f in Grid.model_fields.items()]
            raise registry.unknown("key of a grid", place, keys) from problem
        said = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        said = "it is missing" if fault["type"] == "missing" else said
        raise UserError(
            f"{path}, {place}: {said}. `d3po-bench sweep --help` shows a grid."
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not TOML: {problem}. Correct that place.") from problem


def part(grid: Grid, methods: Sequence[str], objectives: Sequence[str], seeds: int | None) -> Grid:
    """A part of a grid.

    Args:
        grid: all of it.
        methods: of the grid; none for all.
        objectives: likewise.
        seeds: how many, its first ones; None for all.

    Raises:
        UserError: it has none of that name.
    """
    chosen: dict[str, Any] = {"seeds": grid.seeds[:seeds]}
    for name, wanted in (("methods", methods), ("objectives", objectives)):
        known: list[str] = getattr(grid, name)
        for one in wanted:
            if one not in known:
                raise registry.unknown(f"{name[:-1]} of this grid", one, known)
        chosen[name] = [one for one in known if one in (wanted or known)]
    return grid.model_copy(update=chosen)


def other(grid: Grid, model: str | None, settings: Settings) -> Grid:
    """A grid on another model, or with further settings.

    Args:
        grid: of which all else is kept.
        model: None for the grid's own.
        settings: of every run; they win over the grid's.
    """
    cells = [f"{m}.{o}" for m, o in product(grid.methods, grid.objectives)]
    cell = {name: {**grid.cell.get(name, {}), **settings} for name in cells}
    return grid.model_copy(update={"model": model or grid.model, "cell": cell})


# ---- its runs


def run(
    grid: Grid, tools: Tools, *, out: Path, jobs: int | None, device: str, resume: bool,
    ranks: int = 1, track: Sequence[str] = (), board: Board | None = None, where: Where = HERE,
) -> list[Path]:  # fmt: skip
    """Make every run of a grid; finished ones are skipped, failed ones stop no other.

    Returns:
        The folder of each run.

    Raises:
        UserError: bad input, before anything runs.
        RunError: some runs failed, each named; the others have finished.
    """
    found = _requests(grid, tools, out, device, resume)
    requests = [replace(request, track=track, where=where) for request in found]
    launch.require_ranks(ranks, jobs, device, where)
    with _named(requests[0]):
        limit = launch.configured(requests[0])[1].rank_timeout
    processes.join(device, limit)
    work = parallel.together(lambda: _planned(requests))
    with board or Board() as shown:
        failed = launch.execute(work, jobs, shown, ranks, where)
        if failed and all(isinstance(said, TryAgainError) for said in failed.values()):
            launch.require_all(failed)
        for name, said in failed.items() if leads() else ():
            click.echo(f"{name}: {said}", err=True)
        if failed:
            raise RunError(
                f"{len(failed)} of {len(work)} runs failed: {launch.listed([*failed])}. Give the "
                "same command again to repeat those; the others are kept. Where a setting was "
                "wrong, correct the grid and remove the folders of those runs."
            )
    return [job.folder for job in work]


def states(grid: Grid, tools: Tools, out: Path) -> list[State]:
    """Where each run of a grid is, by the folders below `out` alone.

    Raises:
        UserError: bad input.
    """
    return read_states({launch.run_folder(out, c): c for c in configs(grid, tools)})


def _planned(requests: Iterable[RunRequest]) -> list[Job]:
    work: list[Job] = []
    for request in requests:
        with _named(request):
            work += launch.planned(request)
    return work


@contextlib.contextmanager
def _named(request: RunRequest) -> Iterator[None]:
    """Say which run of the grid an error is about."""
    try:
        yield
    except UserError as problem:
        where = f"{request.method} on {request.objective}, seed {request.seeds.start}"
        raise UserError(f"{problem} This is about {where} of the grid.") from problem


def configs(grid: Grid, tools: Tools) -> list[RunConfig]:
    """The config of every run of a grid, wherever it is made.

    Raises:
        UserError: a setting that no run can have.
    """
    requests = _requests(grid, tools, Path(), "cpu", True)
    return [launch.configured(request)[0] for request in requests]


def _requests(
    grid: Grid, tools: Tools, out: Path, device: str, resume: bool
) -> Iterator[RunRequest]:
    """All runs, seed by seed, so that a grid that is cut short is balanced."""
    for seed, objective, method in product(grid.seeds, grid.objectives, grid.methods):
        yield RunRequest(
            method=method, objective=objective, model=grid.model, preset=grid.preset,
            lora=grid.lora, settings=grid.settings_of(method, objective),
            seeds=range(seed, seed + 1), device=device, out=out, tools=tools, resume=resume,
        )  # fmt: skip
