"""Options and values that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click

from d3po_bench.errors import UserError, leads
from d3po_bench.text import section

MOST_JOBS = 1024


class Range(click.FloatRange):
    """A range that does not hold nan, which no comparison puts outside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not in the range {self.min}<=x<={self.max}.", param, ctx)
        return found


class Place(click.Path):
    """A path that is not empty: an unset variable of a shell is not the folder one is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, as pathlib has it."""
        if value == "":
            self.fail("it is empty. Give a path, such as . for the folder you are in.", param, ctx)
        if isinstance(value, str) and "://" in value:
            value = self.elsewhere(value, param, ctx)
        return super().convert(value, param, ctx)

    def elsewhere(
        self, address: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """What stands for something in object storage."""
        self.fail(f"{address} is not on this machine. Give a path.", param, ctx)


class Runs(Place):
    """Run folders, to be read: of those in object storage, a copy."""

    def elsewhere(
        self, address: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """A folder with the copy."""
        from d3po_bench.runs.remote import copy

        return str(copy(address))


class Out(Place):
    """Where runs are to lie, on this machine or in object storage."""

    def elsewhere(
        self, address: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """The folder in which they are worked on."""
        from d3po_bench.runs.remote import workplace

        return str(workplace(address))


PLACE = Place(path_type=Path)
RUNS = Runs(path_type=Path)
PROMPTS = Place()
"""A list, or a file of prompts."""


def scorer_names(text: str) -> tuple[str, ...]:
    """Names of scorers with commas between them, at least one."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise UserError(
            f"{ascii(text)[:80]} names no scorer. Give one or more, such as --scorers "
            "jpeg_size,clip; `d3po-bench list` names them."
        )
    return found


TRACK = click.option(
    "--track", multiple=True, metavar="TRACKER",
    help="Also show the run live in tensorboard or wandb: metrics, held-out scores, pictures; "
    "repeatable.",
)  # fmt: skip


# ---- results


@dataclass(frozen=True)
class Result:
    """What a command found: for people, and as JSON."""

    lines: Iterable[str]
    """Printed one by one, as they come."""
    data: Any
    """The same for programs, or a function that makes it, called if it is wanted."""
    hints: Iterable[str] = ()
    """What to do next, for people, on stderr."""
    end: Callable[[], object] = lambda: None
    """Called when all is printed: it may raise, or exit with a status."""

    @classmethod
    def of_paths(cls, paths: Iterable[Path]) -> Self:
        """Of files or folders that were written; used once, as they come."""
        return cls(map(str, paths), lambda: list(paths))

    @classmethod
    def of_sections(cls, pairs: Iterable[tuple[str, Mapping[str, str]]]) -> Self:
        """Of titles and what stands below each; used once, as they come."""
        lines = (line for title, rows in pairs for line in section(title, dict(rows)))
        return cls(lines, lambda: dict(pairs))


class Answering(click.Command):
    """A command whose function returns a `Result`, which is printed as text or with --json."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print the result as JSON, and only that."
            )
        )

    def invoke(self, ctx: click.Context) -> None:
        """Call it and print what it found."""
        as_json = ctx.params.pop("as_json")
        result: Result = super().invoke(ctx)
        if leads():
            self._print(ctx, result, as_json)
        result.end()

    def _print(self, ctx: click.Context, result: Result, as_json: bool) -> None:
        if as_json:
            click.echo(json.dumps(_plain(result.data), indent=1, allow_nan=False))
        else:
            for line in result.lines:
                click.echo(line)
        for hint in result.hints:
            self.hint(ctx, hint)

    def hint(self, ctx: click.Context, text: str) -> None:
        """Tell people what to do next."""
        click.echo(text, err=True)


class Working(Answering):
    """One that takes time: its function gets a `board` to show its progress on; -q and -v."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["-q", "--quiet"], is_flag=True, help="Only errors, and the result at the end."
            ),
            click.Option(
                ["-v", "--verbose"], is_flag=True, help="Also each stage, and the seconds it took."
            ),
        ]

    def invoke(self, ctx: click.Context) -> None:
        """Call it with a board."""
        from d3po_bench.launch.progress import Board, Level

        quiet, verbose = ctx.params.pop("quiet"), ctx.params.pop("verbose")
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose contradict each other: leave one out.")
        level = Level.QUIET if quiet else Level.VERBOSE if verbose else Level.NORMAL
        ctx.params["board"] = Board(level)
        super().invoke(ctx)

    def hint(self, ctx: click.Context, text: str) -> None:
        """Tell people, unless they want to hear nothing."""
        ctx.params["board"].say(text)


def _plain(value: Any) -> Any:
    """A value as JSON has it: no function, NaN or path."""
    if callable(value):
        return _plain(value())
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


class Commands(click.Group):
    """A group whose unknown command gets a suggestion, and whose order is that of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they were added."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that the arguments name."""
        from d3po_bench.registry import unknown

        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise unknown("command", args[0], list(self.commands))
        return super().resolve_command(ctx, args)
