"""More than 200 malformed inputs, for `test_malformed.py`: files and command lines as data.

A case begins with a copy of something whole (a folder of `Bases`), changes some of its files, and
calls the command line. The lists are written out or derived from the command line and from whole
files; where there are too many, a seeded draw picks some.
"""

from __future__ import annotations

import json
import random
import shlex
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from d3po_bench import config
from d3po_bench.cli import cli

Change = Callable[[bytes], bytes | None]
"""The whole file's bytes (none for a new file) -> the malformed ones; None removes the file."""

Base = Literal["nothing", "run", "half", "lora", "model", "results", "table1", "pictures", "round"]
"""What a case begins with. half: a run that can go on; run: a published one."""

RUN = "tiny/incompress/d3po/seed-0"
"""Where the run of the bases run and results lies, below runs/ and results/."""

SEED = 20231122


@dataclass(frozen=True)
class Case:
    """One malformed input and the command that reads it."""

    name: str
    command: tuple[str, ...]
    """Arguments; {model} stands for the folder of a whole small pipeline."""
    base: Base = "nothing"
    files: Mapping[str, Change] = field(default_factory=dict)
    """Path below the case's folder -> how it differs from the base."""


# ---- ways to break a file


def holds(data: str | bytes) -> Change:
    """Other content."""
    return lambda whole: data.encode() if isinstance(data, str) else data


def gone(whole: bytes) -> None:
    """No such file."""


def cut(share: float) -> Change:
    """Only its first part."""
    return lambda whole: whole[: int(len(whole) * share)]


def edited(**values: Any) -> Change:
    """A JSON object with some values changed; `...` removes a key."""

    def change(whole: bytes) -> bytes:
        found = {**json.loads(whole), **values}
        return json.dumps({k: v for k, v in found.items() if v is not ...}).encode()

    return change


def line(number: int, text: str) -> Change:
    """Another line in place of one."""

    def change(whole: bytes) -> bytes:
        lines = whole.decode().splitlines()
        lines[number] = text
        return ("\n".join(lines) + "\n").encode()

    return change


def inside(number: int, **values: Any) -> Change:
    """Other values in the JSON object of one line; inf is written as 1e999."""

    def change(whole: bytes) -> bytes:
        lines = whole.decode().splitlines()
        lines[number] = json.dumps({**json.loads(lines[number]), **values})
        return ("\n".join(lines) + "\n").replace("Infinity", "1e999").encode()

    return change


def column(name: str, value: str, row: int = -1) -> Change:
    """Another value in one row of a table."""

    def change(whole: bytes) -> bytes:
        head, *rows = [ln.split(",") for ln in whole.decode().splitlines()]
        rows[row][head.index(name)] = value
        return ("\n".join(map(",".join, [head, *rows])) + "\n").encode()

    return change


def without(name: str) -> Change:
    """A table that lacks a column."""

    def change(whole: bytes) -> bytes:
        rows = [ln.split(",") for ln in whole.decode().splitlines()]
        at = rows[0].index(name)
        return ("\n".join(",".join(r[:at] + r[at + 1 :]) for r in rows) + "\n").encode()

    return change


BROKEN: dict[str, Change] = {
    "empty": holds(""),
    "half": cut(0.5),
    "binary": holds(bytes(range(256))),
    "another encoding": holds("é".encode("latin-1") * 20),
    "a list": holds("[]"),
    "a number": holds("7"),
    "null": holds("null"),
    "deep": holds("[" * 100_000),
    "huge number": holds("9" * 5000),
}
"""Ways to break any JSON file."""


# ---- options


def options() -> Iterator[Case]:
    """Every command: an unknown option, a missing argument, and values out of range."""
    for path, command in _commands(cli, ()):
        needed = [_valid(p) for p in command.params if p.required]
        start = [*path, *[part for parts in needed for part in parts]]
        yield _typed(f"{' '.join(path)} --nonsense", [*start, "--nonsense"])
        if needed:
            yield _typed(f"{' '.join(path)} without its input", path)
        for option in command.params:
            for value in _wrong(option):
                said = f"{' '.join(path)} {option.opts[0]} {value!r}"
                yield _typed(said, [*start, option.opts[0], value])


def _typed(name: str, arguments: Iterable[str]) -> Case:
    return Case(name, tuple(arguments))


def _commands(
    group: click.Group, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _valid(parameter: click.Parameter) -> list[str]:
    """What stands for a required parameter."""
    known = {"method": "d3po", "objective": "incompress"}
    value = known.get(parameter.name or "", "nowhere")
    return [value] if isinstance(parameter, click.Argument) else [parameter.opts[0], value]


def _wrong(option: click.Parameter) -> list[str]:
    """Values that a numeric option, a choice or a path must refuse."""
    if isinstance(option.type, click.IntRange):
        return ["", "two", "1.5", "-1", "9" * 30, *(["0"] if option.type.min == 1 else [])]
    if isinstance(option.type, click.FloatRange):
        return ["", "many", "-1", "nan", "inf"]
    if isinstance(option.type, click.Path) and isinstance(option, click.Option):
        return [""]
    return ["nonsense", ""] if isinstance(option.type, click.Choice) else []


D3PO = "run --method d3po --objective incompress"


def settings() -> Iterator[Case]:
    """Every setting of every method, with a value of another type or out of range."""
    rng = random.Random(SEED)
    for method in ("d3po", "ddpo", "dpok", "reward_weighted", "preferred_images"):
        kinds = config.settings(method)
        known = {
            **kinds["options"],
            **(kinds["run"] | kinds["execution"] if method == "d3po" else {}),
        }
        for key, kind in known.items():
            wrong = _wrong_settings(kind)
            for value in rng.sample(wrong, min(2, len(wrong))):
                start = f"run --method {method} --objective incompress --set".split()
                yield _typed(f"{method} --set {key}={value[:12]}", [*start, f"{key}={value}"])


def _wrong_settings(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return ["nonsense", "", str(get_args(kind)[0]).upper() + "!"]
    numbers = ["", "x", "-1", "9" * 400]
    return {
        bool: ["", "maybe", "2"], int: [*numbers, "1.5", "1e3"], float: [*numbers, "nan", "inf"]
    }.get(kind, [])  # fmt: skip


SAID = (
    "rum", "run run", "weights steal", "feedback nothing", "run --method", "'' --help me",
    f"{D3PO} --set =", f"{D3PO} --set =1", f"{D3PO} --set learning_rate",
    f"{D3PO} --set model=sd15", f"{D3PO} --set rounds=1 --set rounds=2",
    f"{D3PO} --set options=1", f"{D3PO} --set prompts=nowhere.txt", f"{D3PO} --set eval_scorers=x",
    f"{D3PO} --set lora_targets=", f"{D3PO} --set skip_steps=500", f"{D3PO} --model ''",
    f"{D3PO} --set images_per_prompt=1", f"{D3PO} --model /", f"{D3PO} --model a/b/c",
    f"{D3PO} --device nonsense", f"{D3PO} --device cuda:99", f"{D3PO} --device ''",
    f"{D3PO} --preset ''", f"{D3PO} --seeds 1000000000",
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
)  # fmt: skip
"""Command lines that a person may type; nothing lies in the folder."""


def lines() -> Iterator[Case]:
    """The command lines of `SAID`, and characters that no name has."""
    for said in SAID:
        yield _typed(said, shlex.split(said))
    for odd in ("\udcff", "a\nb", "x" * 5000, "\x1b[31m", "caf\u00e9\u202e"):
        yield _typed(f"--model {odd[:9]!a}", [*D3PO.split(), "--model", odd])
        yield _typed(f"plot {odd[:9]!a}", ["plot", odd])


# ---- grids

GRID = 'methods = ["d3po"]\nobjectives = ["incompress"]\nseeds = 2\n'

GRIDS = {
    "no TOML": "methods = [",
    "nothing": "",
    "no methods": 'objectives = ["incompress"]\nseeds = 2',
    "no objectives": 'methods = ["d3po"]\nseeds = 2',
    "no seeds": 'methods = ["d3po"]\nobjectives = ["incompress"]',
    "methods of text": GRID.replace('["d3po"]', '"d3po"'),
    "methods of nothing": GRID.replace('["d3po"]', "[]"),
    "methods of numbers": GRID.replace('["d3po"]', "[1]"),
    "unknown method": GRID.replace("d3po", "d3p"),
    "method twice": GRID.replace('["d3po"]', '["d3po", "d3po"]'),
    "unknown objective": GRID.replace("incompress", "nonsense"),
    "seeds of text": GRID.replace("= 2", '= "2"'),
    "seeds zero": GRID.replace("= 2", "= 0"),
    "seeds below zero": GRID.replace("= 2", "= [0, -1]"),
    "seeds true": GRID.replace("= 2", "= true"),
    "seeds twice": GRID.replace("= 2", "= [1, 1]"),
    "seeds of halves": GRID.replace("= 2", "= [0.5]"),
    "seeds without end": GRID.replace("= 2", "= 1000000000000"),
    "seeds too large": GRID.replace("= 2", "= [99999999999]"),
    "unknown key": GRID + "metods = 1",
    "unknown setting": GRID + "[set]\nlerning_rate = 1",
    "setting of a table": GRID + "[set]\nlearning_rate = {a = 1}",
    "setting of a date": GRID + "[set]\nlearning_rate = 2026-01-01",
    "setting of nan": GRID + "[set]\nlearning_rate = nan",
    "setting below range": GRID + "[set]\nrounds = 0",
    "settings of a number": GRID + "set = 3",
    "cells of a number": GRID + "cell = 3",
    "method of another": GRID + "[method.ddpo]\nclip_range = 0.1",
    "objective of another": GRID + "[objective.compress]\nrounds = 1",
    "cell of another": GRID + '[cell."ddpo.incompress"]\nrounds = 1',
    "cell without quotes": GRID + "[cell.d3po.incompress]\nrounds = 1",
    "model of a number": GRID + "model = 3",
    "unknown model": GRID + 'model = "tinny"',
    "model of a null byte": GRID + 'model = "a\\u0000b"',
    "prompts of a null byte": GRID + '[set]\nprompts = "a\\u0000b"',
    "unknown preset": GRID + 'preset = "quik"',
    "preset of a list": GRID + 'preset = ["quick"]',
    "a key twice": GRID + "seeds = 3",
    "deep": "a = " + "[" * 5000,
}


def grids() -> Iterator[Case]:
    """The grid files of `GRIDS`, and files that hold no text."""
    for name, text in GRIDS.items():
        yield Case(f"grid: {name}", ("sweep", "grid.toml"), files={"grid.toml": holds(text)})
    for name in ("binary", "another encoding"):
        yield Case(f"grid: {name}", ("sweep", "grid.toml"), files={"grid.toml": BROKEN[name]})


# ---- prompts

PROMPTS: dict[str, Change] = {
    "empty": holds(""),
    "blank lines": holds("\n \n\t\n"),
    "latin-1": holds(b"caf\xe9\n"),
    "utf-16": holds("cat".encode("utf-16")),
    "binary": holds(bytes(range(256))),
    "only a byte-order mark": holds("\ufeff"),
    "a null byte": holds("cat\nd\0g\n"),
    "an escape sequence": holds("cat\n\x1b[31mdog\n"),
    "a form feed": holds("cat\x0cdog\n"),
    "a unit separator": holds("\x1fcat\n"),
    "too many tokens": holds("cat\n" + "a " * 15),
}


def prompts() -> Iterator[Case]:
    """Prompt files that a run and an evaluation must refuse."""
    wanted = {
        "run": "run --method d3po --objective incompress --model {model} --preset official_code "
        "--device cpu --set dtype=fp32 --set prompts=list.txt",
        "evaluate": "evaluate {model} --scorers jpeg_size --device cpu --prompts list.txt",
    }
    for name, change in PROMPTS.items():
        for command, said in wanted.items():
            files = {"list.txt": change}
            yield Case(f"prompts of {command}: {name}", tuple(said.split()), files=files)


# ---- run folders

GO_ON = ("again",)
"""Stands for the command that the base `half` was made with."""

NEWER = {"packages": {"d3po-bench": "99.0"}}

CONFIGS: dict[str, Change] = {
    "seed of text": edited(seed="0"),
    "seed of a half": edited(seed=0.5),
    "seed below zero": edited(seed=-1),
    "seed of true": edited(seed=True),
    "method of a number": edited(method=3),
    "objective of a list": edited(objective=["incompress"]),
    "no model": edited(model=...),
    "options of a list": edited(options=[1]),
    "rounds of text": edited(rounds="12"),
    "a newer setting": edited(momentum=0.9),
}
"""Configs that no reader of run folders may take."""


def configs() -> Iterator[Case]:
    """config.json of a run, read by every command that reads runs."""
    place = f"runs/{RUN}"
    for name, change in {**BROKEN, **CONFIGS}.items():
        files = {f"{place}/config.json": change}
        for command in ("plot runs", f"show {place}", f"evaluate {place}"):
            yield Case(
                f"config, {command.split()[0]}: {name}", tuple(command.split()), "run", files
            )
    for name, change in {**BROKEN, "no run_id": edited(run_id=...)}.items():
        yield Case(f"config, run: {name}", GO_ON, "half", {"{half}/config.json": change})
    others: dict[str, Any] = {"a list": [], "nothing": None, "text": "x"}
    for name, value in others.items():
        files = {"{half}/provenance.json": edited(inputs=value)}
        yield Case(f"inputs, run: {name}", GO_ON, "half", files)


FACTS: dict[str, Change] = {
    **BROKEN,
    "a newer version": edited(**NEWER),
    "packages of a list": edited(packages=[]),
    "content of a list": edited(content=[]),
    "sessions of text": edited(sessions="two"),
    "no sessions in a list": edited(sessions=[]),
    "a session of a number": edited(sessions=[3]),
}

METRICS: dict[str, Change] = {
    "half": cut(0.499),
    "a line of text": line(1, "nonsense"),
    "a line of a list": line(1, "[]"),
    "a line of a number": line(1, "4"),
    "an empty line": line(1, ""),
    "no round": line(1, '{"pairs": 3, "images": 4}'),
    "round of text": line(1, '{"round": "two", "pairs": 3, "images": 4}'),
    "pairs of text": line(1, '{"round": 2, "pairs": "many", "images": 4}'),
    "no pairs": line(1, '{"round": 2, "images": 4}'),
    "pairs of nan": inside(1, pairs=float("nan")),
    "pairs without end": inside(-1, pairs=float("inf")),
    "pairs below zero": inside(0, pairs=-1),
    "pairs of true": inside(0, pairs=True),
    "pairs of digits in quotes": inside(0, pairs="32"),
    "pairs of 400 digits": inside(-1, pairs=10**400),
    "pairs that go back": inside(-1, pairs=1),
    "images of nan": inside(1, images=float("nan")),
    "passes below zero": inside(0, unet_forwards=-1),
    "a round twice": inside(1, round=1),
    "a round left out": inside(-1, round=99),
    "round zero": inside(0, round=0),
    "binary": holds(bytes(range(256))),
    "deep": holds("[" * 100_000),
}

TIMES: dict[str, Change] = {
    "nan": inside(1, sample=float("nan")),
    "without end": inside(1, sample=float("inf")),
    "below zero": inside(1, sample=-1.5),
    "text": inside(1, sample="1"),
    "true": inside(1, sample=True),
    "a round twice": inside(1, round=1),
}


def doubled(whole: bytes) -> bytes:
    """Every row of a table twice."""
    head, *rows = whole.splitlines(keepends=True)
    return head + b"".join(row * 2 for row in rows)


ROWS: dict[str, Change] = {
    "half": cut(0.497),
    "empty": holds(""),
    "only a head": holds("round,sampler,prompt,index,score\n"),
    "binary": holds(bytes(range(256))),
    "no round": without("round"),
    "no sampler": without("sampler"),
    "no prompt": without("prompt"),
    "no score": without("score"),
    "score of text": column("score", "much"),
    "score of inf": column("score", "inf"),
    "round of text": column("round", "last"),
    "round of a half": column("round", "3.5"),
    "unknown sampler": column("sampler", "eta7"),
    "too few fields": line(-1, "12,eta0"),
    "too many fields": line(-1, "12,eta0,cat,0,1.0,1.0,1.0,1.0,1.0"),
    "an open quote": line(-1, '12,eta0,"cat,0,1.0,1.0,'),
    "a null byte": line(-1, "12,eta0,c\0t,0,1.0,1.0,"),
    "round below zero": column("round", "-1"),
    "index of a half": column("index", "0.5"),
    "index below zero": column("index", "-1"),
    "another measure of text": column("animal", "much"),
    "another measure of inf": column("animal", "-inf"),
    "a row in place of another": lambda whole: b"".join(
        [*whole.splitlines(keepends=True)[:-1], whole.splitlines(keepends=True)[-2]]
    ),
    "every row twice": doubled,
    "a row short": lambda whole: b"\n".join(whole.splitlines()[:-1]) + b"\n",
}


def run_folders() -> Iterator[Case]:
    """Files of runs that are missing, cut, or hold something else."""
    place = f"runs/{RUN}"
    for name, change in METRICS.items():
        files = {f"{place}/metrics.jsonl": change}
        yield Case(f"metrics, plot: {name}", ("plot", "runs"), "run", files)
    for name, change in ROWS.items():
        yield Case(f"rows, plot: {name}", ("plot", "runs"), "run", {f"{place}/eval.csv": change})
    for name, change in TIMES.items():
        files = {f"{place}/timing.jsonl": change}
        yield Case(f"seconds, plot: {name}", ("plot", "runs", "--x", "seconds"), "run", files)
    for name, change in FACTS.items():
        files = {f"{place}/provenance.json": change}
        yield Case(f"provenance, show: {name}", ("show", place), "run", files)
        yield Case(f"provenance, run: {name}", GO_ON, "half", {"{half}/provenance.json": change})
    yield from _lost()
    for name in ("half", "a line of text", "a line of a list", "binary", "deep"):
        files = {"{half}/metrics.jsonl": METRICS[name]}
        yield Case(f"metrics, run: {name}", GO_ON, "half", files)
    for name in ("binary", "no round", "round of text"):
        yield Case(f"rows, run: {name}", GO_ON, "half", {"{half}/eval.csv": ROWS[name]})
    yield Case("plot without eval.csv", ("plot", "runs"), "run", {f"{place}/eval.csv": gone})
    yield Case("show without config", ("show", place), "run", {f"{place}/config.json": gone})
    yield Case("evaluate without lora", ("evaluate", place), "run")
    yield Case("table1 of runs without lora", ("table1", "runs"), "run")
    yield Case("seconds without timing", ("plot", "runs", "--x", "seconds"), "run",
               {f"{place}/timing.jsonl": gone})  # fmt: skip
    other = holds('{"model": "x", "objective": "y", "method": "z", "seed": 0}')
    yield Case(
        "two models",
        ("plot", "runs"),
        "run",
        {f"{place}/../seed-1/config.json": other, f"{place}/../seed-1/eval.csv": gone},
    )


def _lost() -> Iterator[Case]:
    """Runs that have lost a part, or went on with other inputs or packages."""
    facts, other = "{half}/provenance.json", {"model": "0" * 12, "prompts": "0" * 12}
    ended = "2030-01-01T00:00:00+00:00"
    checkpoints: dict[str, Change] = {
        f"{{half}}/checkpoints/{part}.safetensors": gone for part in ("last", "previous")
    }
    lost: dict[str, Mapping[str, Change]] = {
        "no checkpoint": checkpoints,
        "no provenance": {facts: gone},
        "no provenance, no checkpoint": {facts: gone, **checkpoints},
        "other packages": {facts: edited(packages={"torch": "1.0"})},
        "other inputs": {facts: edited(inputs=other)},
        "ended with other inputs": {facts: edited(inputs=other, ended=ended)},
        "ended with inputs of a list": {facts: edited(inputs=[], ended=ended)},
        "ended with scorers of text": {facts: edited(inputs={"scorers": "x"}, ended=ended)},
    }
    for name, files in lost.items():
        yield Case(f"lost, run: {name}", GO_ON, "half", files)


# ---- safetensors


def _header(header: bytes, size: int | None = None, rest: bytes = b"") -> bytes:
    """A safetensors file with that header, its size told truly or not."""
    return struct.pack("<Q", len(header) if size is None else size) + header + rest


def _tensor(**changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return _header(json.dumps({"x": tensor}).encode(), rest=bytes(8))


HEADERS: dict[str, Change] = {
    "empty": holds(""),
    "seven bytes": holds(b"1234567"),
    "no header": holds(_header(b"")),
    "header of garbage": holds(_header(b"garbage!")),
    "header of a list": holds(_header(b"[]")),
    "header past the end": holds(_header(b"{}", size=10**6)),
    "header without end": holds(_header(b"{}", size=2**63)),
    "unknown dtype": holds(_tensor(dtype="F7")),
    "shape below zero": holds(_tensor(shape=[-2])),
    "shape of text": holds(_tensor(shape="two")),
    "shape too large": holds(_tensor(shape=[2**40])),
    "offsets past the end": holds(_tensor(data_offsets=[0, 800])),
    "offsets backwards": holds(_tensor(data_offsets=[8, 0])),
    "cut off": cut(0.6),
    "bytes more": lambda whole: whole + bytes(16),
    "strange tensors": holds(_tensor()),
}


def safetensors() -> Iterator[Case]:
    """Checkpoints of a run, LoRAs and a UNet, with malformed headers and content."""
    evaluate = (
        "evaluate",
        "lora",
        "--model",
        "{model}",
        "--scorers",
        "jpeg_size",
        "--prompts",
        "animals",
        "--count",
        "1",
        "--steps",
        "2",
        "--device",
        "cpu",
    )
    lora = "lora/pytorch_lora_weights.safetensors"
    for name, change in HEADERS.items():
        # Both: of one that is damaged, the run goes on from the other.
        checkpoints = {
            f"{{half}}/checkpoints/{part}.safetensors": change for part in ("last", "previous")
        }
        yield Case(f"checkpoint: {name}", GO_ON, "half", checkpoints)
        yield Case(f"lora: {name}", evaluate, "lora", {lora: change})
    unet = "model/unet/diffusion_pytorch_model.safetensors"
    for name in ("header of garbage", "cut off", "shape too large"):
        said = f"{D3PO} --model model --preset official_code --device cpu --set dtype=fp32"
        yield Case(f"unet: {name}", tuple(said.split()), "model", {unet: HEADERS[name]})


# ---- results, tables, pictures


def results() -> Iterator[Case]:
    """Folders of published results with damaged manifests, configs, metrics and rows."""
    verify = ("verify", "results")
    for name, change in BROKEN.items():
        yield Case(f"manifest: {name}", verify, "results", {"results/manifest.json": change})
    place = f"results/{RUN}"
    swapped = {"unknown method": edited(method="nonsense"), "no run_id": edited(run_id=...)}
    for name, change in {**CONFIGS, **swapped}.items():
        yield Case(f"results, config: {name}", verify, "results", {f"{place}/config.json": change})
    for name in ("a line of a list", "round of text", "deep"):
        yield Case(f"results, metrics: {name}", verify, "results",
                   {f"{place}/metrics.jsonl": METRICS[name]})  # fmt: skip
    for name in ("no sampler", "score of text", "too few fields", "a null byte"):
        yield Case(f"results, rows: {name}", verify, "results",
                   {f"{place}/eval.csv": ROWS[name]})  # fmt: skip
    for name, value in {"below zero": "-1", "of text": "x", "more than there are": "99"}.items():
        yield Case(f"reruns {name}", (*verify, "--rerun", value), "results")


TABLE1: dict[str, Change] = {
    "half": cut(0.5),
    "empty": holds(""),
    "binary": holds(bytes(range(256))),
    "no sampler": without("sampler"),
    "no prompt": without("prompt"),
    "other prompts": column("prompt", "nothing"),
    "score of text": column("jpeg_size", "much"),
    "other weights": column("weights", "jpeg_size=000000000000"),
    "score of inf": column("jpeg_size", "inf"),
}


CHOICES: dict[str, Change] = {
    "empty": holds(""),
    "only a head": holds("source,share,low,high,raters\n"),
    "binary": holds(bytes(range(256))),
    "another encoding": holds("source,share,raters\nd3po/é,1,people\n".encode("latin-1")),
    "no source": without("source"),
    "no share": without("share"),
    "no raters": without("raters"),
    "unknown source": column("source", "drawn/nonsense-0"),
    "an empty source": column("source", ""),
    "a source twice": column("source", "drawn/no-fine-tune-0"),
    "a source that is not in the table": column("source", "drawn/ddpo-0"),
    "share of text": column("share", "much"),
    "share above 1": column("share", "1.01"),
    "share below 0": column("share", "-0.01"),
    "share of nan": column("share", "nan"),
    "unknown raters": column("raters", "robots"),
    "people and simulated": column("raters", "simulated"),
    "too few fields": line(-1, "drawn/d3po-0"),
    "a null byte": line(-1, "drawn/d3po-0\0,0.6,0,1,people"),
}


def tables() -> Iterator[Case]:
    """Rows of Table 1, and pictures with their list."""
    redraw = ("table1", "--redraw", "--out", "table1")
    for name, change in TABLE1.items():
        yield Case(f"table1: {name}", redraw, "table1", {"table1/rows/d3po-0.csv": change})
    yield Case("table1: no base", redraw, "table1", {"table1/rows/no-fine-tune.csv": gone})
    for name, change in {**BROKEN, "missing": gone, "no column": edited(column=...)}.items():
        yield Case(f"table1, signal: {name}", redraw, "table1", {"table1/signal.json": change})
    for name, change in CHOICES.items():
        yield Case(f"choices: {name}", redraw, "table1", {"table1/choices/seed-0.csv": change})
    yield Case("choices: other models", redraw, "table1", {
        "table1/choices/seed-1.csv": holds("source,share,raters\nno-fine-tune,1,people\n")
    })  # fmt: skip
    evaluate = ("evaluate", "pictures", "--scorers", "jpeg_size", "--device", "cpu")
    listed: dict[str, str | bytes] = {
        "empty": "",
        "only a head": "file_name,text\n",
        "no text": "file_name\n0.png\n",
        "no file": "text\ncat\n",
        "a file that is not there": "file_name,text\n7.png,a cat\n",
        "a file elsewhere": "file_name,text\n../elsewhere.png,a cat\n",
        "too few fields": "file_name,text\n0.png\n",
        "a null byte": "file_name,text\n0\0.png,a cat\n",
        "binary": bytes(range(256)),
    }
    for name, data in listed.items():
        files = {"pictures/metadata.csv": holds(data)}
        yield Case(f"pictures: {name}", evaluate, "pictures", files)
    for name, change in {"cut off": cut(0.5), "empty": holds(""), "text": holds("cat")}.items():
        yield Case(f"picture: {name}", evaluate, "pictures", {"pictures/0.png": change})


# ---- feedback


def _item(**values: Any) -> Change:
    """A round with its first item changed."""

    def change(whole: bytes) -> bytes:
        found = json.loads(whole)
        found["items"][0].update(values)
        return json.dumps(found).encode()

    return change


ROUNDS: dict[str, Change] = {
    **BROKEN,
    "no kind": edited(kind=...),
    "a key more": edited(more=1),
    "unknown kind": edited(kind="triples"),
    "unknown question": edited(question="nice"),
    "blurred of text": edited(blurred="no"),
    "no items": edited(items=[]),
    "an item of text": edited(items=["cat"]),
    "id with a slash": _item(id="../0"),
    "id of a number": _item(id=7),
    "id twice": _item(id="0001"),
    "prompt of a number": _item(prompt=3),
    "one image": _item(images=["images/0000-0.png"]),
    "images of text": _item(images="images"),
    "an image elsewhere": _item(images=["../x.png"] * 7),
    "an absolute image": _item(images=["/etc/hostname"] * 7),
    "an image that is none": _item(images=["round.json"] * 7),
    "an image of a null byte": _item(images=["a\0.png"] * 7),
    "gold out of range": _item(gold=[9]),
    "gold twice": _item(gold=[1, 1]),
    "gold of text": _item(gold="a"),
}

LABELS: dict[str, str | bytes] = {
    "empty": "",
    "half": "[[0, -1, 0",
    "an object": "{}",
    "no rows": "[]",
    "a row of text": '["0"]',
    "rows of one": "[[0], [0]]",
    "rows of unequal length": "[[0, -1], [0]]",
    "a value of text": '[[0, "x"]]',
    "a value of nan": "[[0, NaN]]",
    "a value of null": "[[0, null]]",
    "a huge value": "[[0, 1e300]]",
    "an endless value": f"[[0, {'9' * 5000}]]",
    "true": "[[0, true]]",
    "deep": "[" * 100_000,
    "binary": bytes(range(256)),
}


def feedback() -> Iterator[Case]:
    """Rounds and label files, through the commands that the test adds for their readers."""
    for name, change in ROUNDS.items():
        yield Case(f"round: {name}", ("read-round", "round"), "round", {"round/round.json": change})
    yield Case("round: missing", ("read-round", "round"), "round", {"round/round.json": gone})
    yield Case("round: picture cut off", ("read-round", "round"), "round",
               {"round/images/0000-0.png": cut(0.5)})  # fmt: skip
    choices = ("feedback", "choices", "round", "--out", "choices.csv")
    sources = {**BROKEN, "missing": gone, "one": holds('["a"]'), "of others": holds('["a", "b"]')}
    for name, change in sources.items():
        yield Case(f"sources: {name}", choices, "round", {"round/sources.json": change})
    for name, data in LABELS.items():
        yield Case(
            f"labels: {name}", ("read-labels", "labels"), files={"labels/a.json": holds(data)}
        )
    yield Case("labels: none", ("read-labels", "labels"), files={"labels/a.txt": holds("")})
    yield Case(
        "labels: of two widths",
        ("read-labels", "labels"),
        files={"labels/a.json": holds("[[0, 0]]"), "labels/b.json": holds("[[0, 0, 0]]")},
    )


def families() -> dict[str, list[Case]]:
    """All cases, by what is malformed."""
    makers = (options, settings, lines, grids, prompts, configs, run_folders, safetensors, results,
              tables, feedback)  # fmt: skip
    return {maker.__name__: list(maker()) for maker in makers}


def put(folder: Path, case: Case, half: str) -> None:
    """Change the files of the case below `folder`, where its base has been copied to.

    Args:
        folder: of the case.
        case: what to change.
        half: path of the run folder of the base "half", below `folder`.
    """
    for name, change in case.files.items():
        path = folder / name.replace("{half}", half)
        data = change(path.read_bytes() if path.exists() else b"")
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(data)
