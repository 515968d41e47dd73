"""What `d3po-bench list` prints."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin

import click

from d3po_bench import config, prompts, registry
from d3po_bench.config import Execution, RunConfig
from d3po_bench.presets import PRESET_SUMMARIES
from d3po_bench.prompts import read_prompts
from d3po_bench.text import section


def everything() -> Iterator[str]:
    """Methods, objectives, scorers, models, presets and prompt lists, a line each."""
    kinds: tuple[registry.Kind, ...] = ("method", "objective", "scorer", "model")
    for kind in kinds:
        yield from section(kind + "s", {n: registry.summary(kind, n) for n in registry.names(kind)})
    yield from section("presets", PRESET_SUMMARIES)
    yield from section("prompts", {n: _count(n) for n in prompts.names()})


def _count(name: str) -> str:
    number = len(read_prompts(name))
    return f"{number} prompt{'s' * (number > 1)}"


def settings_of(method: str) -> Iterator[str]:
    """What --set can change, with default, choices and meaning."""
    known = config.settings(method)
    groups: tuple[tuple[str, str, Any], ...] = (
        ("run", "run (a preset changes some)", RunConfig),
        ("execution", "execution", Execution),
        ("options", f"{method} options", registry.method(method)),
    )
    for group, title, kind in groups:
        docs, types = _field_docs(kind), known[group]
        shown = [f for f in fields(kind) if f.name in types]
        yield from section(
            title, {f"{f.name}={_default(f)}": _meaning(types[f.name], docs, f) for f in shown}
        )


def _meaning(kind: Any, docs: dict[str, str], field: Field[Any]) -> str:
    choices = " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    return ". ".join(filter(None, (choices, docs.get(field.name))))


def _default(field: Field[Any]) -> str:
    value = "" if field.default is MISSING else field.default
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    pattern = r'^    (\w+): [^\n]*\n    """(.*?)"""'
    found = re.findall(pattern, inspect.getsource(kind), re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


@click.command(name="list")
@click.option("--settings", is_flag=True, help="List what --set can change instead.")
@click.option("--method", default="d3po", show_default=True, help="Whose options to list.")
def list_(settings: bool, method: str) -> None:
    """List methods, objectives, scorers, models, presets and prompt lists.

    \b
    Example:
        d3po-bench list
        d3po-bench list --settings --method d3po
    """  # noqa: D301
    for line in settings_of(method) if settings else everything():
        click.echo(line)
