"""The files that people hand us, as models that pydantic checks; a fault becomes one line."""

from __future__ import annotations

import json
import re
import struct
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from d3po_bench.errors import UserError

Kind = Literal["tags", "pairs"]
"""Tag the bad ones of K images, or choose the better of two."""
Question = Literal["deformed", "unsafe", "better", "alignment"]
Choice = Literal["a", "b", "tie", "bad"]
"""Of a pair: the first image, the second, equally good, or both too bad to choose."""
Answer = tuple[int, ...] | Choice
"""Ascending indices of the tagged (bad) images of a grid, or the choice of a pair."""

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


def check_answer(kind: Kind, images: int, answer: Any) -> Answer:
    """`answer`, as JSON gives it, to an item of `images` images.

    Raises:
        ValueError: it does not answer such an item, saying what would.
    """
    if kind == "pairs":
        if not isinstance(answer, str) or answer not in get_args(Choice):
            raise ValueError(f"an answer is one of {', '.join(get_args(Choice))}")
        return answer  # type: ignore[return-value]  # get_args is not narrowed
    indices = answer if isinstance(answer, list | tuple) else [None]
    if not all(type(i) is int and 0 <= i < images for i in indices):
        raise ValueError(f"an answer is a list of indices from 0 to {images - 1}")
    if len(set(indices)) != len(indices):
        raise ValueError("an answer names each image once")
    return tuple(sorted(indices))


def _in_words(error: ErrorDetails) -> str:
    """Place, fault and what was there, as in `items[1].blurred: input should be ..., got 1`."""
    way = error["loc"]
    if way and way[0] in get_args(Kind):  # the model that the file's kind chose
        way = way[1:]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{json.dumps(part)[1:-1][:40]}" for part in way
    )
    fault, found = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"].startswith("union_tag"):
        place, fault = ".kind", f"Input should be one of {', '.join(get_args(Kind))}"
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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Item(_Strict):
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
        return check_answer("tags", len(images), gold)


class _Pair(_Item):
    images: Annotated[list[_Picture], Field(min_length=2, max_length=2)]
    gold: Choice | None


class _Round(_Strict):
    question: Question
    blurred: bool


class GridRound(_Round):
    """round.json where the bad ones of several images are tagged."""

    kind: Literal["tags"]
    items: Annotated[list[_Grid], Field(min_length=1), AfterValidator(_alike)]


class PairRound(_Round):
    """round.json where the better of two images is chosen."""

    kind: Literal["pairs"]
    items: Annotated[list[_Pair], Field(min_length=1), AfterValidator(_alike)]


ROUND: TypeAdapter[GridRound | PairRound] = TypeAdapter(
    Annotated[GridRound | PairRound, Field(discriminator="kind")]
)

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
def answer_of(text: str, kind: Kind, images: int) -> Answer:
    """The answer to an item.

    Raises:
        ValueError: it does not answer such an item.
    """
    return check_answer(kind, images, json.loads(text))
