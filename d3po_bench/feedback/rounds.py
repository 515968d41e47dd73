"""A round: images that wait for people's judgement, as `round.json` beside its pictures.

Beside it lies `files.json`, with the checksums of all that a round is made of, where a command of
ours made it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from d3po_bench.digests import changed, sha256_of, short
from d3po_bench.errors import UserError
from d3po_bench.feedback import schema
from d3po_bench.feedback.questions import Answer, Question
from d3po_bench.feedback.study import KnownItem, Study, Use, one_question
from d3po_bench.pictures import open_picture, opened
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
    """What a rater judges at once: images of a prompt, under one question."""

    id: str
    """Letters, digits, dots, dashes and underscores; unique in its round."""
    prompt: str
    images: tuple[str, ...]
    """Paths of PNG files, relative to the round's folder, with forward slashes."""
    gold: Answer | None = None
    """The right answer where it is known, to measure raters by."""
    question: str = ""
    """Name of its question; "" before the round has given it one."""
    group: str = ""
    """Name of the images that it shows some of, where a study asks several things of them."""
    use: Use = "main"


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
    comment: str = ""
    """What the rater wrote, if anything."""


@dataclass(frozen=True)
class Progress:
    """How far a rater, or the round, has come."""

    done: int
    """Items answered or skipped; of the round: items with all their votes."""
    left: int
    """Of a rater: without repeats and items with a known answer, which nobody may foresee."""


@dataclass(frozen=True)
class Part:
    """The items of a round that are asked one question, practice left out."""

    question: Question
    items: tuple[Item, ...]

    @property
    def images_per_item(self) -> int:
        """On a page together."""
        return len(self.items[0].images)

    def of(self, votes: Sequence[Vote]) -> list[Vote]:
        """The votes on its items."""
        mine = {item.id for item in self.items}
        return [vote for vote in votes if vote.item in mine]


@dataclass(frozen=True)
class Round:
    """Pictures, and the study that asks people about them."""

    study: Study
    groups: tuple[Item, ...]
    """The K images of each prompt."""
    content: str = field(default="", compare=False)
    """Names what raters are shown, pictures included; "" before it was written."""

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """What raters judge: the groups themselves, or what each question of a study shows."""
        if self.study.plain:
            return tuple(replace(g, question=self.study.plain[1], group=g.id) for g in self.groups)
        known = [("practice", self.study.practice), ("gold", self.study.gold)]
        return (*self._asked(), *(
            self._known(f"{use}-{n}", use, item)  # type: ignore[arg-type]  # of Use
            for use, items in known for n, item in enumerate(items)
        ))  # fmt: skip

    def _asked(self) -> Iterator[Item]:
        for question in self.study.question:
            for group in self.groups:
                for places in question.shown(len(group.images)):
                    whole = len(places) == len(group.images)
                    part = "" if whole else "".join(f"-{k}" for k in places)
                    images = tuple(group.images[k] for k in places)
                    name = f"{group.id}{part}.{question.name}"
                    yield Item(name, group.prompt, images, None, question.name, group.id)

    def _known(self, name: str, use: Use, item: KnownItem) -> Item:
        gold, images = self.study.answer_of(item), tuple(item.pictures)
        return Item(f"{name}.{item.question}", item.prompt, images, gold, item.question, name, use)

    @property
    def kind(self) -> str:
        """Of its only question, or `study`."""
        return self.study.plain[0] if self.study.plain else "study"

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its items by question."""
        return tuple(
            Part(question, tuple(
                i for i in self.items if i.question == question.name and i.use != "practice"
            ))
            for question in self.study.question
        )  # fmt: skip

    def part(self, name: str | None) -> Part:
        """The part of a question.

        Raises:
            UserError: there is no such question, or no name and several questions.
        """
        names = [part.question.name for part in self.parts]
        if name is None and len(names) > 1:
            raise UserError(f"Its questions are {', '.join(names)}. Choose one with --question.")
        for part in self.parts:
            if name in (None, part.question.name):
                return part
        raise UserError(f"It has no question {name!a}, but {', '.join(names)}. Correct --question.")

    def real(self, votes: Sequence[Vote]) -> list[Vote]:
        """Votes without those of practice."""
        practice = {item.id for item in self.items if item.use == "practice"}
        return [vote for vote in votes if vote.item not in practice]

    def asked(self, item: Item) -> Question:
        """The question that an item is asked."""
        return self.study.asked(item.question)

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
        what: list[Any]
        if isinstance(found, schema.StudyRound):
            study = found.study
            what = [study.model_dump(mode="json", include={"question", "practice", "gold"})]
            groups = tuple(Item(i.id, i.prompt, tuple(i.images)) for i in found.items)
        else:
            study = one_question(found.kind, found.question, blurred=found.blurred)
            what = [found.kind, found.question]
            groups = tuple(Item(i.id, i.prompt, tuple(i.images), i.gold) for i in found.items)
        known = [name for i in (*study.practice, *study.gold) for name in i.pictures]
        shown = [[g.id, g.prompt, *(sha256_of(folder / name) for name in g.images)] for g in groups]
        shown += [[sha256_of(folder / name)] for name in known]
        return cls(study, groups, short(json.dumps([*what, shown])))

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
        fields = (
            ("id", "prompt", "images", "gold") if self.study.plain else ("id", "prompt", "images")
        )
        items = [{name: getattr(group, name) for name in fields} for group in self.groups]
        if self.study.plain:
            kind, question = self.study.plain
            head = {"kind": kind, "question": question, "blurred": self.study.blurred}
        else:
            said = self.study.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
            questions = [q.model_dump(mode="json", exclude_none=True) for q in self.study.question]
            head = {"kind": "study", "study": {**said, "question": questions}}
        return _json({**head, "items": items})


# ---- its files


def placed(study: Study, beside: Path) -> tuple[Study, dict[str, Path]]:
    """The study with its own pictures as a round has them, and where each is copied from.

    Raises:
        UserError: a picture is missing, damaged or too large.
    """
    copies: dict[str, Path] = {}
    parts: dict[str, list[KnownItem]] = {}
    for part in ("example", "practice", "gold"):
        parts[part] = []
        for n, item in enumerate(getattr(study, part)):
            names = [f"images/{part}-{n}-{k}.png" for k in range(len(item.pictures))]
            copies |= {name: beside / own for name, own in zip(names, item.pictures, strict=True)}
            parts[part].append(item.model_copy(update={"pictures": names}))
    check_sizes(copies.values())
    return study.model_copy(update=parts), copies


def check_sizes(paths: Iterable[Path]) -> None:
    """Refuse pictures that browsers cannot be asked to show, reading their headers alone.

    Raises:
        UserError: one is missing, damaged or too large.
    """
    for path in paths:
        with opened(path) as picture:
            schema.check_size(*picture.size)


def save_pictures(folder: Path, copies: Mapping[str, Path]) -> None:
    """Save pictures again as PNG: nothing else in the files comes along.

    Raises:
        UserError: one is missing or damaged, or a copy cannot be written.
    """
    for name, path in copies.items():
        buffer = io.BytesIO()
        open_picture(path).save(buffer, "PNG")
        write_atomically(folder / name, buffer.getvalue())


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
