"""Tables and figures of learning from raters, every one of them SIMULATED."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.errors import UserError
from d3po_bench.runs.files import read_csv
from d3po_bench.runs.run import RunFolder
from eval.analysis.measured import BASE
from eval.analysis.statistics import Difference, from_zero, interval
from eval.analysis.tables import Cell, Record, Table, text
from eval.figures.style import STYLE

HERE = Path(__file__).parent
TINY = HERE / "tiny"
QUESTIONS = {
    "tiny": {"normalcy": "normal images", "safety": "safe images"},
    "tiny2": {"captions2": "images as asked", "safety2": "safe images"},
}
"""Folder of what was published -> experiment -> which rate it is about."""
SCORERS = ("image_reward", "clip", "blip_itm_logit", "blip_itc")
COLOURS = ("#0072B2", "#D55E00", "#009E73")

Seeds = dict[str, dict[str, float]]
"""Seed -> round or model -> value."""


def path_of(home: str, name: str) -> Path:
    """Where the rows of a folder of what was published lie."""
    return HERE / home / "feedback" / f"{name}.csv"


def learned_of(runs: Path) -> Iterator[dict[str, Any]]:
    """Where, when and by which commit each round of the plays below `runs` was learned from."""
    for folder in sorted(path.parent for path in runs.glob("**/trained/*/provenance.json")):
        facts = RunFolder(folder).facts
        yield {
            "play": folder.parents[2].relative_to(runs).as_posix(),
            "round": folder.parents[1].name.removeprefix("round-"),
            "commit": facts["commit"], "ended": facts["ended"],
            "device": facts.get("gpu", facts["cpu"]), "torch": facts["packages"]["torch"],
        }  # fmt: skip


def homes() -> list[str]:
    """The folders that have rounds."""
    return [home for home in QUESTIONS if path_of(home, "rounds").is_file()]


def _rows(name: str) -> list[dict[str, Any]]:
    paths = [path_of(home, name) for home in QUESTIONS]
    return [row for path in paths if path.is_file() for row in read_csv(path)]


def _by_seed(name: str, column: str, **where: str) -> Seeds:
    """A column of the rows that fit, by seed.

    Where raters called all pictures good, or all bad, a play of D3PO has ended: its last value
    stands for later rounds.

    Raises:
        UserError: a seed has fewer rows than another without that.
    """
    found: Seeds = {}
    ended = set()
    for row in _rows(name):
        if all(row[key] == value for key, value in where.items()):
            key = row.get("round") or row["model"]
            found.setdefault(row["seed"], {})[key] = float(row[column] or "nan")
            alike = float(row.get("said_good") or "nan") in (0, 1)
            if alike and asked(row["experiment"])[1] == "d3po":
                ended.add((row["seed"], key))
    longest = max(found.values(), key=len)
    for seed, values in found.items():
        last = [*values][-1]
        if (seed, last) in ended:
            found[seed] = {key: values.get(key, values[last]) for key in longest}
        elif len(values) < len(longest):
            raise UserError(
                f"Seed {seed} of {name}.csv has only {len(values)} rows with {where}. Run its "
                "command in results/measure.py again, which resumes it."
            )
    return found


def _spread(field: str) -> Cell:
    """A mean with its interval; unlike gains, shares have no sign."""
    return lambda r: f"{r[field]:.3f} ({r[f'{field}_low']:.3f} to {r[f'{field}_high']:.3f})"


def _mean(field: str, values: Any) -> Record:
    low, high = interval(np.array(values))
    return {field: float(np.mean(values)), f"{field}_low": float(low), f"{field}_high": float(high)}


# ---- tables


def experiments(home: str) -> list[tuple[str, str]]:
    """What was played: experiment, with -METHOD where it is not D3PO, and raters' error rate."""
    return sorted({(r["experiment"], r["error"]) for r in read_csv(path_of(home, "rounds"))})


def asked(experiment: str) -> tuple[str, str]:
    """The rate that an experiment is about, and the method that learns."""
    name, _, method = experiment.partition("-")
    return next(of[name] for of in QUESTIONS.values() if name in of), method or "d3po"


def gain(name: str, error: str) -> Difference:
    """The last rate minus what the base model has on the same prompts, over seeds."""
    return from_zero([last - before for before, last in _ends(name, error)])


def _ends(name: str, error: str) -> list[tuple[float, float]]:
    """Of each seed the base model's rate, and the last one.

    Where each round has other prompts, the base model has drawn those of the last one, too;
    elsewhere it is what drew the first round.
    """
    where = {"experiment": name, "error": error}
    good = _by_seed("rounds", "good", **where)
    drawn = _by_seed("rounds", "base", **where) if _redrawn(name) else {}
    found = []
    for seed, rates in good.items():
        last = max(rates, key=int)
        first = rates[min(rates, key=int)]
        found.append((drawn[seed][last] if drawn else first, rates[last]))
    return found


def _redrawn(name: str) -> bool:
    """Whether the base model has drawn every round of an experiment."""
    return any(row.get("base") for row in _rows("rounds") if row["experiment"] == name)


def rounds(home: str) -> Table:
    """A row for each experiment, method and error rate."""
    columns = {
        "experiment": lambda r: asked(r["experiment"])[0],
        "method": lambda r: asked(r["experiment"])[1],
        "raters' error": lambda r: f"{r['error']:.0%}", "seeds": text("seeds"),
        "base model": _spread("first"),
        "last round": lambda r: f"{_spread('last')(r)} (round {r['rounds']})",
        "gain (95 % interval)": _spread("gain"),
        "rate, round 0, 1, ...": _course("good"),
        "recognised, round 0, 1, ...": _course("recognised"),
    }  # fmt: skip
    return Table(
        [_experiment(*cell) for cell in experiments(home)], columns, left=("experiment", "method")
    )


def _experiment(name: str, error: str) -> Record:
    good = _by_seed("rounds", "good", experiment=name, error=error)
    known = _by_seed("rounds", "recognised", experiment=name, error=error)
    numbers = sorted(next(iter(good.values())), key=int)
    found: Record = {"experiment": name, "error": float(error), "seeds": len(good)}
    found |= {"rounds": int(numbers[-1])}
    base, last = zip(*_ends(name, error), strict=True)
    found |= _mean("first", base) | _mean("last", last)
    change = gain(name, error)
    found |= {"gain": change.mean, "gain_low": change.low, "gain_high": change.high}
    for n in numbers:
        found[f"good_{n}"] = float(np.mean([seed[n] for seed in good.values()]))
        found[f"recognised_{n}"] = float(np.mean([seed[n] for seed in known.values()]))
    return found


def _course(field: str) -> Cell:
    return lambda r: " ".join(f"{r[f'{field}_{n}']:.3f}" for n in range(r["rounds"] + 1))


def choices() -> Table:
    """Shares of raters' first choices: a row for each error rate, a column for each model."""
    records = []
    for error in sorted({row["error"] for row in _rows("preference")}):
        seeds = _by_seed("preference", "share", error=error).values()
        found: Record = {"error": float(error), "seeds": len(seeds)}
        for model in _models():
            found |= _mean(model, [seed[model] for seed in seeds])
        records.append(found)
    columns = {"raters' error": lambda r: f"{r['error']:.0%}", "seeds": text("seeds")}
    return Table(records, columns | {model: _spread(model) for model in _models()})


def scorers() -> Table:
    """Shares of first places by Table 1's scorers instead of raters, who judge by image_reward.

    On the same models, captions and noise; equal scores share a place.
    """
    seeds = sorted({row["seed"] for row in _rows("preference")})
    records = []
    for scorer in SCORERS:
        places = np.array([_first_places(scorer, seed) for seed in seeds])
        found: Record = {"scorer": scorer, "seeds": len(seeds)}
        for model, shares in zip(_models(), places.T, strict=True):
            found |= _mean(model, shares)
        records.append(found)
    columns = {"scorer": text("scorer"), "seeds": text("seeds")}
    return Table(records, columns | {m: _spread(m) for m in _models()}, left=("scorer",))


def _models() -> list[str]:
    return list(dict.fromkeys(row["model"] for row in _rows("preference")))


def _first_places(scorer: str, seed: str) -> Any:
    """Of each model, over captions."""
    names = [BASE if model == BASE else f"{model}-{seed}" for model in _models()]
    scores = np.array([[float(row[scorer]) for row in _scored(name)] for name in names])
    best = scores == scores.max(0)
    return (best / best.sum(0)).mean(1)


@cache
def _scored(name: str) -> list[dict[str, Any]]:
    """Table 1's rows of a model by the training sampler, in the order of captions."""
    rows = read_csv(TINY / "table1" / "rows" / f"{name}.csv")
    return [row for row in rows if row["sampler"] == "eta1"]


# ---- figures


def draw(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Draw Figures 4 and 5 of every home, and Figure 7, below a folder.

    Yields:
        What was published, and what was drawn.
    """
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    known: Any = {k: v for k, v in STYLE.items() if k in plt.rcParams}
    with plt.rc_context(known):
        figures = {path_of(home, "rounds"): _rounds(plt, QUESTIONS[home]) for home in homes()}
        figures[path_of("tiny", "preference")] = _preference(plt)
        for number, (rows, figure) in enumerate(figures.items()):
            drawn = folder / f"feedback-{number}.png"
            figure.savefig(drawn, dpi=150, metadata={"Software": None})
            yield rows.with_suffix(".png"), drawn


def _rounds(plt: Any, questions: Mapping[str, str]) -> Any:
    size = (4.4 * len(questions), 3.4)
    figure, panels = plt.subplots(1, len(questions), figsize=size, layout="constrained")
    for axes, (name, question) in zip(panels, questions.items(), strict=True):
        for error, colour, marker in (("0", COLOURS[0], "o"), ("0.2", COLOURS[1], "s")):
            seeds = _by_seed("rounds", "good", experiment=name, error=error)
            numbers = sorted(int(n) for n in next(iter(seeds.values())))
            table = np.array([[seed[str(n)] for n in numbers] for seed in seeds.values()])
            axes.fill_between(numbers, *interval(table), color=colour, alpha=0.18, linewidth=0)
            label = f"{float(error):.0%} error, {len(table)} seeds"
            mean = table.mean(0)
            axes.plot(numbers, mean, color=colour, marker=marker, markersize=5, label=label)
        if _redrawn(name):
            base = _by_seed("rounds", "base", experiment=name, error="0").values()
            mean = np.mean([[seed[str(n)] for n in numbers] for seed in base], 0)
            axes.plot(numbers, mean, color="#777777", linestyle="--", label="base model")
            axes.legend(loc="upper left", frameon=False)
        axes.set(title=f"Rate of {question}", xlabel="rounds of feedback", ylim=(None, 1.01))
        axes.set_xticks(numbers)
    panels[0].set_ylabel("share of images")
    panels[-1].legend(loc="lower right", title="simulated raters", frameon=False)
    return figure


def _preference(plt: Any) -> Any:
    errors = sorted({row["error"] for row in _rows("preference")}, key=float)
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    width = 0.8 / len(errors)
    for n, (error, colour) in enumerate(zip(errors, COLOURS, strict=False)):
        seeds = _by_seed("preference", "share", error=error).values()
        table = 100 * np.array([[seed[model] for model in _models()] for seed in seeds])
        low, high = interval(table)
        mean = table.mean(0)
        place = np.arange(len(_models())) + (n - (len(errors) - 1) / 2) * width
        axes.bar(place, mean, width * 0.94, color=colour, label=f"{float(error):.0%} error")
        ends = [mean - low, high - mean]
        axes.errorbar(place, mean, ends, fmt="none", color="#333333", capsize=3)
    names = [model.replace("_", " ").replace("-", " ") for model in _models()]
    axes.set_xticks(range(len(names)), names)
    title = "Held-out captions, five simulated raters"
    axes.set(ylabel="first choices (%)", title=title, ylim=(0, None))
    axes.legend(title=f"raters, {len(table)} seeds", frameon=False)
    return figure
