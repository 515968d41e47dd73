"""The report page: one HTML file with everything in it, which loads nothing from anywhere.

Whoever made a run chose its names, prompts and pictures. So the template escapes all text, pictures
are drawn anew, and the page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3po_bench import __version__
from d3po_bench.errors import UserError
from eval.analysis import tries
from eval.analysis.leaderboard import Board, boards, provenance
from eval.analysis.runs import DRIFTS, averages, curves, drift_of
from eval.analysis.scores import Score, scores_of, shown_score
from eval.analysis.tables import Cell, Record, change, number, shown, spread, text
from eval.figures.strips import pairs_of
from eval.figures.style import Looks, looks_of, short_name
from eval.figures.vector import Panel, marker_shape, panel

if TYPE_CHECKING:
    from jinja2 import Environment

    from eval.analysis.runs import Frame

PLACE = Path(__file__).parent / "page"
"""The template, its style and its script."""

AXES = {
    "rounds": "Rounds", "images": "Images drawn", "scorer_calls": "Images scored",
    "unet_forwards": "UNet passes", "seconds": "Seconds of training",
}  # fmt: skip
"""What curves are drawn over; the first that all runs know is shown at once."""

MARK = 9
"""Pixels across a marker."""

TALL, LOW = 230, 96
"""Heights of panels."""


@dataclass(frozen=True)
class Column:
    """What a column of the tables shows of a record."""

    field: str
    head: str
    show: Cell
    ends: tuple[str, str] | None = None
    """Fields of the interval, if it has one."""

    def interval(self, record: Record) -> str:
        """The interval in words; "" where there is none."""
        ends = [shown(record[name], "+.3f") for name in self.ends or ()]
        return " to ".join(end for end in ends if end)

    def known(self, records: Sequence[Record]) -> bool:
        """Whether any of the records has a number."""
        return any(record[self.field] == record[self.field] for record in records)


GAIN = Column("gain", "Gain", number("gain", "+.3f"), ("low", "high"))
ENDS = (Column("base", "Base", number("base", ".3f")), Column("end", "End", number("end", ".3f")))
COSTS = (
    Column("drift", "Drift", number("drift", ".4f")),
    Column("kl_trained", "KL, trained steps", number("kl_trained", ".3f")),
    Column("kl", "KL, all steps", number("kl", ".3f")),
    Column("recognised", "Recognised", change("recognised", ".2f")),
    Column("images", "Images", number("images", ",.0f")),
    Column("unet_forwards", "UNet passes", number("unet_forwards", ",.0f")),
    Column("seconds", "Seconds", number("seconds", ",.0f")),
)
MAIN = (
    GAIN,
    Column("seeds", "Seeds", text("seeds")),
    *ENDS,
    Column("s", "S, reward", number("s", "+.3f"), ("s_low", "s_high")),
    Column("d", "D, drift", number("d", "+.3f"), ("d_low", "d_high")),
    *COSTS,
)
SEEDS = (*ENDS, GAIN, Column("gain_eta0", "Gain, eta 0", number("gain_eta0", "+.3f")), *COSTS)

FACTS: Mapping[str, Cell] = {
    "Worst seed's gain": number("worst", "+.3f"),
    "Gain of the deterministic sampler": number("gain_eta0", "+.3f"),
    "Gain as a share of the size above a flat image's": number("share_of_excess", "+.0%"),
    "Diversity of a prompt's pictures": change("diversity", ".2f"),
    "Gain on the reward minus that on other scorers, in standard deviations": spread("gap"),
    "Gain minus D3PO's": spread("difference"),
    "p of that difference, adjusted for all methods and objectives (Holm)": number("p_holm", ".2g"),
}


def page(runs: Sequence[Path]) -> str:
    """The page of all runs below some folders.

    Raises:
        UserError: there are no runs, or they cannot be read or do not belong together.
    """
    found, waiting = boards(runs)
    entries = [entry for board in found for entry in board.entries]
    records = [entry.record for entry in entries]
    pictures = [pairs_of(entry.group, entry.shown, runs) for entry in entries]
    looks = looks_of(entry.group[2] for entry in entries)
    style, script = (PLACE.joinpath(name).read_text(encoding="utf-8")
                     for name in ("page.css", "page.js"))  # fmt: skip
    style += _look_rules(looks)
    return _environment().get_template("page.html").render(
        version=__version__, style=style, script=script, style_hash=_hash(style),
        script_hash=_hash(script), entries=entries,
        waiting=["/".join(path.parts[-3:]) for path in waiting],
        models=sorted({entry.group[0] for entry in entries}),
        objectives=sorted({entry.group[1] for entry in entries}),
        looks={method: (i, marker_shape(marker, MARK))
               for i, (method, (_, marker)) in enumerate(looks.items())},
        columns=[column for column in MAIN if column.known(records)], seed_columns=SEEDS,
        facts=FACTS, axes=list(_axes(found, looks)), front=list(_front(found, looks)),
        pictures=pictures,
        illustrated=list(dict.fromkeys(e.group[:2] for e, p in zip(entries, pictures, strict=True)
                                       if p)),
        presets=[tries.nearest(entry.runs[0].config) for entry in entries],
        commands=[tries.command(entry.runs[0].config) for entry in entries],
        made_with=provenance(entries),
    )  # fmt: skip


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(PLACE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"typeset": typeset, "short": short_name}
    made.globals |= {"shown_score": shown_score}
    return made


def typeset(words: str) -> str:
    """Numbers with a minus as wide as a plus, and arrows."""
    return words.replace("->", "→").replace("-", "\N{MINUS SIGN}")


def _hash(content: str) -> str:
    """What the page's policy calls a style or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _look_rules(looks: Looks) -> str:
    colours = (f".k{i}{{--raw:{colour}}}\n" for i, (colour, _) in enumerate(looks.values()))
    return "".join(colours)


# ---- panels


@dataclass(frozen=True)
class Chart:
    """The panels of an objective under each other, over one axis."""

    model: str
    objective: str
    score: Score
    panels: Sequence[tuple[str, Panel]]
    """Each with what it shows upwards."""


@dataclass(frozen=True)
class Axis:
    """The charts over one kind of cost."""

    name: str
    label: str
    charts: Sequence[Chart]


def _axes(found: Sequence[Board], looks: Looks) -> Iterator[Axis]:
    for name, label in AXES.items():
        charts = [chart for board in found for chart in _curves(board, name, looks)]
        if charts:
            yield Axis(name, label, charts)


def _curves(board: Board, x: str, looks: Looks) -> Iterator[Chart]:
    """Nothing where a run does not know what it had spent."""
    with suppress(UserError):
        yield from _by_objective(
            board, x, lambda table, score: _course(table, score, looks, ",.0f")
        )


def _by_objective(
    board: Board, x: str, draw: Callable[[Frame, Score], Sequence[tuple[str, Panel]]]
) -> Iterator[Chart]:
    runs = [run for entry in board.entries for run in entry.shown]
    scores = scores_of(run.files for run in runs)
    for objective, part in curves(runs, x).groupby("objective"):
        score = scores[str(objective)]
        if panels := draw(part, score):
            yield Chart(board.model, str(objective), score, panels)


def _course(part: Frame, score: Score, looks: Looks, form: str) -> list[tuple[str, Panel]]:
    """Score and, where it is known, recognisability over what was spent, shown in that format."""
    found, forms = [], {"x": form, "y": ".3f"}
    heads = {"score": _label(score), "animal": "Recognised (probability)"}
    for column, height in (("score", TALL), ("animal", LOW)):
        means = averages(part, column)
        if len(means):
            base = float(part.loc[part["round"] == 0, column].mean())
            drawn = panel(
                means, looks, forms, height=height, base=None if math.isnan(base) else base
            )
            found.append((heads[column], drawn))
    return found


def _label(score: Score) -> str:
    return f"Held-out score ({score.unit})" if score.unit else "Held-out score"


def _front(found: Sequence[Board], looks: Looks) -> Iterator[tuple[str, Chart]]:
    """Score and recognisability over the best drift that all runs of a board know, and its name."""
    for board in found:
        runs = [run for entry in board.entries for run in entry.shown]
        if x := drift_of(curves(runs, "rounds")):
            charts = _by_objective(
                board, x, lambda table, score: _course(table, score, looks, ".3f")
            )
            yield from ((DRIFTS[x], chart) for chart in charts)
