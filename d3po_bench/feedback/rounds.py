"""A round: images that wait for people's judgement, as `round.json` beside its pictures.

Beside it lies `files.json`, with the checksums of all that a round is made of, where a command of
ours made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

from d3po_bench.digests import changed, sha256_of, short
from d3po_bench.errors import UserError
from d3po_bench.feedback import schema
from d3po_bench.feedback.schema import Answer, Kind, Question
from d3po_bench.runs.files import write_atomically

Pool = Literal["people", "simulated"]
"""Who voted; simulated where at least one of them is."""

FILE, FILES = "round.json", "files.json"
SAMPLING, SOURCES, ADAPTER = "sampling.json", "sources.json", "adapter.safetensors"
TENSORS = ("rollout/", ADAPTER)
"""What only training reads: seconds a gigabyte to compare."""

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
class Progress:
    """How far a rater, or the round, has come."""

    done: int
    """Items answered or skipped; of the round: items with all their votes."""
    left: int
    """Of a rater: without repeats and items with a known answer, which nobody may foresee."""


@dataclass(frozen=True)
class Round:
    """Items of one kind under one question."""

    kind: Kind
    question: Question
    blurred: bool
    """Whether pictures are hidden until the rater asks."""
    items: tuple[Item, ...]
    content: str = field(default="", compare=False)
    """Names what raters are shown, pictures included; "" before it was written."""

    @property
    def images_per_item(self) -> int:
        """K."""
        return len(self.items[0].images)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`/round.json and check that its pictures are there, as they were made.

        Raises:
            UserError: anything in it is missing, malformed or altered, naming file and field.
        """
        path = folder / FILE
        if not path.exists():
            raise UserError(f"There is no {FILE} in {folder}. Give the folder of a round.")
        found = schema.read(schema.ROUND, path, REMEDY)
        require_files(folder, without=TENSORS)
        items = tuple(Item(i.id, i.prompt, tuple(i.images), i.gold) for i in found.items)
        shown = [[i.id, i.prompt, *(sha256_of(folder / name) for name in i.images)] for i in items]
        content = short(json.dumps([found.kind, found.question, shown]))
        return cls(found.kind, found.question, found.blurred, items, content)

    def write(self, folder: Path) -> None:
        """Write `folder`/round.json, whole or not at all. Its pictures must be there already.

        Raises:
            UserError: what `read` would refuse, or the file cannot be written.
        """
        schema.check(schema.ROUND, folder / FILE, self._data, REMEDY)
        write_atomically(folder / FILE, self._data)

    def finish(self, folder: Path) -> Self:
        """Write it and, before it, the checksums of all files of the round; then read it.

        Raises:
            UserError: as `write` does.
        """
        known = {p.relative_to(folder).as_posix(): sha256_of(p) for p in _made(folder)}
        known[FILE] = hashlib.sha256(self._data).hexdigest()
        write_json(folder / FILES, known)
        self.write(folder)
        return self.read(folder)

    @property
    def _data(self) -> bytes:
        said = {name: value for name, value in asdict(self).items() if name != "content"}
        return _json(said)


# ---- its files


def _made(folder: Path) -> Iterator[Path]:
    for files in ("images/*.png", "rollout/*.safetensors"):
        yield from sorted(folder.glob(files))
    yield from (p for p in (folder / n for n in (SAMPLING, SOURCES, ADAPTER)) if p.is_file())


def require_files(folder: Path, without: tuple[str, ...] = ()) -> None:
    """Compare the files of a round with what was recorded when it was made.

    A round that was put together by hand has no record.

    Args:
        folder: of the round.
        without: beginnings of the names that are not compared.

    Raises:
        UserError: naming the first that is missing or altered, or was not there then.
    """
    if not any((folder / name).exists() for name in (FILES, SAMPLING, SOURCES)):
        return
    known = recorded(folder)
    there = (path.relative_to(folder).as_posix() for path in _made(folder))
    # Of the files that are text, an earlier version recorded none.
    strange = [
        n for n in there if n not in known and not n.startswith((SAMPLING, SOURCES, *without))
    ]
    if strange:
        raise UserError(
            f"{folder / strange[0]} was not there when the round was made. Remove it, or restore "
            f"{FILES}."
        )
    broken = changed(folder, {n: d for n, d in known.items() if not n.startswith(without)})
    if broken:
        state = "was changed" if (folder / broken[0]).exists() else "is missing"
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(
            f"{folder / broken[0]} {state}{more}. Restore it, or make the round again in another "
            "folder."
        )


def recorded(folder: Path) -> dict[str, str]:
    """File -> sha256 of what a round, or the finished part of one, is made of.

    Raises:
        UserError: the record is missing or damaged.
    """
    path = folder / FILES
    try:
        return {str(n): str(d) for n, d in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, RecursionError) as problem:
        raise UserError(f"The checksums in {path} cannot be read: {problem}. {REMEDY}") from problem


def write_json(path: Path, data: object) -> None:
    """Write a file of a round.

    Raises:
        UserError: it cannot be written.
    """
    write_atomically(path, _json(data))


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
