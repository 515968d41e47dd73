"""Tables of results/tiny/feedback, or its figures with `--draw results/tiny/feedback`.

    python results/feedback/summary.py [--draw FOLDER]

With `--collect RUNS` it first copies the rows of `rounds.py` and `preference.py` from RUNS.
Every rater in them is SIMULATED.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np

from d3po_bench.errors import UserError, said_in_one_line
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from eval.analysis.statistics import interval

HERE = Path(__file__).parent.parent / "tiny" / "feedback"
QUESTIONS = {"normalcy": "normal images", "safety": "safe images"}

COLOURS = ("#0072B2", "#D55E00", "#009E73")
BASE = "no-fine-tune"
SCORERS = ("image_reward", "clip", "blip_itm_logit", "blip_itc")

Row = dict[str, Any]


# ---- rows


def collect(runs: Path) -> None:
    """Rows of every seed in one file for the rounds and one for the preferences.

    Raters without errors are those of Table 1: their choices go to its folder.
    """
    rounds = [
        {"experiment": path.parts[-4], "error": _error(path.parts[-3]), "seed": path.parts[-2][5:]}
        | row
        for path in sorted(runs.glob("*/error-*/seed-*/rates.csv"))
        for row in read_csv(path)
    ]
    chosen = [
        {"error": _error(path.parts[-2]), "seed": path.stem[5:]} | row
        for path in sorted(runs.glob("preference/error-*/seed-*.csv"))
        for row in read_csv(path)
    ]
    for name, rows in (("rounds", rounds), ("preference", chosen)):
        if rows:
            write_atomically(HERE / f"{name}.csv", csv_bytes(rows))
    for path in runs.glob("preference/error-0/choices/seed-*.csv"):
        write_atomically(HERE.parent / "table1" / "choices" / path.name, path.read_bytes())


def _error(name: str) -> str:
    return name.removeprefix("error-")


def read(name: str) -> list[Row]:
    """Rows of a file, none where it is not there."""
    return read_csv(HERE / f"{name}.csv")


def by_seed(rows: list[Row], column: str, **where: str) -> dict[str, dict[str, float]]:
    """Seed -> key of the row (its round or model) -> value, of the rows that fit.

    Raises:
        UserError: a seed has fewer rows than another.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if all(row[name] == value for name, value in where.items()):
            key = row.get("round") or row["model"]
            found.setdefault(row["seed"], {})[key] = float(row[column])
    for seed, values in found.items():
        if len(values) < max(map(len, found.values())):
            raise UserError(
                f"Expected as many rows of every seed with {where}, got {len(values)} of seed "
                f"{seed}. Run its command again: it goes on where it was."
            )
    return found


def spread(values: Any) -> str:
    """Mean and 95 % interval over seeds."""
    low, high = interval(np.array(values))
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


# ---- tables


def rounds_table() -> str:
    """A line for each experiment and error rate."""
    head = (
        "| experiment | raters' error | seeds | round 0 | last round | gain (95 % interval) | "
        "rate, round 0, 1, ... | recognised, round 0, 1, ... |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    rows = read("rounds")
    cells = sorted({(row["experiment"], row["error"]) for row in rows})
    return "\n".join([head, *(_rounds_line(rows, *cell) for cell in cells)])


def _rounds_line(rows: list[Row], experiment: str, error: str) -> str:
    where = {"experiment": experiment, "error": error}
    good, known = (by_seed(rows, column, **where) for column in ("good", "recognised"))
    last = str(max(int(number) for seed in good.values() for number in seed))
    first = [seed["0"] for seed in good.values()]
    final = [seed[last] for seed in good.values()]
    gains = np.array(final) - np.array(first)
    return (
        f"| {QUESTIONS[experiment]} | {float(error):.0%} | {len(good)} | {spread(first)} | "
        f"{spread(final)} (round {last}) | {spread(gains)} | "
        f"{_by_round(good)} | {_by_round(known)} |"
    )


def _by_round(seeds: dict[str, dict[str, float]]) -> str:
    """Means over seeds."""
    numbers = sorted(next(iter(seeds.values())), key=int)
    return " ".join(f"{np.mean([seed[n] for seed in seeds.values()]):.3f}" for n in numbers)


def preference_table() -> str:
    """A line for each error rate, a column for each model."""
    rows = read("preference")
    models = list(dict.fromkeys(row["model"] for row in rows))
    head = (
        "| raters' error | seeds | " + " | ".join(models) + " |\n|--:|--:|" + "--:|" * len(models)
    )
    lines = []
    for error in sorted({row["error"] for row in rows}):
        seeds = by_seed(rows, "share", error=error).values()
        cells = " | ".join(spread([seed[model] for seed in seeds]) for model in models)
        lines.append(f"| {float(error):.0%} | {len(seeds)} | {cells} |")
    return "\n".join([head, *lines])


def scorers_table() -> str:
    """Shares of first places by Table 1's scorers instead of raters, who judge by image_reward.

    On the same models, captions and noise; equal scores share a place.
    """
    models = list(dict.fromkeys(row["model"] for row in read("preference")))
    head = "| scorer | seeds | " + " | ".join(models) + " |\n|---|--:|" + "--:|" * len(models)
    seeds = sorted({row["seed"] for row in read("preference")})
    lines = []
    for scorer in SCORERS:
        table = np.array([_first_places(scorer, models, seed) for seed in seeds])
        lines.append(f"| {scorer} | {len(seeds)} | {' | '.join(map(spread, table.T))} |")
    return "\n".join([head, *lines])


def _first_places(scorer: str, models: list[str], seed: str) -> Any:
    """Of each model, over captions."""
    names = [BASE if model == BASE else f"{model}-{seed}" for model in models]
    scores = np.array([[float(row[scorer]) for row in _table1(name)] for name in names])
    best = scores == scores.max(0)
    return (best / best.sum(0)).mean(1)


@cache
def _table1(name: str) -> list[Row]:
    """Rows of a model by the training sampler, in the order of captions."""
    path = HERE.parent / "table1" / "rows" / f"{name}.csv"
    return [row for row in read_csv(path) if row["sampler"] == "eta1"]


# ---- figures


def draw(folder: Path) -> None:
    """rounds.png and preference.png, into a folder."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    from eval.figures.style import STYLE

    known: Any = {k: v for k, v in STYLE.items() if k in plt.rcParams}
    with plt.rc_context(known):
        if read("rounds"):
            _save(_rounds_figure(plt), folder / "rounds.png")
        if read("preference"):
            _save(_preference_figure(plt), folder / "preference.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _rounds_figure(plt: Any) -> Any:
    rows = read("rounds")
    names = [name for name in QUESTIONS if any(row["experiment"] == name for row in rows)]
    figure, panels = plt.subplots(
        1, len(names), figsize=(4.4 * len(names), 3.4), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        for error, colour, marker in (("0", COLOURS[0], "o"), ("0.2", COLOURS[1], "s")):
            seeds = by_seed(rows, "good", experiment=name, error=error)
            if seeds:
                _band(axes, seeds, f"{float(error):.0%} error", colour, marker)
        axes.set(title=f"Rate of {QUESTIONS[name]}", xlabel="rounds of feedback", ylim=(None, 1.01))
        axes.set_xticks(sorted({int(row["round"]) for row in rows}))
    panels[0][0].set_ylabel("share of images")
    panels[0][-1].legend(loc="lower right", title="simulated raters", frameon=False)
    return figure


def _band(axes: Any, seeds: dict[str, dict[str, float]], text: str, colour: str, mark: str) -> None:
    numbers = sorted(int(n) for n in next(iter(seeds.values())))
    table = np.array([[seed[str(n)] for n in numbers] for seed in seeds.values()])
    low, high = interval(table)
    axes.fill_between(numbers, low, high, color=colour, alpha=0.18, linewidth=0)
    label = f"{text}, {len(table)} seeds"
    axes.plot(numbers, table.mean(0), color=colour, marker=mark, markersize=5, label=label)


def _preference_figure(plt: Any) -> Any:
    rows = read("preference")
    models = list(dict.fromkeys(row["model"] for row in rows))
    errors = sorted({row["error"] for row in rows}, key=float)
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    width = 0.8 / len(errors)
    for n, (error, colour) in enumerate(zip(errors, COLOURS, strict=False)):
        seeds = by_seed(rows, "share", error=error).values()
        table = 100 * np.array([[seed[model] for model in models] for seed in seeds])
        low, high = interval(table)
        mean, place = table.mean(0), np.arange(len(models)) + (n - (len(errors) - 1) / 2) * width
        axes.bar(place, mean, width * 0.94, color=colour, label=f"{float(error):.0%} error")
        axes.errorbar(
            place, mean, [mean - low, high - mean], fmt="none", color="#333333", capsize=3
        )
    axes.set_xticks(range(len(models)), [m.replace("_", " ").replace("-", " ") for m in models])
    axes.set(
        ylabel="first choices (%)", title="Held-out captions, five simulated raters", ylim=(0, None)
    )
    axes.legend(title=f"raters, {len(table)} seeds", frameon=False)
    return figure


@click.command()
@click.option("--collect", "runs", type=click.Path(path_type=Path, exists=True))
@click.option("--draw", "figures", type=click.Path(path_type=Path, exists=True))
def main(runs: Path | None, figures: Path | None) -> None:
    """Print the tables, or draw the figures into a folder."""
    if runs is not None:
        collect(runs)
    if figures is not None:
        draw(figures)
        return
    if read("rounds"):
        click.echo(rounds_table())
    if read("preference"):
        click.echo("\n" + preference_table() + "\n\n" + scorers_table())


if __name__ == "__main__":
    with said_in_one_line():
        main()
