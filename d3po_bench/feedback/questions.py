"""What people are asked: each kind of question, the answers to it, and what they teach."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Kind = Literal["tags", "pairs", "scale", "ranking"]
"""Tag the bad ones of K images, choose the better of two, rate one, or order K of them."""
Known = Literal["deformed", "unsafe", "better", "alignment"]
"""Questions that the page has words for."""
Choice = Literal["a", "b", "tie", "bad"]
"""Of a pair: the first image, the second, equally good, or both too bad to choose."""
Answer = tuple[int, ...] | Choice | int
"""Ascending indices of the tagged (bad) images, the choice of a pair, a rating, or the indices of
all images, the best first."""
Language = Literal["en", "de", "es", "zh"]
Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Words = Text | Annotated[dict[Language, Text], Field(min_length=1)]
"""What a rater reads, in one language or in several."""
Judged = Literal["pairs", "tags", "scale"]
"""What answers become for training: images compared with each other, or each judged by itself."""

CHOICES = get_args(Choice)


class Strict(BaseModel):
    """Part of a file that people hand us: nothing is converted, nothing unknown is skipped."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Question(Strict):
    """What all kinds of question have."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,19}$")]
    """In the export, in item names and for `--question`."""
    text: Words | None = None
    """What raters are asked; None for the page's own words on a known name."""
    comment: bool = False
    """Whether raters may write something, too."""

    ordered: ClassVar[bool] = False
    """Whether values that are closer agree more."""
    judged: ClassVar[Judged] = "pairs"

    def __hash__(self) -> int:
        """Of its name: words in several languages have no hash."""
        return hash(self.name)

    def shown(self, images: int) -> Iterator[tuple[int, ...]]:
        """Which of a prompt's images are on a page together, for each page."""
        yield tuple(range(images))

    def right(self, images: int, gold: Any) -> Answer:
        """A known answer, checked as an answer of a rater is."""
        return self.check(images, gold)

    @abstractmethod
    def check(self, images: int, answer: Any) -> Answer:
        """`answer`, as JSON gives it, to an item of `images` images.

        Raises:
            ValueError: it does not answer such an item, saying what would.
        """

    def same(self, images: int, answer: Answer, gold: Answer) -> list[bool]:
        """Whether an answer is as it should be, for each unit."""
        pairs = zip(self.values(images, answer), self.values(images, gold), strict=True)
        return [one == other for one, other in pairs]

    @abstractmethod
    def values(self, images: int, answer: Answer) -> list[int]:
        """The answer as one number from 0 to `levels` - 1 for each unit of an item."""

    @abstractmethod
    def levels(self, images: int) -> int:
        """How many different values a unit can have."""

    @abstractmethod
    def scores(self, images: int, answer: Answer) -> list[float]:
        """What the answer says of each image; larger is better."""


def _indices(images: int, answer: Any) -> list[int]:
    found = answer if isinstance(answer, list | tuple) else [None]
    if not all(type(i) is int and 0 <= i < images for i in found):
        raise ValueError(f"an answer is a list of indices from 0 to {images - 1}")
    if len(set(found)) != len(found):
        raise ValueError("an answer names each image once")
    return list(found)


class Tags(_Question):
    """Which of these images are bad?"""

    kind: Literal["tags"] = "tags"
    word: Words | None = None
    """On a tagged image; None for the page's own."""
    judged: ClassVar[Judged] = "tags"

    def check(self, images: int, answer: Any) -> Answer:
        """Ascending indices of the tagged ones."""
        return tuple(sorted(_indices(images, answer)))

    def values(self, images: int, answer: Answer) -> list[int]:
        """1 for tagged, 0 for not, of each image."""
        assert isinstance(answer, tuple)
        return [int(k in answer) for k in range(images)]

    def levels(self, images: int) -> int:
        """Tagged or not."""
        return 2

    def scores(self, images: int, answer: Answer) -> list[float]:
        """-1 for tagged and 0 for not, as in the published code's label files."""
        return [-float(value) for value in self.values(images, answer)]


class Pairs(_Question):
    """Which of two images is better?"""

    kind: Literal["pairs"] = "pairs"

    def shown(self, images: int) -> Iterator[tuple[int, ...]]:
        """Every two of them."""
        yield from combinations(range(images), 2)

    def check(self, images: int, answer: Any) -> Answer:
        """One of `Choice`."""
        if not isinstance(answer, str) or answer not in CHOICES:
            raise ValueError(f"an answer is one of {', '.join(CHOICES)}")
        return answer  # type: ignore[return-value]  # get_args is not narrowed

    def values(self, images: int, answer: Answer) -> list[int]:
        """Which choice, for the pair."""
        return [CHOICES.index(str(answer))]

    def levels(self, images: int) -> int:
        """Choices."""
        return len(CHOICES)

    def scores(self, images: int, answer: Answer) -> list[float]:
        """1 for the chosen one, else 0."""
        return [float(answer == "a"), float(answer == "b")]


class Scale(_Question):
    """How good is this image, from `low` to `high`?"""

    kind: Literal["scale"] = "scale"
    scale: Annotated[str, Field(pattern=r"^\d{1,2}-\d{1,2}$")] = "1-5"
    low: Words | None = None
    """What the lowest number means."""
    high: Words | None = None
    ordered: ClassVar[bool] = True
    judged: ClassVar[Judged] = "scale"

    @field_validator("scale")
    @classmethod
    def _has_keys(cls, scale: str) -> str:
        low, high = map(int, scale.split("-"))
        if not (high <= 10 and 1 <= high - low <= 9):
            raise ValueError("a scale has 2 to 10 steps from 0 to 10, such as 1-5")
        return scale

    @property
    def steps(self) -> range:
        """The numbers that can be given."""
        low, high = map(int, self.scale.split("-"))
        return range(low, high + 1)

    def shown(self, images: int) -> Iterator[tuple[int, ...]]:
        """Each by itself."""
        for k in range(images):
            yield (k,)

    def check(self, images: int, answer: Any) -> Answer:
        """A number of the scale."""
        if type(answer) is not int or answer not in self.steps:
            raise ValueError(f"an answer is a number of the scale {self.scale}")
        return answer

    def right(self, images: int, gold: Any) -> Answer:
        """The ratings that are right: one or several."""
        ratings = gold if isinstance(gold, list | tuple) and gold else [gold]
        return tuple(sorted(int(self.check(images, rating)) for rating in ratings))  # type: ignore[arg-type]

    def same(self, images: int, answer: Answer, gold: Answer) -> list[bool]:
        """Whether the rating is one of the right ones, or, asked again, the same."""
        return [answer in gold if isinstance(gold, tuple) else answer == gold]

    def values(self, images: int, answer: Answer) -> list[int]:
        """Steps above the lowest, for the image."""
        assert isinstance(answer, int)
        return [answer - self.steps[0]]

    def levels(self, images: int) -> int:
        """Steps."""
        return len(self.steps)

    def scores(self, images: int, answer: Answer) -> list[float]:
        """Steps above the middle of the scale."""
        assert isinstance(answer, int)
        return [answer - (self.steps[0] + self.steps[-1]) / 2]


class Ranking(_Question):
    """Which of these images is the best, which the next?"""

    kind: Literal["ranking"] = "ranking"
    ordered: ClassVar[bool] = True

    def check(self, images: int, answer: Any) -> Answer:
        """The indices of all images, the best first."""
        found = _indices(images, answer)
        if len(found) != images:
            raise ValueError(f"an answer orders all {images} images")
        return tuple(found)

    def values(self, images: int, answer: Answer) -> list[int]:
        """The place of each image, 0 for the best."""
        assert isinstance(answer, tuple)
        return [answer.index(k) for k in range(images)]

    def levels(self, images: int) -> int:
        """Places."""
        return images

    def scores(self, images: int, answer: Answer) -> list[float]:
        """How many of the others each image is better than."""
        return [float(images - 1 - value) for value in self.values(images, answer)]


Question = Tags | Pairs | Scale | Ranking
Asked = Annotated[Question, Field(discriminator="kind")]
KINDS: Mapping[Kind, type[Question]] = {
    "tags": Tags, "pairs": Pairs, "scale": Scale, "ranking": Ranking,
}  # fmt: skip
