"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class Place(click.Path):
    """A path that is not empty: an unset variable of a shell is not the folder one is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, as pathlib has it."""
        if value == "":
            self.fail("'' is no path. Give one, such as . for the folder you are in.", param, ctx)
        return super().convert(value, param, ctx)


PLACE = Place(path_type=Path)
