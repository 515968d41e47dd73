"""A study: what raters are told, asked and checked by, as a TOML file or inside round.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from d3po_bench.errors import UserError
from d3po_bench.feedback.questions import (
    KINDS,
    Answer,
    Asked,
    Kind,
    Known,
    Question,
    Strict,
    Words,
)

MOST_COMMENT = 1000
"""Characters of a rater's comment; a form has 16 KiB at most."""

Use = Literal["main", "gold", "practice"]
"""What an item is for: to be judged, to check raters, or to train them."""


class KnownItem(Strict):
    """Pictures with a known answer: an example, an item of practice, or one that checks raters."""

    question: str
    """Name of the question."""
    prompt: str = ""
    pictures: Annotated[list[str], Field(min_length=1, max_length=9)]
    """Paths, beginning at the study's file."""
    answer: int | str | list[int]
    """As in the export: indices of tagged pictures, a, b, tie or bad, a rating or several that
    are right, or the indices of all pictures, the best first."""
    why: Words | None = None


class Checks(Strict):
    """When a rater is warned, and flagged for the admin."""

    seconds: Annotated[float, Field(ge=0)] = 1.0
    """The median time for an answer, at least."""
    gold: Annotated[float, Field(ge=0, le=1)] = 0.7
    """The share of known answers that a rater must give, of at least three."""
    after: Annotated[int, Field(ge=1)] = 5
    """Answers before speed is looked at."""


def _link(address: str) -> str:
    if not address.startswith("https://") or not address.isprintable() or " " in address:
        raise ValueError("give an address that begins with https://")
    return address


class Platform(Strict):
    """Where participants come from and go back to, such as Prolific."""

    participant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,40}$")] = "PROLIFIC_PID"
    """The field of the address that holds a participant's id."""
    code: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
    """What a participant is shown at the end."""
    back: Annotated[str, AfterValidator(_link)] | None = None
    """A link to the platform, where {code} stands for the code."""
    most: Annotated[int, Field(ge=1)] = 1000
    """Participants."""


class Study(Strict):
    """Everything but the pictures that are judged."""

    title: Words | None = None
    consent: Words | None = None
    instructions: Words | None = None
    blurred: bool = False
    """Whether pictures are hidden until the rater asks."""
    answers: Annotated[int, Field(ge=1)] | None = None
    """Of each rater; None for as many as there are items."""
    question: Annotated[list[Asked], Field(min_length=1, max_length=10)]
    example: list[KnownItem] = Field(default_factory=list)
    practice: list[KnownItem] = Field(default_factory=list)
    gold: list[KnownItem] = Field(default_factory=list)
    checks: Checks | None = None
    platform: Platform | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [question.name for question in self.question]
        if len(set(names)) != len(names):
            raise ValueError("each question needs a name of its own")
        for question in self.question:
            if question.text is None and not is_known(question):
                raise ValueError(f"the question {question.name} has no text")
        for part in ("example", "practice", "gold"):
            for n, item in enumerate(getattr(self, part)):
                try:
                    self.answer_of(item)
                except (KeyError, ValueError) as problem:
                    raise ValueError(f"{part}[{n}]: {problem.args[0]}") from problem
        return self

    def asked(self, name: str) -> Question:
        """The question of this name.

        Raises:
            KeyError: there is none.
        """
        for question in self.question:
            if question.name == name:
                return question
        raise KeyError(f"there is no question {name!a}")

    def answer_of(self, item: KnownItem) -> Answer:
        """What is right.

        Raises:
            KeyError: it is of no question.
            ValueError: its answer or its pictures do not fit its question.
        """
        question, number = self.asked(item.question), len(item.pictures)
        if {"pairs": number != 2, "scale": number != 1}.get(question.kind, number < 2):
            needed = {"pairs": "2 pictures", "scale": "1 picture"}.get(question.kind, "several")
            raise ValueError(f"{question.name} is asked of {needed}, not of {number}")
        return question.right(number, item.answer)

    @property
    def known(self) -> list[KnownItem]:
        """All pictures with a known answer."""
        return [*self.example, *self.practice, *self.gold]

    @property
    def plain(self) -> tuple[Kind, str] | None:
        """Kind and question, where a round has no more than these."""
        first = self.question[0]
        if not is_known(first):
            return None
        bare = Study(question=[type(first)(name=first.name)], blurred=self.blurred)
        return (first.kind, first.name) if self == bare else None


STUDY: TypeAdapter[Study] = TypeAdapter(Study)


def is_known(question: Question) -> bool:
    """Whether the page has words for it."""
    return question.name in get_args(Known) and question.kind in ("tags", "pairs")


def one_question(
    kind: Kind = "tags", question: str | None = None, *, blurred: bool | None = None, **more: Any
) -> Study:
    """A study of one question and nothing else.

    Args:
        kind: of the question.
        question: a known one, or what raters are asked; None for the kind's usual one.
        blurred: whether pictures are hidden at first; None where they may be unsafe.
        more: fields of the question, such as `scale` or `comment`.

    Raises:
        UserError: it has no words.
    """
    question = question or {"tags": "deformed", "pairs": "better"}.get(kind)
    if question is None:
        raise UserError(f'A {kind} needs a --question, such as "How real does it look?".')
    known = question in get_args(Known) and kind in ("tags", "pairs")
    words: dict[str, Any] = {"name": question} if known else {"name": kind, "text": question}
    hidden = question == "unsafe" if blurred is None else blurred
    try:
        return Study(question=[KINDS[kind](**words, **more)], blurred=hidden)
    except ValidationError as problem:
        said = problem.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"This cannot be asked: {said}. Change --question or --scale.") from problem
