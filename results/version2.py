"""Tables and sentences of the comparison on version 2, as PROTOCOL.md asks for them.

They are made from the runs and the search that are published in `tiny2/`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from d3po_bench.runs.files import read_csv
from d3po_bench.runs.packed import PACKED
from eval.analysis.efficiency import efficiency
from eval.analysis.fronts import fronts
from eval.analysis.gains import Groups, both_ends, both_signs, contrast, cost, gains, rival_of
from eval.analysis.runs import read_groups
from eval.analysis.scores import score_of
from eval.analysis.statistics import Difference, between, by_seed, from_zero, smallest_shown
from eval.analysis.tables import Table, number, spread, text
from eval.analysis.worded import LEVEL, adjusted, equivalent, power, said, within
from results.claims import DRIFT, FOLLOW, both_ways, bullets, differences, shown_halves, than
from results.steps import RULE, worst
from results.tuning import TRIALS, trials, tuning

MAIN = ("d3po_of_two", "ddpo", "dpok_value", "reward_weighted", "preferred_images")
CONTROL = "d3po_random"
UNIT = "kB"  # of JPEG sizes

OBJECTIVES = ("incompress", "compress", "aesthetic")
SIGNS = OBJECTIVES[:2]
"""The same score with both signs, for S and D."""

SEEDS = {"grid.toml": range(1000, 1020), "further.toml": range(1000, 1010)}
"""Of the test runs, by their grid."""

VARIED = range(1000, 1005)
"""Seeds whose models were measured for how varied they draw."""

MARGIN = 0.25
"""A difference in S that would not matter, as a share of the rival's S in the search."""

Seeds = Mapping[int, float]
"""Seed -> number."""


def there(folder: Path) -> bool:
    """Whether the runs have been published."""
    return (folder / PACKED).is_file()


@cache
def published(folder: Path) -> Groups:
    """All of the runs."""
    return read_groups([folder])


def main_rows(groups: Groups) -> Groups:
    """The paper's five methods."""
    return {group: runs for group, runs in groups.items() if group[2] in MAIN}


def further_rows(groups: Groups) -> Groups:
    """The others, but for the control, and the rival that they are compared with."""
    known = {*MAIN, CONTROL} - {rival_of(groups)}
    return {group: runs for group, runs in groups.items() if group[2] not in known}


def control(groups: Groups) -> Groups:
    """What learned from preferences by a coin."""
    return {group: runs for group, runs in groups.items() if group[2] == CONTROL}


def lead(groups: Groups) -> Groups:
    """The paper's five methods and the control."""
    return {group: runs for group, runs in groups.items() if group[2] in {*MAIN, CONTROL}}


# ---- tables


def tables(folder: Path, front: Callable[[Groups], Table]) -> dict[str, Callable[[], Any]]:
    """What a folder has the files for: name -> what makes it.

    Args:
        folder: of the published runs.
        front: a line for each method of groups.
    """
    made: dict[str, Callable[[], Any]] = {}
    if (folder / TRIALS).is_file():
        made["v2-tuning"] = partial(tuning, folder / TRIALS)
        made["v2-trials"] = partial(trials, folder / TRIALS, MAIN[-2:])
    if there(folder):
        shown: dict[str, tuple[Callable[[Groups], Any], Callable[[Groups], Groups]]] = {
            "v2-control": (contrast, control), "v2-control-gains": (gains, control),
            "v2-gains": (gains, main_rows), "v2-further-gains": (gains, further_rows),
            "v2-contrast": (halves, main_rows), "v2-further-contrast": (halves, further_rows),
            "v2-front": (front, lead), "v2-further-front": (front, further_rows),
            "v2-cost": (cost, lead), "v2-further-cost": (cost, further_rows),
            "v2-varied": (varied, lead), "v2-further-varied": (varied, further_rows),
            "v2-drift": (fronts, lead), "v2-further-drift": (fronts, dict),
            "v2-efficiency": (efficiency, main_rows),
        }  # fmt: skip
        for name, (table, rows) in shown.items():
            made[name] = partial(_made, table, rows, folder)
    return made


def _made(table: Callable[[Groups], Any], rows: Callable[[Groups], Groups], folder: Path) -> Any:
    return table(rows(published(folder)))


AXES = {"images": "", "unet_forwards": "unet_forwards", "drift": "drift"}
"""What the main rows' curves are drawn over -> their folder below figures."""

NAMED = {
    "v2-gains": "v2.{objective}.{method}",
    "v2-further-gains": "v2.further.{objective}.{method}",
    "v2-contrast": "v2.contrast.{method}",
    "v2-further-contrast": "v2.further.contrast.{method}",
    "v2-control": "v2.contrast.{method}",
    "v2-drift": "v2.drift.{objective}.{method}",
    "v2-efficiency": "v2.efficiency.{objective}.{method}",
    "v2-tuning": "v2.tuning.{method}",
}
"""Table -> how a number of it is called, before the name of its field."""


def halves(groups: Groups) -> Table:
    """S and D of each row, how its S differs from the rival's, and what its runs kept to."""
    table, rival, tests = contrast(groups), rival_of(groups), of_rewards(groups)
    p, seen = adjusted(tests), worst(groups)
    lost = to_rival({m: {s: one.recognised for s, one in own.items()} for m, own in seen.items()},
                    rival)  # fmt: skip
    found, unsure = [], Difference.unsure(math.nan)
    for record in table.records:
        method = record["method"]
        for name, known in (("difference", tests), ("recognised_difference", lost)):
            ends = (name, f"{name}_low", f"{name}_high")
            record |= dict(zip(ends, known.get(method, unsure), strict=False))
        seeds = [*seen[method].values()]
        kept = sum(not RULE.broken(one) for one in seeds)
        found.append({
            **record, "difference_p": p.get(method, math.nan),
            "smallest": smallest_shown(tests.get(method, unsure), len(p)),
            "recognised": fmean(one.recognised for one in seeds),
            "drift": fmean(one.drift for one in seeds), "kept": f"{kept} of {len(seeds)}",
        })  # fmt: skip
    columns = {
        **table.columns, f"S minus that of {rival} (95 % interval)": spread("difference"),
        "p of that, Holm": number("difference_p", ".2g"),
        "shown with 80 % power from": number("smallest", ".2g"),
        "recognised": number("recognised", ".2f"),
        f"recognised minus that of {rival} (95 % interval)": spread("recognised_difference"),
        "drift": number("drift", ".4f"), "seeds within the search's bounds": text("kept"),
    }  # fmt: skip
    return Table(found, columns, left=table.left)


def rewards(groups: Groups) -> dict[str, Seeds]:
    """Method -> S of each seed, where it learned for both signs."""
    return {
        method: {seed: (up - down) / 2 for seed, (up, down) in seeds.items()}
        for (_, method), seeds in both_signs(groups).items()
    }


def of_rewards(groups: Groups) -> dict[str, Difference]:
    """Method -> how its S differs from the rival's."""
    return to_rival(rewards(groups), rival_of(groups))


def to_rival(found: Mapping[str, Seeds], rival: str) -> dict[str, Difference]:
    """Method -> how its numbers differ from the rival's, seed by seed."""
    return {m: by_seed(own, found[rival]) for m, own in found.items() if m != rival}


def varied(groups: Groups) -> Table:
    """A row for each objective and method: how varied its pictures are, in the seeds measured."""
    part = {group: [r for r in runs if r.seed in VARIED] for group, runs in groups.items()}
    table = cost({group: runs for group, runs in part.items() if runs})
    shown = ("objective", "method", "Vendi score", "base model covered")
    return Table(table.records, {name: table.columns[name] for name in shown}, left=table.left)


# ---- sentences


def sentences(folder: Path) -> dict[str, Callable[[], str]]:
    """What PROTOCOL.md says of results, of a folder that has them."""
    if not there(folder):
        return {}
    parts = {
        "v2-claims": ("grid.toml", main_rows),
        "v2-further-claims": ("further.toml", further_rows),
    }
    return {
        name: partial(_once_whole, folder, grid, rows)
        for name, (grid, rows) in parts.items() if (folder / grid).is_file()
    }  # fmt: skip


def _once_whole(folder: Path, grid: str, rows: Callable[[Groups], Groups]) -> str:
    """What tests say of S once both its objectives are whole, and of gains once all are."""
    groups, margin = published(folder), margin_of(folder)
    if left := missing(groups, folder / grid, SIGNS):
        return bullets([left])
    left = missing(groups, folder / grid, OBJECTIVES)
    return claimed(groups, rows, margin, [f"**Gains.** {left}"] if left else None)


def missing(groups: Groups, grid: Path, objectives: Sequence[str]) -> str:
    """How many runs the protocol asks for are not there, in a sentence; "" for none.

    Args:
        groups: the published runs.
        grid: names the methods.
        objectives: that are to be whole.
    """
    asked = tomllib.loads(grid.read_text(encoding="utf-8"))
    cells = [*product([asked["model"]], objectives, asked["methods"])]
    seeds = SEEDS[grid.name]
    there = sum(len({run.seed for run in groups.get(cell, ())} & {*seeds}) for cell in cells)
    whole = len(cells) * len(seeds)
    return "" if there == whole else (
        f"{there} of the {whole} runs that the protocol asks for, of these rows on "
        f"{', '.join(objectives)}, have been made. Nothing is claimed before all are there."
    )  # fmt: skip


def margin_of(folder: Path) -> float:
    """A difference in S that would not matter, in kB; 0 where no search says how large S is."""
    rows = read_csv(folder / TRIALS) if (folder / TRIALS).is_file() else []
    return sum(MARGIN * float(r["value"]) for r in rows if r["chosen"] and r["method"] == MAIN[0])


def claimed(
    groups: Groups, rows: Callable[[Groups], Groups], margin: float = 0,
    gains: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """What is shown of some rows; nothing without a control, or if its S leaves 0 out.

    Args:
        groups: all of the runs.
        rows: those that are spoken of, and the rival.
        margin: a difference in S that would not matter, kB; 0 for none.
        gains: what is said of the gains on each objective; None for what their tests show.
    """
    seeds = rewards(control(groups)).get(CONTROL)
    if not seeds:
        return bullets(["The control has not been run. Nothing is claimed."])
    coin = from_zero([*seeds.values()])
    told = f"The control's S is {between(*coin[:3])} {UNIT}"
    if not coin.low <= 0 <= coin.high:
        return bullets([f"{told}, which excludes 0: the measure is at fault. Nothing is claimed."])
    chosen = rows(groups)
    shown = [*_follow(chosen), both_ways(chosen), _by_s(chosen, margin)]
    shown += _by_gain(chosen) if gains is None else gains
    return bullets([f"{told}, which includes 0.", *shown])


def _follow(groups: Groups) -> Iterator[str]:
    """By the tests of S and D, as their table adjusts them."""
    s, d = shown_halves(groups)
    for half, words, sign in ((s, FOLLOW, -1), (d, DRIFT, 1)):
        open_ = {
            m: from_zero([(up + sign * down) / 2 for up, down in seeds.values()])
            for (_, m), seeds in both_signs(groups).items()
            if not half[m][1] < LEVEL
        }
        yield f"{said(half, words)} {power(open_, UNIT, len(s) + len(d))}".rstrip()


def _by_s(groups: Groups, margin: float) -> str:
    """Rows against the rival in S."""
    tests = of_rewards(groups)
    objectives = {name for names, _ in both_signs(groups) for name in names.split(", ")}
    drifts = _drifts(groups, objectives)
    p = adjusted(tests)
    return f"**S.** {_ordered(tests, p, drifts, rival_of(groups), UNIT, len(p), margin)}"


def _by_gain(groups: Groups) -> Iterator[str]:
    """Rows against the rival on each objective."""
    tests = differences(groups)
    p = adjusted(tests)
    scores = {objective: score_of(runs[0].files) for (_, objective, _), runs in groups.items()}
    for objective, score in sorted(scores.items()):
        own = {
            m: test._replace(mean=score.sign * test.mean)
            for (name, m), test in tests.items()
            if name == objective
        }
        mine, drifts = {m: p[objective, m] for m in own}, _drifts(groups, {objective})
        told = _ordered(own, mine, drifts, rival_of(groups), score.unit, len(tests))
        yield f"**{objective}.** {told}"


def _drifts(groups: Groups, objectives: Collection[str]) -> dict[str, dict[int, float]]:
    """Method -> seed -> drift at the end, of the run that went farther."""
    found: dict[str, dict[int, float]] = {}
    for (_, objective, method), runs in groups.items():
        for run in runs if objective in objectives else ():
            own, drift = found.setdefault(method, {}), both_ends(run, "drift")[1]
            own[run.seed] = max(own.get(run.seed, drift), drift)
    return found


def _ordered(
    tests: Mapping[str, Difference], p: Mapping[str, float], drifts: Mapping[str, Seeds],
    rival: str, unit: str, together: int, margin: float = 0,
) -> str:  # fmt: skip
    """Who gains more, but where that is at a drift that the other does not reach.

    Args:
        tests: row -> how much more it gains than the rival.
        p: row -> its p-value, by Holm.
        drifts: of rows and the rival.
        rival: its name.
        unit: of the gains.
        together: tests that are adjusted together, these among them.
        margin: a difference that would not matter; 0 for none that was stated.
    """
    ends = {m: (m, rival) if test.mean > 0 else (rival, m) for m, test in tests.items()}
    far = [m for m, (more, less) in ends.items()
           if p[m] < LEVEL
           and fmean(drifts[more].values()) > max(drifts[less].values())]  # fmt: skip
    open_ = {m: test for m, test in tests.items() if p[m] >= LEVEL}
    same = within({m: (test, margin) for m, test in tests.items()})
    return " ".join(filter(None, [
        said({m: (test.mean, p[m]) for m, test in tests.items() if m not in far}, than(rival)),
        *_unordered(far, {m: test.mean > 0 for m, test in tests.items()}, rival),
        power(open_, unit, together),
        equivalent({m: same[m] for m in open_}, margin, unit, rival) if open_ and margin else "",
    ]))  # fmt: skip


def _unordered(far: Sequence[str], more: Mapping[str, bool], rival: str) -> Iterator[str]:
    """Which rows are not ordered, since the one that gains more has moved farther."""
    moved = "has moved farther from the base model than in any"
    for gain, of, runs in (
        (False, f"They gain less, but the network of {rival}", "of their runs"),
        (True, "They gain more, but their network", f"run of {rival}"),
    ):
        if names := ", ".join(m for m in far if more[m] is gain):
            yield f"Not ranked against {rival}: {names}. {of} {moved} {runs}."
