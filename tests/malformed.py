"""Ways to damage the files that commands read, as data for `test_malformed.py`.

A family is a kind of file, what lies around it, the call that reads it, and its faults; a fault
changes one or several files of something whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, Literal

Change = Callable[[bytes], bytes | None]
"""The whole file's bytes (none for a new file) -> the malformed ones; None removes the file."""

Base = Literal["nothing", "run", "half", "lora", "results", "table1", "pictures", "round"]
"""What a case begins with. half: a run that can be resumed; run: a published one."""

RUN = "tiny/incompress/d3po/seed-0"
"""Where the run of the bases run and results lies, below runs/ and results/."""


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
}


# ---- run folders

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


# ---- results, tables, pictures

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


SIGNAL: dict[str, Change] = {**BROKEN, "missing": gone, "no column": edited(column=...)}

PICTURES: dict[str, Change] = {
    "empty": holds(""),
    "only a head": holds("file_name,text\n"),
    "no text": holds("file_name\n0.png\n"),
    "no file": holds("text\ncat\n"),
    "a file that is not there": holds("file_name,text\n7.png,a cat\n"),
    "a file elsewhere": holds("file_name,text\n../elsewhere.png,a cat\n"),
    "too few fields": holds("file_name,text\n0.png\n"),
    "a null byte": holds("file_name,text\n0\0.png,a cat\n"),
    "binary": holds(bytes(range(256))),
}
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

LABELS: dict[str, Change] = {
    "empty": holds(""),
    "half": holds("[[0, -1, 0"),
    "an object": holds("{}"),
    "no rows": holds("[]"),
    "a row of text": holds('["0"]'),
    "rows of one": holds("[[0], [0]]"),
    "rows of unequal length": holds("[[0, -1], [0]]"),
    "a value of text": holds('[[0, "x"]]'),
    "a value of nan": holds("[[0, NaN]]"),
    "a value of null": holds("[[0, null]]"),
    "a huge value": holds("[[0, 1e300]]"),
    "an endless value": holds(f"[[0, {'9' * 5000}]]"),
    "true": holds("[[0, true]]"),
    "deep": holds("[" * 100_000),
    "binary": holds(bytes(range(256))),
}


SOURCES: dict[str, Change] = {
    **BROKEN, "missing": gone, "one": holds('["a"]'), "of others": holds('["a", "b"]')
}  # fmt: skip
