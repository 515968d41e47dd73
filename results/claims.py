"""What the tables of README.md and docs/ show, in words that are made from the tests.

A text between `<!-- made: claims-NAME -->` markers comes from here. See `eval.analysis.worded` for
when a difference counts as shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from eval.analysis import measured, scored
from eval.analysis.gains import RIVAL, Groups, against, contrast
from eval.analysis.pictures import CROSSED
from eval.analysis.scores import Score, score_of
from eval.analysis.statistics import Difference, by_seed, from_zero
from eval.analysis.worded import LEVEL, Words, adjusted, equivalent, power, said
from results import feedback as rounds

MARGINS = {"aesthetic": 0.2, "compress": 0.05, "incompress": 0.05}
"""Objective -> a difference that would not matter, in the score's unit.

Of the published runs it was set after they had been made, so it says how much such seeds can show,
and no more. Protocols of later runs state theirs before.
"""

Tests = Mapping[tuple[str, str], Difference]
"""Objective or column, and method -> its test."""


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def gains(groups: Groups) -> str:
    """Which methods gain less or more than the rival, on each objective."""
    tests = {
        (objective, method): against(runs, groups[model, objective, RIVAL])
        for (model, objective, method), runs in groups.items()
        if method != RIVAL
    }
    scores = {group[1]: score_of(runs[0].files) for group, runs in groups.items()}
    return _bullets(_compared(tests, scores))


def _compared(tests: Tests, scores: Mapping[str, Score]) -> Iterator[str]:
    p = adjusted(tests)
    words = Words(f"Shown to gain more than {RIVAL}", f"Shown to gain less than {RIVAL}",
                  f"No difference to {RIVAL} is shown")  # fmt: skip
    for objective in sorted(scores):
        own = {method: found for (name, method), found in tests.items() if name == objective}
        score = scores[objective]
        means = {m: (score.sign * found.mean, p[objective, m]) for m, found in own.items()}
        open_ = {m: found for m, found in own.items() if p[objective, m] >= LEVEL}
        yield " ".join(filter(None, [
            f"**{objective}.**", said(means, words), power(open_, score.unit),
            equivalent(open_, MARGINS[objective], score.unit, RIVAL) if open_ else "",
        ]))  # fmt: skip


def halves(groups: Groups) -> str:
    """Which methods follow the reward, and which drift in the score whatever it is."""
    records = contrast(groups).records
    s, d = ({r["method"]: (r[half], r[f"{half}_p"]) for r in records} for half in ("s", "d"))
    follow = Words(
        "Follow the reward, S above 0", "Go against it", "S is not shown to differ from 0"
    )
    drift = Words("Shown to drift to larger scores, D above 0", "To smaller ones, D below 0",
                  "D is not shown to differ from 0")  # fmt: skip
    return _bullets([said(s, follow), said(d, drift)])


def diversity(groups: Groups) -> str:
    """Whose pictures of a prompt end more alike than the rival's."""
    ends = {
        (objective, method): {run.seed: measured.number(measured.numbers(run)[1], "diversity")
                              for run in runs}
        for (_, objective, method), runs in groups.items()
    }  # fmt: skip
    tests = {
        (objective, method): by_seed(own, ends[objective, RIVAL])
        for (objective, method), own in ends.items()
        if method != RIVAL
    }
    p = adjusted(tests)
    words = Words(
        f"Shown to be more diverse than {RIVAL}", f"Shown to be less diverse than {RIVAL}",
        f"No difference to {RIVAL} is shown",
    )  # fmt: skip
    return _bullets(
        f"**{objective}.** "
        + said({m: (f.mean, p[o, m]) for (o, m), f in tests.items() if o == objective}, words)
        for objective in dict.fromkeys(objective for objective, _ in tests)
    )


def crossed(groups: Groups) -> str:
    """What training on one objective is shown to do to the score of another."""
    tests = {
        (name, objective, method): from_zero(
            np.subtract(
                *(
                    [measured.number(measured.numbers(run)[side], name) for run in runs]
                    for side in (1, 0)
                )
            )
        )
        for (_, objective, method), runs in groups.items()
        for name in CROSSED
        if name != score_of(runs[0].files).scorer
    }
    p = adjusted(tests)
    words = Words("Shown to be raised by", "Shown to be lowered by", "Not shown to be changed by")
    return _bullets(
        f"**{name}, trained on {objective}.** "
        + said({m: (f.mean, p[n, o, m]) for (n, o, m), f in tests.items()
                if (n, o) == (name, objective)}, words)
        for name, objective in dict.fromkeys((n, o) for n, o, _ in tests)
    )  # fmt: skip


def alignment(folder: Path) -> str:
    """Which gains of Table 1 are shown, of all its methods and columns together."""
    tests = scored.gained(folder)
    p = adjusted(tests)
    words = Words("Shown to gain in", "Shown to lose in", "Not shown to change")
    methods = dict.fromkeys(method for method, _ in tests)
    return _bullets(
        f"**{method}.** "
        + said({c: (f.mean, p[m, c]) for (m, c), f in tests.items() if m == method}, words)
        for method in methods
    )


def feedback() -> str:
    """Which rates rise over rounds of feedback."""
    gained = {record: rounds.gain(*record) for record in rounds.experiments()}
    p = adjusted(gained)
    words = Words(
        "The rate is shown to rise", "The rate is shown to fall", "No change of the rate is shown"
    )
    named = {
        f"{rounds.QUESTIONS[name]} at {float(error):.0%} error": (found.mean, p[name, error])
        for (name, error), found in gained.items()
    }
    return _bullets([said(named, words)])
