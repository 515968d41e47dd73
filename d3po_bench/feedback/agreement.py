"""What votes say: how far raters agree, how good each is, and scores to train from.

A *unit* is what a rater judges as one: an image (tagged or not, a rating, a place in a ranking),
or a pair (its choice). Only first presentations count; repeats measure self-consistency alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from d3po_bench.errors import UserError
from d3po_bench.feedback import schema
from d3po_bench.feedback.questions import Answer
from d3po_bench.feedback.rounds import Part, Round, Vote

Floats = NDArray[np.float64]


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


def judgements(part: Part, votes: Sequence[Vote]) -> tuple[list[str], Floats]:
    """Who said what of which unit.

    Returns:
        Names of the R raters, and [R, U]: a value from 0 of each unit, which is an image or a
        pair. NaN: not asked.
    """
    names = sorted({vote.rater for vote in votes})
    row = {name: n for n, name in enumerate(names)}
    first = [vote for vote in votes if vote.repeat == 0]
    known = {answer: _values(part, answer) for answer in {vote.answer for vote in first}}
    width = len(next(iter(known.values()), ()))
    place = {item.id: n * width for n, item in enumerate(part.items)}
    table = np.full((len(names), len(place) * width), np.nan)
    if first:
        rows = np.array([row[vote.rater] for vote in first])
        starts = np.array([place[vote.item] for vote in first])
        units = starts[:, None] + np.arange(width)
        table[rows[:, None], units] = [known[vote.answer] for vote in first]
    return names, table


def alpha(part: Part, votes: Sequence[Vote]) -> float | None:
    """Krippendorff's alpha: 1 is full agreement, 0 that of chance.

    For nominal data; for ordinal ones where the question's values have an order. None where it is
    undefined: no unit was judged twice, or everybody said the same of all.
    """
    return alpha_of_counts(_open(part, votes), part.question.ordered)


def alpha_of_counts(counts: NDArray[np.int64], ordered: bool = False) -> float | None:
    """Alpha of [U, V] counts: how many raters gave unit u the value v."""
    import krippendorff

    judged = counts[counts.sum(1) > 1]
    if (judged.sum(0) > 0).sum() < 2:
        return None
    level: Literal["ordinal", "nominal"] = "ordinal" if ordered else "nominal"
    return float(krippendorff.alpha(value_counts=judged, level_of_measurement=level))


def raw_agreement(part: Part, votes: Sequence[Vote]) -> float | None:
    """Share of the pairs of raters of a unit who said the same, mean over units with two or more.

    None where no unit was judged twice.
    """
    return _mean(_same(_open(part, votes)))


def summary(part: Part, votes: Sequence[Vote]) -> Mapping[str, float | None]:
    """The numbers of a question by name: votes, raters, alpha and raw agreement."""
    counts = _open(part, votes)
    return {
        "votes": len(votes),
        "raters": len({vote.rater for vote in votes}),
        "alpha": alpha_of_counts(counts, part.question.ordered),
        "raw_agreement": _mean(_same(counts)),
    }


def disagreement(part: Part, votes: Sequence[Vote]) -> dict[str, float]:
    """How far raters of an item differ, by its name: 0 if all agree.

    The share of pairs of raters who said something else, mean over its units; where values have
    an order, their distance, as a part of the largest. Items that fewer than two judged are left
    out.
    """
    counts = _counts(part, judgements(part, votes)[1])
    apart = 1 - _same(counts)
    if part.question.ordered:
        apart = _distance(counts)
    found = apart.reshape(len(part.items), -1).mean(1) if len(apart) else apart
    said = zip(part.items, found.tolist(), strict=False)
    return {item.id: value for item, value in said if not np.isnan(value)}


def _mean(values: Floats) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _same(counts: NDArray[np.int64]) -> Floats:
    """Share of the pairs of raters of each unit who said the same, [U]; NaN: there is none."""
    raters = counts.sum(1)
    same, pairs = (counts * (counts - 1)).sum(1), raters * (raters - 1)
    shares: Floats = np.divide(same, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)
    return shares


def _distance(counts: NDArray[np.int64]) -> Floats:
    """Mean distance of two raters of each unit, in parts of the largest, [U]."""
    raters, values = counts.sum(1), np.arange(counts.shape[1])
    apart = np.abs(values[:, None] - values) / max(len(values) - 1, 1)
    total, pairs = np.einsum("uv,vw,uw->u", counts, apart, counts), raters * (raters - 1)
    mean: Floats = np.divide(total, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)
    return mean


def quality(round_: Round, votes: Sequence[Vote]) -> list[Quality]:
    """Each rater's accuracy, consistency and speed over all questions, by name."""
    mine: dict[str, list[Vote]] = defaultdict(list)
    agreeing: dict[str, list[float]] = defaultdict(list)
    for part in round_.parts:
        given = part.of(votes)
        names, table = judgements(part, given)
        counts = _counts(part, table)
        for name, row in zip(names, table, strict=True):
            agreeing[name] += _with_others(counts, row).tolist()
        for vote in given:
            mine[vote.rater].append(vote)
    return [
        Quality(
            rater=name,
            votes=len(given),
            gold=on_gold(round_, given),
            consistent=_on_repeats(round_, given),
            seconds=median(vote.milliseconds for vote in given) / 1000,
            with_others=float(np.mean(agreeing[name])) if agreeing[name] else None,
        )
        for name, given in sorted(mine.items())
    ]


def on_gold(round_: Round, votes: Sequence[Vote], *, practice: bool = False) -> Share:
    """How many units with a known answer were answered as they should be."""
    gold = {
        item.id: item.gold
        for item in round_.items
        if item.gold is not None and (item.use == "practice") == practice
    }
    return _compared(round_, [
        (v, gold[v.item]) for v in votes if v.repeat == 0 and v.item in gold
    ])  # fmt: skip


def _values(part: Part, answer: Answer) -> list[int]:
    return part.question.values(part.images_per_item, answer)


def _open(part: Part, votes: Sequence[Vote]) -> NDArray[np.int64]:
    """`_counts` without known answers, whose items are chosen so that all who look agree."""
    known = {item.id for item in part.items if item.gold is not None}
    return _counts(part, judgements(part, [vote for vote in votes if vote.item not in known])[1])


def _counts(part: Part, table: Floats) -> NDArray[np.int64]:
    """Raters who gave each value, [U, V]."""
    levels = part.question.levels(part.images_per_item)
    return np.stack([(table == value).sum(0) for value in range(levels)], 1)


def _compared(round_: Round, pairs: Sequence[tuple[Vote, Answer]]) -> Share:
    items = {item.id: item for item in round_.items}
    right = [
        same
        for vote, known in pairs
        for same in round_.asked(items[vote.item]).same(
            len(items[vote.item].images), vote.answer, known
        )
    ]
    return Share(sum(right), len(right))


def _on_repeats(round_: Round, votes: Sequence[Vote]) -> Share:
    first = {vote.item: vote.answer for vote in votes if vote.repeat == 0}
    again = [vote for vote in votes if vote.repeat > 0 and vote.item in first]
    return _compared(round_, [(vote, first[vote.item]) for vote in again])


def _with_others(counts: NDArray[np.int64], mine: Floats) -> Floats:
    """Share of the other raters who said the same, of each unit that others judged, too."""
    judged = np.flatnonzero(~np.isnan(mine) & (counts.sum(1) > 1))
    same = counts[judged, mine[judged].astype(int)] - 1
    shares: Floats = same / (counts[judged].sum(1) - 1)
    return shares


# ---- votes to scores


def scores(part: Part, votes: Sequence[Vote]) -> Floats:
    """What raters think of each image of each prompt, [P, K]; larger is better.

    The mean over raters of what their answers say of it, then over the items that show it. Tags: 0
    for untouched and -1 for tagged, as the published code averages its label files. Pairs: 1 for
    the chosen one; those who said tie or bad chose neither. Scales: steps above the middle.
    Rankings: images it is better than. NaN until all items that show an image have been answered:
    of some of its pairs alone, chance would say how good it is. No comparison with NaN holds, so
    they give ties. Repeats are left out: one rater, one vote.
    """
    items = [item for item in part.items if item.use == "main"]
    place: dict[str, dict[str, int]] = {}
    for item in items:
        columns = place.setdefault(item.group or item.id, {})
        for name in item.images:
            columns.setdefault(name, len(columns))
    rows = {group: n for n, group in enumerate(place)}
    where = {
        item.id: (
            rows[item.group or item.id],
            [place[item.group or item.id][n] for n in item.images],
        )
        for item in items
    }
    answers: dict[str, list[Floats]] = {name: [] for name in where}
    for vote in votes:
        if vote.repeat == 0 and vote.item in where:
            said = part.question.scores(len(where[vote.item][1]), vote.answer)
            answers[vote.item].append(np.array(said))
    total = np.zeros((len(place), max(map(len, place.values()))))
    shown = np.zeros_like(total)
    for name, (row, columns_) in where.items():
        # Of none the mean is NaN, and so is what it is added to.
        total[row, columns_] += sum(answers[name]) / len(answers[name]) if answers[name] else np.nan
        shown[row, columns_] += 1
    return np.divide(total, shown, out=np.full_like(total, np.nan), where=shown > 0)


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
