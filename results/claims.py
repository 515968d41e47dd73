"""What the tables of README.md and docs/ show, in words that are made from the tests.

A text between `<!-- made: claims-NAME -->` markers comes from here. See `eval.analysis.worded` for
when a difference counts as shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from eval.analysis import scored
from eval.analysis.gains import Groups, against, both_signs, contrast, rival_of
from eval.analysis.scores import Score, score_of
from eval.analysis.statistics import Difference, from_zero
from eval.analysis.worded import LEVEL, Words, adjusted, equivalent, power, said, within
from results import feedback as rounds

MARGINS = {"aesthetic": 0.2, "compress": 0.05, "incompress": 0.05}
"""Objective -> a difference that would not matter, in the score's unit.

Of the published runs it was set after they had been made, so it says how much such seeds can show,
and no more. Protocols of later runs state theirs before.
"""

FOLLOW = Words(
    "Follow the reward, by S above 0", "Go against it", "S is not shown to differ from 0"
)  # fmt: skip
"""What is said of S."""

DRIFT = Words(
    "Scores are shown to rise whichever way the reward points, D above 0",
    "Scores are shown to fall whichever way the reward points, D below 0",
    "D is not shown to differ from 0",
)  # fmt: skip
"""What is said of D."""

Tests = Mapping[tuple[str, str], Difference]
"""Two names, such as objective and method -> a test."""


def bullets(lines: Iterable[str]) -> str:
    """Sentences as a list."""
    return "\n".join(f"- {line}" for line in lines)


def gains(groups: Groups) -> str:
    """Which methods gain less or more than the rival, on each objective."""
    rival = rival_of(groups)
    scores = {group[1]: score_of(runs[0].files) for group, runs in groups.items()}
    return bullets(_compared(differences(groups), scores, rival))


def differences(groups: Groups) -> Tests:
    """Objective and method -> the difference to the rival's score at the end."""
    rival = rival_of(groups)
    return {
        (objective, method): against(runs, groups[model, objective, rival])
        for (model, objective, method), runs in groups.items()
        if method != rival
    }


def _compared(tests: Tests, scores: Mapping[str, Score], rival: str) -> Iterator[str]:
    p = adjusted(tests)
    same = within({key: (found, MARGINS[key[0]]) for key, found in tests.items()})
    for objective in sorted(scores):
        own = {method: found for (name, method), found in tests.items() if name == objective}
        score = scores[objective]
        means = {m: (score.sign * found.mean, p[objective, m]) for m, found in own.items()}
        open_ = {m: found for m, found in own.items() if p[objective, m] >= LEVEL}
        yield " ".join(filter(None, [
            f"**{objective}.**", said(means, than(rival)), power(open_, score.unit, len(tests)),
            equivalent(
                {m: same[objective, m] for m in open_}, MARGINS[objective], score.unit, rival
            ) if open_ else "",
        ]))  # fmt: skip


def than(rival: str) -> Words:
    """How gains are compared with a rival's."""
    return Words(f"Shown to gain more than {rival}", f"Shown to gain less than {rival}",
                 f"No difference to {rival} is shown")  # fmt: skip


def halves(groups: Groups) -> str:
    """Which methods follow the reward, and which drift in the score whatever it is."""
    s, d = shown_halves(groups)
    return bullets([said(s, FOLLOW), said(d, DRIFT)])


def shown_halves(groups: Groups) -> Iterator[dict[str, tuple[float, float]]]:
    """Of S, then of D: method -> the mean over seeds and its p-value, by Holm over both halves."""
    records = contrast(groups).records
    return ({r["method"]: (r[half], r[f"{half}_p"]) for r in records} for half in ("s", "d"))


def both_ways(groups: Groups) -> str:
    """Which methods move the score as asked, whichever way that is."""
    found = [
        method
        for (_, method), seeds in both_signs(groups).items()
        if from_zero([up for up, _ in seeds.values()]).low > 0
        and from_zero([down for _, down in seeds.values()]).high < 0
    ]
    return (
        "Gain on both objectives, by the 95 % interval of each, which S above 0 does not say: "
        f"{', '.join(found) or 'none'}."
    )


def by_first(tests: Tests, words: Words) -> str:
    """A line for each first part of the names of tests, p-values adjusted for all of them."""
    p = adjusted(tests)
    return bullets(
        f"**{first}.** "
        + said({b: (found.mean, p[a, b]) for (a, b), found in tests.items() if a == first}, words)
        for first in dict.fromkeys(first for first, _ in tests)
    )


def alignment(folder: Path) -> str:
    """Which gains of Table 1 are shown, of all its methods and columns together."""
    words = Words("Shown to gain in", "Shown to lose in", "Not shown to change")
    return by_first(scored.gained(folder), words)


def feedback(home: str) -> str:
    """Which rates rise over rounds of feedback, of a folder of what was published."""
    gained = {record: rounds.gain(*record) for record in rounds.experiments(home)}
    p = adjusted(gained)
    words = Words(
        "The rate is shown to rise", "The rate is shown to fall", "No change of the rate is shown"
    )
    named = {
        "{} by {} at {:.0%} error".format(*rounds.asked(name), float(error)): (
            found.mean,
            p[name, error],
        )
        for (name, error), found in gained.items()
    }
    return bullets([said(named, words)])
