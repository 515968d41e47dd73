"""Options and values that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from d3po_bench.errors import UserError

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
        return super().convert(value, param, ctx)


PLACE = Place(path_type=Path)
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
