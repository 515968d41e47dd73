"""A round: images that wait for people's judgement, as `round.json` beside its pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from d3po_bench.errors import UserError
from d3po_bench.feedback import schema
from d3po_bench.feedback.schema import Answer, Kind, Question
from d3po_bench.runs.files import write_atomically

Pool = Literal["people", "simulated"]
"""Who voted; simulated where at least one of them is."""

FILE, FILES = "round.json", "files.json"
"""A round, and the checksums of its pictures and tensors where `feedback new` made it."""
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
        if not path.exists():
            raise UserError(f"There is no {FILE} in {folder}. Give the folder of a round.")
        found = schema.read(schema.ROUND, path, REMEDY)
        items = (Item(i.id, i.prompt, tuple(i.images), i.gold) for i in found.items)
        return cls(found.kind, found.question, found.blurred, tuple(items))

    def write(self, folder: Path) -> None:
        """Write `folder`/round.json, whole or not at all. Its pictures must be there already.

        Raises:
            UserError: what `read` would refuse, or the file cannot be written.
        """
        data = (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()
        schema.check(schema.ROUND, folder / FILE, data, REMEDY)
        write_atomically(folder / FILE, data)
