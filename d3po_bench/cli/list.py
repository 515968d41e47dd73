"""What `d3po-bench list` prints."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

import click

from d3po_bench import config, prompts, registry
from d3po_bench.cli.options import Answering, Result
from d3po_bench.config import Execution, RunConfig
from d3po_bench.presets import PRESET_SUMMARIES
from d3po_bench.prompts import read_prompts

Sections = Iterator[tuple[str, dict[str, str]]]
"""Titles, and what stands below each."""


def everything() -> Sections:
    """Methods, objectives, scorers, models, trackers, places, presets and prompt lists."""
    kinds: tuple[registry.Kind, ...] = (
        "method", "objective", "scorer", "model", "tracker", "place",
    )  # fmt: skip
    for kind in kinds:
        yield kind + "s", {n: registry.summary(kind, n) for n in registry.names(kind)}
    yield "presets", PRESET_SUMMARIES
    counts = {name: len(read_prompts(name)) for name in prompts.names()}
    yield "prompts", {n: f"{k} prompt{'s' * (k > 1)}" for n, k in counts.items()}


def settings_of(method: str) -> Sections:
    """What --set can change, with default, choices and meaning."""
    known, (_, own) = config.settings(method), registry.variant(method)
    groups: tuple[tuple[str, str, Any], ...] = (
        ("run", "run (a preset changes some)", RunConfig),
        ("execution", "execution", Execution),
        ("options", f"{method} options", registry.method(method)),
    )
    for group, title, kind in groups:
        docs, told = _field_docs(kind), {}
        types = known[group]
        for field in (f for f in fields(kind) if f.name in types):
            default = "" if field.default is MISSING else field.default
            default = own.get(field.name, default)
            shown = ",".join(default) if isinstance(default, tuple) else str(default)
            literal = get_origin(types[field.name]) is Literal
            choices = " or ".join(map(str, get_args(types[field.name]))) if literal else ""
            said = filter(None, (choices, docs.get(field.name)))
            told[f"{field.name}={shown}"] = ". ".join(said)
        yield title, told


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    pattern = r'^    (\w+): [^\n]*\n    """(.*?)"""'
    found = re.findall(pattern, inspect.getsource(kind), re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


@click.command(name="list", cls=Answering)
@click.option("--settings", is_flag=True, help="List what --set can change instead.")
@click.option("--method", default="d3po", show_default=True, help="Whose options to list.")
def list_(settings: bool, method: str) -> Result:
    """List methods, objectives, scorers, models, trackers, places, presets and prompt lists.

    \b
    Example:
        d3po-bench list
        d3po-bench list --settings --method d3po
    """  # noqa: D301
    return Result.of_sections(settings_of(method) if settings else everything())
