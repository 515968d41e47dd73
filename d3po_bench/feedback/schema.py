"""The files that people hand us, as models that pydantic checks; a fault becomes one line."""

from __future__ import annotations

import json
import re
import struct
import tomllib
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from d3po_bench.errors import UserError
from d3po_bench.feedback.questions import Answer, Choice, Kind, Known, Question, Strict, Tags
from d3po_bench.feedback.study import STUDY, Study, one_question

MOST_IMAGES = 9
"""One digit key for each image of a grid."""
MOST_PIXELS = 2**24
"""Of a picture, such as 4096 x 4096: browsers hold nine at once, with four bytes a pixel."""
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

T = TypeVar("T")


def read(model: TypeAdapter[T], path: Path, remedy: str) -> T:
    """What the JSON in `path` says.

    Args:
        model: of the file: ROUND, SOURCES or LABELS.
        path: of the file; paths in it begin at its folder.
        remedy: ends an error's line.

    Raises:
        UserError: it cannot be read, or it is malformed, naming the place.
    """
    try:
        return check(model, path, path.read_bytes(), remedy)
    except OSError as problem:
        raise UserError(f"Cannot read {path}: {problem.strerror}. {remedy}") from problem


def check(model: TypeAdapter[T], path: Path, data: bytes, remedy: str) -> T:
    """What `data` says, the content of `path` or what is to become it.

    Raises:
        UserError: it is malformed, naming the place.
    """
    try:
        return model.validate_json(data, context=path.parent)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        raise UserError(f"{path}: {_in_words(first)}. {remedy}") from problem


def check_size(width: int, height: int) -> None:
    """Refuse a picture that browsers cannot be asked to show.

    Raises:
        ValueError: saying how large it may be.
    """
    if width * height > MOST_PIXELS:
        most = f"{MOST_PIXELS:,} pixels are the most, such as 4096 x 4096"
        raise ValueError(f"it is {width} x {height}, and {most}")


def _in_words(error: ErrorDetails) -> str:
    """Place, fault and what was there, as in `items[1].blurred: input should be ..., got 1`."""
    tags = {*get_args(Kind), "study"}  # a kind stands in the way where it chose the model
    known = [None, *error["loc"]]
    way = [
        part
        for before, part in pairwise(known)
        if not (part in tags and (before is None or isinstance(before, int)))
    ]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{json.dumps(part)[1:-1][:40]}" for part in way
    )
    fault, found = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"].startswith("union_tag"):
        kinds = get_args(Kind) if way else ("tags", "pairs", "study")
        place, fault = f"{place}.kind", f"Input should be one of {', '.join(kinds)}"
        found = found.get("kind")
    words = f"{place.lstrip('.')}: {fault[0].lower()}{fault[1:]}" if place else fault
    if isinstance(found, str | int | float | None):
        shown = json.dumps(found)
        words += f", got {shown if len(shown) <= 80 else shown[:77] + '...'}"
    return words


# ---- round.json


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ValueError("use 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def _picture(name: str, info: ValidationInfo) -> str:
    """A path that stays in the folder, also after links are followed, to a whole PNG."""
    folder: Path = info.context.resolve()  # type: ignore[union-attr]  # `check` gives it
    path = PurePosixPath(name)
    inside = name.isprintable() and "\\" not in name
    if not inside or path.is_absolute() or ".." in path.parts:
        raise ValueError("name a file inside the round's folder")
    try:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise ValueError("name a file inside the round's folder")
        if not target.is_file():
            raise ValueError("there is no such file")
        # Decoding thousands would take minutes.
        with target.open("rb") as file:
            start = file.read(24)  # as far as the height
            file.seek(-min(len(PNG_END), target.stat().st_size), 2)
            ends = start.startswith(PNG_START) and file.read() == PNG_END
            if not ends or len(start) < 24:
                raise ValueError("this is not a whole PNG file")
            check_size(*struct.unpack(">II", start[16:]))
    except (OSError, RuntimeError) as problem:  # RuntimeError: links in a circle
        raise ValueError("this file cannot be read") from problem
    return name


_Picture = Annotated[str, AfterValidator(_picture)]


def _alike(items: list[Any]) -> list[Any]:
    """Names are unique, and every item has as many images: scores are [P, K]."""
    seen = set[str]()
    for n, item in enumerate(items):
        if item.id in seen:
            raise ValueError(f"the id {item.id!r} of items[{n}] is another item's, too")
        if len(item.images) != len(items[0].images):
            counts = f"items[{n}] has {len(item.images)} and items[0] {len(items[0].images)}"
            raise ValueError(f"all need the same number of images, but {counts}")
        seen.add(item.id)
    return items


class _Item(Strict):
    id: Annotated[str, AfterValidator(_name)]
    prompt: str


class _Grid(_Item):
    images: Annotated[list[_Picture], Field(min_length=2, max_length=MOST_IMAGES)]
    gold: tuple[int, ...] | None

    @field_validator("gold")
    @classmethod
    def _answers_its_item(cls, gold: tuple[int, ...] | None, info: ValidationInfo) -> Answer | None:
        images = info.data.get("images")  # None where they are wrong themselves
        if gold is None or images is None:
            return gold
        return Tags(name="tags").check(len(images), gold)


class _Pair(_Item):
    images: Annotated[list[_Picture], Field(min_length=2, max_length=2)]
    gold: Choice | None


class _Round(Strict):
    question: Known
    blurred: bool


class GridRound(_Round):
    """round.json where the bad ones of several images are tagged."""

    kind: Literal["tags"]
    items: Annotated[list[_Grid], Field(min_length=1), AfterValidator(_alike)]


class PairRound(_Round):
    """round.json where the better of two images is chosen."""

    kind: Literal["pairs"]
    items: Annotated[list[_Pair], Field(min_length=1), AfterValidator(_alike)]


class _Pictures(_Item):
    id: Annotated[str, AfterValidator(_name), Field(max_length=32)]
    images: Annotated[list[_Picture], Field(min_length=1, max_length=MOST_IMAGES)]


class StudyRound(Strict):
    """round.json of a study: its questions are asked of the same pictures."""

    kind: Literal["study"]
    study: Study
    items: Annotated[list[_Pictures], Field(min_length=1), AfterValidator(_alike)]

    @field_validator("study")
    @classmethod
    def _has_its_pictures(cls, study: Study, info: ValidationInfo) -> Study:
        for item in study.known:
            for name in item.pictures:
                _picture(name, info)
        return study

    @model_validator(mode="after")
    def _suits_its_pictures(self) -> Self:
        if len(self.items[0].images) < 2:
            compares = [q.name for q in self.study.question if q.kind != "scale"]
            if compares:
                raise ValueError(
                    f"the question {compares[0]} is asked of several pictures of a prompt, and "
                    "each has one"
                )
        return self


ROUND: TypeAdapter[GridRound | PairRound | StudyRound] = TypeAdapter(
    Annotated[GridRound | PairRound | StudyRound, Field(discriminator="kind")]
)

# ---- studies


def asked_of(
    file: Path | None, kind: Kind | None, question: str | None, scale: str | None
) -> tuple[Study, Path]:
    """The study that `feedback new` was given, and where the paths of its own pictures begin.

    Raises:
        UserError: what was given does not go together, or the file is malformed.
    """
    if file:
        if kind or question or scale:
            raise UserError(f"{file} has the questions. Leave out --kind, --question and --scale.")
        return read_study(file), file.parent
    if scale and kind != "scale":
        raise UserError("--scale goes with --kind scale. Add that, or leave it out.")
    more: dict[str, Any] = {"scale": scale} if scale else {}
    return one_question(kind or "tags", question, **more), Path()


def read_study(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        UserError: it cannot be read, or it is malformed, naming the place.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"Cannot read {path}: {problem.strerror}. Give another file.") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not TOML: {problem}. Correct the file.") from problem
    return check(STUDY, path, json.dumps(found, default=str).encode(), "Correct the file.")


# ---- other files


def _equally_long(rows: list[list[int]]) -> list[list[int]]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("all rows need the same number of images")
    return rows


LABELS: TypeAdapter[list[list[Literal[0, -1]]]] = TypeAdapter(
    Annotated[
        list[Annotated[list[Literal[0, -1]], Field(min_length=2)]],
        Field(min_length=1),
        AfterValidator(_equally_long),
    ]
)
"""One rater's label file of the published code: a row for each prompt, -1 for a tagged image."""

SOURCES: TypeAdapter[list[str]] = TypeAdapter(Annotated[list[str], Field(min_length=2)])
"""sources.json: the folders of pictures that a round compares."""


# ---- the votes in a database, which another program may have written

VOTE: TypeAdapter[tuple[str, str, int, int, float]] = TypeAdapter(
    tuple[
        str, str, NonNegativeInt, NonNegativeInt,
        Annotated[float, Field(ge=0, lt=2**53)],  # dates can be made of it
    ],
    config=ConfigDict(strict=True),
)  # fmt: skip
"""Rater, item, repeat, milliseconds and time of a row."""


@lru_cache(10_000)  # the texts of 40,000 votes are few
def order_of(text: str, images: int) -> tuple[int, ...]:
    """The order that images were shown in.

    Raises:
        ValueError: it is not each of them once.
    """
    found = json.loads(text)
    if not isinstance(found, list) or {type(i) for i in found} != {int}:
        raise ValueError("an order is a list of indices")
    if sorted(found) != list(range(images)):
        raise ValueError("an order shows each image once")
    return tuple(found)


@lru_cache(10_000)
def answer_of(text: str, question: Question, images: int) -> Answer:
    """The answer to an item.

    Raises:
        ValueError: it does not answer such an item.
    """
    return question.check(images, json.loads(text))
