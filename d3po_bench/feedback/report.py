"""How a round goes, for people and for programs, and which raters to look at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal

from d3po_bench.feedback.agreement import on_gold, quality, summary
from d3po_bench.feedback.rounds import Progress, Round, Vote

Concern = Literal["fast", "gold"]
FLAGS: Mapping[Concern, str] = {"fast": "too fast", "gold": "fails known answers"}
LEAST_GOLD = 3
"""Known answers before a rater's share of them says something."""


def concerns(round_: Round, votes: Sequence[Vote]) -> list[Concern]:
    """What is wrong with a rater's votes, by the study's checks; nothing where it has none.

    Args:
        round_: what is judged.
        votes: of one rater, practice left out.
    """
    checks = round_.study.checks
    if checks is None or not votes:
        return []
    found: list[Concern] = []
    times = [vote.milliseconds for vote in votes]
    if len(times) >= checks.after and median(times) < 1000 * checks.seconds:
        found.append("fast")
    gold = on_gold(round_, votes)
    if gold.of >= LEAST_GOLD and (gold.value or 0) < checks.gold:
        found.append("gold")
    return found


def flags(round_: Round, votes: Sequence[Vote]) -> list[str]:
    """The same in words; of practice nothing is said."""
    return [FLAGS[concern] for concern in concerns(round_, round_.real(votes))]


def by_rater(votes: Sequence[Vote]) -> dict[str, list[Vote]]:
    """Votes of each rater."""
    found: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        found[vote.rater].append(vote)
    return found


def report(round_: Round, votes: Sequence[Vote], progress: Progress) -> Iterator[str]:
    """How far a round is and how far its votes can be trusted, in lines."""

    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return str(value) if isinstance(value, int) else f"{value:.3f}"

    yield f"{progress.done} of {progress.done + progress.left} items complete"
    for part in round_.parts:
        about = f"{part.question.name}: " if len(round_.parts) > 1 else ""
        for name, value in summary(part, part.of(votes)).items():
            yield f"{about}{name.replace('_', ' ')}: {shown(value)}"
    mine = by_rater(round_.real(votes))
    for q in quality(round_, votes):
        found = concerns(round_, mine[q.rater])
        yield (
            f"{q.rater}: {q.votes} votes, {q.seconds:.1f} s each, gold right "
            f"{shown(q.gold.value)}, same again {shown(q.consistent.value)}, with others "
            f"{shown(q.with_others)}" + "".join(f", {FLAGS[concern]}" for concern in found)
        )


def state(round_: Round, votes: Sequence[Vote], progress: Progress) -> dict[str, Any]:
    """The same for programs."""
    mine = by_rater(round_.real(votes))
    by_question = {part.question.name: summary(part, part.of(votes)) for part in round_.parts}
    one = {} if len(by_question) > 1 else next(iter(by_question.values()))
    return {
        "complete": progress.done, "items": progress.done + progress.left, **one,
        "by_question": by_question,
        "by_rater": [
            {
                "rater": q.rater, "votes": q.votes, "seconds": q.seconds,
                "gold_right": q.gold.value, "same_again": q.consistent.value,
                "with_others": q.with_others, "flags": concerns(round_, mine[q.rater]),
            }
            for q in quality(round_, votes)
        ],
    }  # fmt: skip
