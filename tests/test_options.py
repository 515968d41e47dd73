"""Command lines that cannot be: each ends in one line, exit 2 or 1, and writes nothing."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest

from d3po_bench import config, registry
from d3po_bench.cli import cli
from tests.commands import Command, files, refused

SEED = 20231122
D3PO = "run --method d3po --objective incompress"


def leaves(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that is no group, by the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


def needed(parameter: click.Parameter) -> list[str]:
    """What stands for a required parameter."""
    known = {"method": "d3po", "methods": "d3po", "objective": "incompress", "seeds": "901"}
    choices = getattr(parameter.type, "choices", ["nowhere"])
    value = known.get(parameter.name or "", choices[0])
    return [value] if isinstance(parameter, click.Argument) else [parameter.opts[0], value]


def wrong_values(option: click.Parameter) -> list[str]:
    """Values that a numeric option, a choice or a path must refuse."""
    if isinstance(option.type, click.IntRange):
        return ["", "two", "1.5", "-1", "9" * 30, *(["0"] if option.type.min == 1 else [])]
    if isinstance(option.type, click.FloatRange):
        return ["", "many", "-1", "nan", "inf"]
    if isinstance(option.type, click.Path) and isinstance(option, click.Option):
        return [""]
    return ["nonsense", ""] if isinstance(option.type, click.Choice) else []


LEAVES = {" ".join(words): called for words, called in leaves(cli)}


@pytest.mark.parametrize("name", LEAVES)
def test_wrong_options_are_refused(name: str, command: Command) -> None:
    words, called = name.split(), LEAVES[name]
    required = [needed(parameter) for parameter in called.params if parameter.required]
    start = [*words, *[part for parts in required for part in parts]]
    refused(command(*start, "--nonsense"), "No option is called '--nonsense'")
    if required:
        refused(command(*words), "Missing")
    for option in called.params:
        for value in wrong_values(option):
            refused(command(*start, option.opts[0], value), option.opts[0].lstrip("-"))
    assert files(Path()) == set()


def wrong_settings(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return ["nonsense", "", str(get_args(kind)[0]).upper() + "!"]
    numbers = ["", "x", "-1", "9" * 400]
    return {
        bool: ["", "maybe", "2"], int: [*numbers, "1.5", "1e3"], float: [*numbers, "nan", "inf"]
    }.get(kind, [])  # fmt: skip


@pytest.mark.parametrize(
    "method", [n for n in registry.names("method") if not registry.variant(n)[1]]
)
def test_settings_of_another_type_or_out_of_range_are_refused(
    method: str, command: Command
) -> None:
    rng, kinds = random.Random(SEED), config.settings(method)
    shared = kinds["run"] | kinds["execution"] if method == "d3po" else {}
    for key, kind in {**kinds["options"], **shared}.items():
        wrong = wrong_settings(kind)
        for value in rng.sample(wrong, min(2, len(wrong))):
            said = f"run --method {method} --objective incompress --set".split()
            refused(command(*said, f"{key}={value}"), key)
    assert files(Path()) == set()


SAID = (
    "rum", "run run", "weights steal", "feedback nothing", "run --method", "'' --help me",
    f"{D3PO} --set =", f"{D3PO} --set =1", f"{D3PO} --set learning_rate",
    f"{D3PO} --set model=sd15", f"{D3PO} --set rounds=1 --set rounds=2",
    f"{D3PO} --rounds 5 --set rounds=3",
    f"{D3PO} --set options=1", f"{D3PO} --set prompts=nowhere.txt", f"{D3PO} --set eval_scorers=x",
    f"{D3PO} --set skip_steps=500", f"{D3PO} --model ''",
    f"{D3PO} --set images_per_prompt=1", f"{D3PO} --model /", f"{D3PO} --model a/b/c",
    f"{D3PO} --device nonsense", f"{D3PO} --device cuda:99", f"{D3PO} --device ''",
    f"{D3PO} --preset ''", f"{D3PO} --seeds 1000000000", f"{D3PO} --track nonsense",
    f"{D3PO} --seed-start 99999999999999999999", "run --method '' --objective incompress",
    "run --method ../d3po --objective incompress", "run --method d3po --objective ../prompts",
    "list --settings --method nonsense", "weights fetch nonsense", "plot nowhere elsewhere",
    "plot ''", "evaluate nowhere", "evaluate tiny --scorers nonsense",
    "evaluate tiny --scorers jpeg_size:7", "evaluate tiny --guidance nan",
    "evaluate tiny --prompts nowhere.txt",
    "evaluate tiny --scorers clip:nowhere", "evaluate ''", "table1 nowhere",
    "table1 --redraw --out nowhere", "table1 --scorers nonsense --count 1 nowhere",
    "table1 --objective nonsense", "feedback choices nowhere --out x.csv", "feedback choices ''",
    "verify nowhere", "verify nowhere --record", "verify ''",
    "sweep nowhere.toml", "sweep .", "sweep ''", "show ''", "table1 ''", "plot . ''",
    f"{D3PO} --lora nowhere", f"{D3PO} --lora .", f"{D3PO} --set lora=x",
    "export nowhere --format kohya --out x.safetensors", "export . --format kohya --out x",
)  # fmt: skip
"""Command lines that a person may type; nothing lies in the folder."""

ODD = ("\udcff", "a\nb", "x" * 5000, "\x1b[31m", "caf\u00e9\u202e")
"""Characters that no name has."""


def test_what_people_mistype_is_refused(command: Command) -> None:
    lines = [shlex.split(said) for said in SAID]
    lines += [[*D3PO.split(), "--model", odd] for odd in ODD] + [["plot", odd] for odd in ODD]
    lines += [[*D3PO.split(), "--lora", odd] for odd in ODD]
    for line in lines:
        done = command(*line)
        assert done.code in (1, 2), line
        errors = [ln for ln in done.err.splitlines() if ln.startswith("error: ")]
        assert len(errors) == 1, (line, done)
        assert "Traceback" not in done.out + done.err
        assert files(Path()) == set(), line
