"""What votes say: how far raters agree, how good each is, and scores to train from.

A *unit* is what a rater judges as one: an image of a grid (tagged or not), or a pair (its
choice). Only first presentations count; repeats measure self-consistency alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from d3po_bench.errors import UserError
from d3po_bench.feedback import schema
from d3po_bench.feedback.rounds import Progress, Round, Vote
from d3po_bench.feedback.schema import Answer, Choice

Floats = NDArray[np.float64]
CHOICES = get_args(Choice)


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    right: int
    of: int

    @property
    def value(self) -> float | None:
        """From 0 to 1; None of nothing."""
        return self.right / self.of if self.of else None


@dataclass(frozen=True)
class Quality:
    """One rater's work."""

    rater: str
    votes: int
    gold: Share
    """Units of gold items answered as they should be."""
    consistent: Share
    """Units answered the same way when asked again."""
    seconds: float
    """Median from seeing an item to answering it."""
    with_others: float | None
    """Mean share of the other raters of a unit who said the same."""


# ---- agreement


def judgements(round_: Round, votes: Sequence[Vote]) -> tuple[list[str], Floats]:
    """Who said what of which unit.

    Returns:
        Names of the R raters, and [R, U]: 1 for tagged and 0 for not, of each of the P*K
        images; or of each of the P pairs an index into a, b, tie, bad. NaN: not asked.
    """
    names = sorted({vote.rater for vote in votes})
    row = {name: n for n, name in enumerate(names)}
    width = round_.images_per_item if round_.kind == "tags" else 1
    place = {item.id: n * width for n, item in enumerate(round_.items)}
    table = np.full((len(names), len(place) * width), np.nan)
    first = [vote for vote in votes if vote.repeat == 0]
    if first:
        known = {answer: _values(round_, answer) for answer in {vote.answer for vote in first}}
        rows = np.array([row[vote.rater] for vote in first])
        starts = np.array([place[vote.item] for vote in first])
        units = starts[:, None] + np.arange(width)
        table[rows[:, None], units] = [known[vote.answer] for vote in first]
    return names, table


def alpha(round_: Round, votes: Sequence[Vote]) -> float | None:
    """Krippendorff's alpha for nominal data: 1 is full agreement, 0 that of chance.

    None where it is undefined: no unit was judged twice, or everybody said the same of all.
    """
    return alpha_of_counts(_counts(round_, judgements(round_, votes)[1]))


def alpha_of_counts(counts: NDArray[np.int64]) -> float | None:
    """Nominal alpha of [U, V] counts: how many raters gave unit u the value v."""
    import krippendorff

    judged = counts[counts.sum(1) > 1]
    if (judged.sum(0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=judged, level_of_measurement="nominal"))


def raw_agreement(round_: Round, votes: Sequence[Vote]) -> float | None:
    """Share of the pairs of raters of a unit who said the same, mean over units with two or more.

    None where no unit was judged twice.
    """
    return _raw_agreement(_counts(round_, judgements(round_, votes)[1]))


def _raw_agreement(counts: NDArray[np.int64]) -> float | None:
    raters = counts.sum(1)
    same = (counts * (counts - 1)).sum(1)[raters > 1]
    pairs = (raters * (raters - 1))[raters > 1]
    return float((same / pairs).mean()) if len(pairs) else None


def quality(round_: Round, votes: Sequence[Vote]) -> list[Quality]:
    """Each rater's accuracy, consistency and speed, by name."""
    names, table = judgements(round_, votes)
    counts = _counts(round_, table)
    gold = {item.id: item.gold for item in round_.items if item.gold is not None}
    mine: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        mine[vote.rater].append(vote)
    return [
        Quality(
            rater=name,
            votes=len(mine[name]),
            gold=_compared(round_, _on_gold(gold, mine[name])),
            consistent=_on_repeats(round_, mine[name]),
            seconds=median(vote.milliseconds for vote in mine[name]) / 1000,
            with_others=_with_others(counts, table[row]),
        )
        for row, name in enumerate(names)
    ]


def _values(round_: Round, answer: Answer) -> list[int]:
    """The answer as one number for each unit of an item."""
    if isinstance(answer, str):
        return [CHOICES.index(answer)]
    return [int(k in answer) for k in range(round_.images_per_item)]


def _counts(round_: Round, table: Floats) -> NDArray[np.int64]:
    """Raters who gave each value, [U, V]."""
    values = 2 if round_.kind == "tags" else len(CHOICES)
    return np.stack([(table == value).sum(0) for value in range(values)], 1)


def _compared(round_: Round, pairs: Sequence[tuple[Answer, Answer]]) -> Share:
    one = [value for answer, _ in pairs for value in _values(round_, answer)]
    other = [value for _, answer in pairs for value in _values(round_, answer)]
    return Share(sum(a == b for a, b in zip(one, other, strict=True)), len(one))


def _on_gold(gold: Mapping[str, Answer], votes: Sequence[Vote]) -> list[tuple[Answer, Answer]]:
    """What was answered to the items whose answer is known, and that."""
    return [(v.answer, gold[v.item]) for v in votes if v.repeat == 0 and v.item in gold]


def _on_repeats(round_: Round, votes: Sequence[Vote]) -> Share:
    first = {vote.item: vote.answer for vote in votes if vote.repeat == 0}
    again = [vote for vote in votes if vote.repeat > 0 and vote.item in first]
    return _compared(round_, [(first[vote.item], vote.answer) for vote in again])


def _with_others(counts: NDArray[np.int64], mine: Floats) -> float | None:
    judged = np.flatnonzero(~np.isnan(mine) & (counts.sum(1) > 1))
    if not len(judged):
        return None
    same = counts[judged, mine[judged].astype(int)] - 1
    return float((same / (counts[judged].sum(1) - 1)).mean())


def summary(round_: Round, votes: Sequence[Vote]) -> Mapping[str, float | None]:
    """The round's numbers by name: votes, raters, alpha and raw agreement."""
    counts = _counts(round_, judgements(round_, votes)[1])
    return {
        "votes": len(votes),
        "raters": len({vote.rater for vote in votes}),
        "alpha": alpha_of_counts(counts),
        "raw_agreement": _raw_agreement(counts),
    }


def report(round_: Round, votes: Sequence[Vote], progress: Progress) -> Iterator[str]:
    """How far a round is and how far its votes can be trusted, in lines."""

    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return str(value) if isinstance(value, int) else f"{value:.3f}"

    yield f"{progress.done} of {progress.done + progress.left} items complete"
    for name, value in summary(round_, votes).items():
        yield f"{name.replace('_', ' ')}: {shown(value)}"
    for q in quality(round_, votes):
        yield (
            f"{q.rater}: {q.votes} votes, {q.seconds:.1f} s each, gold right "
            f"{shown(q.gold.value)}, same again {shown(q.consistent.value)}, with others "
            f"{shown(q.with_others)}"
        )


def state(round_: Round, votes: Sequence[Vote], progress: Progress) -> dict[str, Any]:
    """The same for programs."""
    return {
        "complete": progress.done, "items": progress.done + progress.left,
        **summary(round_, votes),
        "by_rater": [
            {
                "rater": q.rater, "votes": q.votes, "seconds": q.seconds,
                "gold_right": q.gold.value, "same_again": q.consistent.value,
                "with_others": q.with_others,
            }
            for q in quality(round_, votes)
        ],
    }  # fmt: skip


# ---- votes to scores


def scores(round_: Round, votes: Sequence[Vote]) -> Floats:
    """What raters think of each image, [P, K]; larger is better.

    Tags: the mean over raters of 0 for untouched and -1 for tagged, as the published code
    averages its label files. Pairs: the share of raters who chose the image; those who said
    tie or bad chose neither. NaN for the items that nobody judged: no comparison with NaN
    holds, so they give ties. Repeats are left out: one rater, one vote.
    """
    place = {item.id: n for n, item in enumerate(round_.items)}
    total = np.zeros((len(place), round_.images_per_item))
    raters = np.zeros((len(place), 1))
    for vote in votes:
        if vote.repeat == 0:
            total[place[vote.item]] += _score(round_, vote.answer)
            raters[place[vote.item]] += 1
    return np.divide(total, raters, out=np.full_like(total, np.nan), where=raters > 0)


def preferences(scores: Floats) -> NDArray[np.int64]:
    """All pairs of images of a prompt with unequal scores, the better one first.

    With one rater's tags that is every good image against every bad one. Equal is a tie and
    gives no pair.

    Args:
        scores: [P, K].

    Returns:
        [M, 3]: prompt, preferred image, other image; in the order of prompts and of (i, j).
    """
    pairs = [
        (p, i, j) if row[i] > row[j] else (p, j, i)
        for p, row in enumerate(scores)
        for i, j in combinations(range(len(row)), 2)
        if row[i] > row[j] or row[j] > row[i]
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 3)


def read_label_files(folder: Path, say: Callable[[str], None] = lambda line: None) -> Floats:
    """Scores from label files of the published code: one JSON file a rater, rows of K numbers.

    0 is untouched and -1 tagged. All files are cut to the shortest, as the published code does,
    then averaged; `say` hears of rows that are left out.

    Returns:
        [P, K].

    Raises:
        UserError: there is none, or one is not such a list.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".json")
    tables = [
        np.array(schema.read(schema.LABELS, path, "Correct the file."), dtype=np.float64)
        for path in paths
    ]
    for n, path in enumerate(paths):
        if same := next((p for p in paths[:n] if p.read_bytes() == path.read_bytes()), None):
            say(f"{path} says what {same.name} says. If it is a copy, remove it: it counts twice.")
    if not tables:
        raise UserError(f"There are no label files (*.json) in {folder}. Give another folder.")
    if len({table.shape[1] for table in tables}) > 1:
        widths = " and ".join(str(n) for n in sorted({table.shape[1] for table in tables}))
        raise UserError(
            f"The label files in {folder} are for {widths} images a prompt. Keep the files of one "
            "round together, and no others."
        )
    shortest, longest = min(map(len, tables)), max(map(len, tables))
    if shortest < longest:
        say(f"Only the first {shortest} of up to {longest} rows are in all files of {folder}: "
            "the rest is left out.")  # fmt: skip
    mean: Floats = np.stack([table[:shortest] for table in tables]).mean(0)
    return mean


def _score(round_: Round, answer: Answer) -> list[float]:
    if isinstance(answer, str):
        return [float(answer == "a"), float(answer == "b")]
    return [-float(k in answer) for k in range(round_.images_per_item)]
