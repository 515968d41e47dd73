"""How often scorers rank two pictures of an item as people did, beside how far raters agree.

Every two pictures of an item are a pair. Two shares are told of each scorer, which is taken to
prefer the larger score and has half a hit where it gives both the same:

- of the pairs, ranked by the mean of what their raters said; those that came out even are left out;
- of the single judgements, each pair counting once. Raters are measured in the same way against
  each other, so that the two can be compared. "Equal" is no judgement here and left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.experience.dataset import Group, Picture, Table, whole
from d3po_bench.feedback.shares import clustered
from d3po_bench.types import Scorer
from eval.measure import scored

Floats = NDArray[np.float64]

BATCH = 16
"""Pictures of one size that a scorer gets at once."""


@dataclass(frozen=True)
class Share:
    """A share of pairs or judgements, 0 to 1, with its 95 % interval."""

    value: float
    low: float
    high: float
    pairs: int
    """On which it rests."""
    clusters: int
    """Prompts, or items where all have one prompt: pairs of one are not independent."""


class Pair(NamedTuple):
    """Two pictures of a group."""

    group: int
    one: int
    other: int
    people: float
    """Above 0 where people prefer `one`, below where they prefer `other`; 0 is even."""
    raters: tuple[float, ...]
    """The same by each rater who prefers one of them."""


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Every two pictures of each group."""
    found = []
    for number, group in enumerate(groups):
        for i, j in combinations(range(len(group.pictures)), 2):
            # Rounded, as means of equal judgements may differ in their last digit.
            people, *each = (round(said[i] - said[j], 9) for said in (group.scores, *group.said))
            judged = tuple(d for d in each if abs(d) > 0)  # nan, of who saw one alone, is not
            found.append(Pair(number, i, j, people, judged))
    return found


def of_scorer(
    pairs: Sequence[Pair], scores: Sequence[Floats], clusters: Sequence[Any]
) -> dict[str, Any]:
    """How often a scorer ranks as people did: `people`, `votes`, and its `ties`.

    Args:
        pairs: of groups; those that the scorer has no number for do not count.
        scores: of each group's pictures.
        clusters: which each group belongs to.
    """
    said = [(p, float(scores[p.group][p.one] - scores[p.group][p.other])) for p in pairs]
    known = [(clusters[pair.group], pair, d) for pair, d in said if not math.isnan(d)]
    people = [(c, _hit(d, pair.people)) for c, pair, d in known if pair.people]
    votes = [(c, fmean(_hit(d, r) for r in pair.raters)) for c, pair, d in known if pair.raters]
    ties = sum(d == 0 for _, pair, d in known if pair.people)
    return {"people": asdict(_share(people)), "votes": asdict(_share(votes)), "ties": ties}


def of_raters(pairs: Sequence[Pair], clusters: Sequence[Any]) -> Share | None:
    """How often two raters of a pair prefer the same; None where no pair has two."""
    hits = [
        (clusters[p.group], fmean(_hit(*two) for two in combinations(p.raters, 2)))
        for p in pairs
        if len(p.raters) > 1
    ]
    return _share(hits) if hits else None


def _hit(one: float, other: float) -> float:
    """1 for the same sign, 0 for another, half where one is 0."""
    return float(np.sign(one) * np.sign(other) + 1) / 2


def _share(hits: Sequence[tuple[Any, float]]) -> Share:
    """Of hits, each with its cluster."""
    clusters, values = [c for c, _ in hits], [hit for _, hit in hits]
    low, high = clustered(values, clusters)
    return Share(fmean(values) if values else math.nan, low, high, len(values), len({*clusters}))


# ---- scoring the pictures


def scores_of(
    table: Table, scorers: Mapping[str, Scorer], told: Callable[[float, float], None]
) -> dict[str, list[Floats]]:
    """Column -> scores of the pictures of each group, each picture scored once for its prompt.

    Args:
        table: whose pictures are opened in their own size.
        scorers: name -> scorer.
        told: called with how many are scored, and how many there are.

    Raises:
        UserError: a picture is damaged.
    """
    asked = dict.fromkeys((p, group.prompt) for group in table.groups for p in group.pictures)
    found: dict[str, dict[tuple[Picture, str], float]] = {}
    done = 0
    told(done, len(asked))
    for keys, images in _batches(table, list(asked)):
        for column, values in scored(images, [prompt for _, prompt in keys], scorers).items():
            found.setdefault(column, {}).update(zip(keys, values.tolist(), strict=True))
        done += len(keys)
        told(done, len(asked))
    return {
        column: [np.array([known[p, g.prompt] for p in g.pictures]) for g in table.groups]
        for column, known in found.items()
    }


def _batches(
    table: Table, asked: Sequence[tuple[Picture, str]]
) -> Iterator[tuple[list[tuple[Picture, str]], Tensor]]:
    """Pictures of one size together, as [N, 3, h, w] uint8."""
    waiting: dict[tuple[int, int], list[tuple[tuple[Picture, str], Tensor]]] = {}
    for key in asked:
        picture = whole(key[0], table.parquet)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        batch = waiting.setdefault(picture.size, [])
        batch.append((key, image))
        if len(batch) == BATCH:
            yield [k for k, _ in batch], torch.stack([i for _, i in batch])
            batch.clear()
    for batch in filter(None, waiting.values()):
        yield [k for k, _ in batch], torch.stack([i for _, i in batch])


# ---- what is told of it


def compare(
    table: Table, scorers: Mapping[str, Scorer], told: Callable[[float, float], None]
) -> dict[str, Any]:
    """Agreement of each scorer's columns and of raters with people's judgements, for programs.

    Raises:
        UserError: no two pictures of an item were judged differently, or a picture is damaged.
    """
    pairs = pairs_of(table.groups)
    decided = sum(pair.people != 0 for pair in pairs)
    if not decided:
        raise UserError(
            f"No two pictures of an item were judged differently in this {table.layout} data, so "
            "there is nothing to rank. Give judgements of several pictures of one prompt."
        )
    prompts = [group.prompt for group in table.groups]
    by_prompt = len({*prompts}) > 1
    clusters = prompts if by_prompt else list(range(len(prompts)))
    columns = scores_of(table, scorers, told)
    raters = of_raters(pairs, clusters)
    return {
        "layout": table.layout, "content": table.content, "items": len(table.groups),
        "pairs": len(pairs), "even": len(pairs) - decided,
        "clustered_by": "prompt" if by_prompt else "item",
        "scorers": {c: of_scorer(pairs, s, clusters) for c, s in columns.items()},
        "raters": asdict(raters) if raters else None,
    }  # fmt: skip


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The same as a table for people, the best scorer first."""
    rows = sorted(found["scorers"].items(), key=lambda row: -row[1]["people"]["value"])
    shown = [
        (name, _text(s["people"]), _text(s["votes"]), f"{s['people']['pairs']:,}", f"{s['ties']:,}")
        for name, s in rows
    ]
    if found["raters"]:
        shown.append(("another rater", "", _text(found["raters"]), "", ""))
    titles = ("", "as people (95 % interval)", "as one rater (95 % interval)", "pairs", "ties")
    widths = [max(len(row[n]) for row in (titles, *shown)) for n in range(len(titles))]
    for row in (titles, *shown):
        yield "  ".join(
            f"{cell:{'<' if n < 3 else '>'}{width}}"
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def _text(share: Mapping[str, Any]) -> str:
    if not share["pairs"]:
        return "-"
    ends = f" ({share['low']:.1%} to {share['high']:.1%})" if share["clusters"] > 1 else ""
    return f"{share['value']:.1%}{ends}"


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers are, in sentences."""
    yield (
        f"{found['pairs']:,} pairs of {found['items']:,} items ({found['layout']}); "
        f"{found['even']:,} came out even and are left out. A scorer's tie is half a hit. "
        f"Intervals are clustered by {found['clustered_by']}."
    )
    if not found["raters"]:
        yield "No two raters ranked the same pair, so how far people agree is not known."
