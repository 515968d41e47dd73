"""A round: images that wait for people's judgement, as `round.json` beside its pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, get_args

from d3po_bench.errors import UserError

Kind = Literal["tags", "pairs"]
"""Tag the bad ones of K images, or choose the better of two."""
Question = Literal["deformed", "unsafe", "better", "alignment"]
Choice = Literal["a", "b", "tie", "bad"]
"""Of a pair: the first image, the second, equally good, or both too bad to choose."""
Pool = Literal["people", "simulated"]
"""Who voted; simulated where at least one of them is."""
Answer = tuple[int, ...] | Choice
"""Ascending indices of the tagged (bad) images of a grid, or the choice of a pair."""

FILE = "round.json"
MOST_IMAGES = 9
"""One digit key for each image of a grid."""

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
REMEDY = "Correct the file, or make the round again."


@dataclass(frozen=True)
class Item:
    """What a rater judges at once: the K images of a prompt."""

    id: str
    """Letters, digits, dots, dashes and underscores; unique in its round."""
    prompt: str
    images: tuple[str, ...]
    """Paths of PNG files, relative to the round's folder, with forward slashes."""
    gold: Answer | None = None
    """The right answer where it is known, to measure raters by."""


@dataclass(frozen=True)
class Vote:
    """What one rater answered to one item; what was undone is not a vote."""

    rater: str
    item: str
    repeat: int
    """0 the first time this rater is asked, 1 when asked again to measure self-consistency."""
    shown: tuple[int, ...]
    """Index of the image at each place, left to right, then down."""
    answer: Answer
    """In the item's own indices, whatever the order shown."""
    milliseconds: int
    time: float
    """Seconds since 1970, UTC."""


@dataclass(frozen=True)
class Round:
    """Items of one kind under one question."""

    kind: Kind
    question: Question
    blurred: bool
    """Whether pictures are hidden until the rater asks."""
    items: tuple[Item, ...]

    @property
    def images_per_item(self) -> int:
        """K."""
        return len(self.items[0].images)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`/round.json and check that its pictures are there.

        Raises:
            UserError: anything in it is missing or malformed, naming file and field.
        """
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as problem:
            raise UserError(
                f"Expected a round in {folder}, got no {FILE}. Give the folder of a round."
            ) from problem
        except (OSError, ValueError, RecursionError) as problem:
            raise UserError(f"Expected JSON in {path}, got: {problem}. {REMEDY}") from problem
        return cls(**_Reader(path).round(data))

    def write(self, folder: Path) -> None:
        """Write `folder`/round.json, whole or not at all. Its pictures must be there already.

        Raises:
            UserError: what `read` would refuse, or the file cannot be written.
        """
        from d3po_bench.runs.files import write_atomically

        data = json.loads(json.dumps(asdict(self)))
        path = folder / FILE
        _Reader(path).round(data)
        write_atomically(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def check_answer(kind: Kind, images: int, answer: Any) -> Answer:
    """`answer`, as JSON gives it, to an item of `images` images.

    Raises:
        ValueError: it is none, saying what was expected.
    """
    if kind == "pairs":
        if not isinstance(answer, str) or answer not in get_args(Choice):
            raise ValueError(f"one of {', '.join(get_args(Choice))}")
        return answer  # type: ignore[return-value]  # get_args is not narrowed
    indices = answer if isinstance(answer, list | tuple) else [None]
    if not all(type(i) is int and 0 <= i < images for i in indices):
        raise ValueError(f"a list of indices from 0 to {images - 1}")
    if len(set(indices)) != len(indices):
        raise ValueError("a list that names each image once")
    return tuple(sorted(indices))


@dataclass(frozen=True)
class _Reader:
    """Checks every field on the way in, so that nobody else has to."""

    path: Path

    def round(self, data: Any) -> dict[str, Any]:
        self.keys("the whole", data, ("kind", "question", "blurred", "items"))
        kind: Kind = self.choice("kind", data["kind"], get_args(Kind))
        question = self.choice("question", data["question"], get_args(Question))
        if not isinstance(data["blurred"], bool):
            raise self.wrong("blurred", "true or false", data["blurred"])
        if not isinstance(data["items"], list) or not data["items"]:
            raise self.wrong("items", "a list of at least one item", data["items"])
        items = tuple(self.item(f"items[{n}]", kind, i) for n, i in enumerate(data["items"]))
        self.alike(items)
        return {"kind": kind, "question": question, "blurred": data["blurred"], "items": items}

    def item(self, field: str, kind: Kind, data: Any) -> Item:
        self.keys(field, data, ("id", "prompt", "images", "gold"))
        name, prompt = data["id"], data["prompt"]
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise self.wrong(f"{field}.id", "1 to 64 letters, digits, dots, dashes", name)
        if not isinstance(prompt, str):
            raise self.wrong(f"{field}.prompt", "text", prompt)
        images = self.images(f"{field}.images", kind, data["images"])
        if data["gold"] is None:
            return Item(name, prompt, images)
        try:
            return Item(name, prompt, images, check_answer(kind, len(images), data["gold"]))
        except ValueError as problem:
            raise self.wrong(f"{field}.gold", f"null or {problem}", data["gold"]) from problem

    def images(self, field: str, kind: Kind, data: Any) -> tuple[str, ...]:
        fits = isinstance(data, list) and (
            len(data) == 2 if kind == "pairs" else 2 <= len(data) <= MOST_IMAGES
        )
        if not fits:
            number = "two" if kind == "pairs" else f"2 to {MOST_IMAGES}"
            raise self.wrong(field, f"a list of {number} paths", data)
        return tuple(self.image(f"{field}[{n}]", name) for n, name in enumerate(data))

    def image(self, field: str, name: Any) -> str:
        """A path that stays in the folder, also after links are followed, and is a whole PNG."""
        inside = isinstance(name, str) and name.isprintable() and "\\" not in name and name != ""
        if not inside or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise self.wrong(field, "a path inside the round's folder", name)
        folder, target = self.path.parent.resolve(), (self.path.parent / name).resolve()
        if not target.is_relative_to(folder):
            raise self.wrong(field, "a path inside the round's folder", name)
        if not target.is_file():
            raise self.wrong(field, "a PNG file", f"no such file: {name}")
        if not _whole_png(target):
            raise self.wrong(field, "a whole PNG file", name)
        return str(name)

    def alike(self, items: Sequence[Item]) -> None:
        """Names are unique, and every prompt has as many images: scores are [P, K]."""
        seen: set[str] = set()
        for n, item in enumerate(items):
            if item.id in seen:
                raise self.wrong(f"items[{n}].id", "a name no other item has", item.id)
            if len(item.images) != len(items[0].images):
                number = len(items[0].images)
                raise self.wrong(f"items[{n}].images", f"{number} paths as before", item.images)
            seen.add(item.id)

    def keys(self, field: str, data: Any, names: Collection[str]) -> None:
        if not isinstance(data, dict) or data.keys() != set(names):
            got = sorted(data) if isinstance(data, dict) else data
            raise self.wrong(field, f"an object with {', '.join(names)}", got)

    def choice(self, field: str, value: Any, known: tuple[str, ...]) -> Any:
        if not isinstance(value, str) or value not in known:
            raise self.wrong(field, f"one of {', '.join(known)}", value)
        return value

    def wrong(self, field: str, expected: str, got: Any) -> UserError:
        text = ascii(got)
        text = text if len(text) <= 80 else text[:77] + "..."
        return UserError(f"Expected {field} in {self.path} to be {expected}, got {text}. {REMEDY}")


def _whole_png(path: Path) -> bool:
    """Whether the file begins and ends as PNG does: decoding thousands would take minutes."""
    with path.open("rb") as file:
        start = file.read(len(PNG_START))
        file.seek(-min(len(PNG_END), path.stat().st_size), 2)
        return start == PNG_START and file.read() == PNG_END
