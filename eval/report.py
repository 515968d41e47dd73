"""Run folders -> learning curves in the manner of Figure 3, and before/after sheets."""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, TypeAlias

from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.reading import read_config, read_facts, read_lines, require_content
from eval.statistics import interval

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image, ImageFont

    from d3po_bench.types import Objective

    Frame: TypeAlias = pd.DataFrame

X_LABELS = {
    "pairs": "training pairs (images, for methods that learn from single ones)",
    "images": "training images generated",
    "scorer_calls": "images scored in training",
    "unet_forwards": "forward passes of the UNet in training (a guided step is two)",
    "unet_backwards": "backward passes of the UNet in training",
    "seconds": "training time without evaluation (s)",
}

COUNTS = ("pairs", "images", "scorer_calls", "unet_forwards", "unet_backwards")
"""Of `X_LABELS`, what metrics.jsonl counts; every run has the first two."""

# Okabe and Ito's colours, told apart with every kind of colour vision; a marker beside each.
LOOKS = {
    "d3po": ("#0072B2", "o"),
    "ddpo": ("#D55E00", "s"),
    "dpok": ("#009E73", "^"),
    "reward_weighted": ("#CC79A7", "D"),
    "preferred_images": ("#E69F00", "v"),
}
FURTHER_LOOKS = (("#56B4E9", "P"), ("#333333", "X"), ("#8C6D31", "*"), ("#7B4FA3", "<"))

MUTED, INK = "#666666", "#333333"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.7,
    "legend.handletextpad": 0.6,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "d3po-bench",
}
DPI = 150
IMAGE = ("round", "sampler", "prompt", "index")
"""Columns that name an evaluation image; the others measure it."""
MOST = 2.0**53
"""Largest count that a float still tells from the next."""

SEEDS_SHOWN = 3
"""Most methods in a panel that still shows the curve of every seed."""

CELL = (96, 160)
"""Smallest and largest side of a picture on a sheet, in pixels."""
COLUMNS = 10
"""Most prompts on a sheet."""
GAP, TITLE, LINE = 6, 52, 26
"""Pixels between pictures, for the title, and for a line of a prompt."""

Looks: TypeAlias = dict[str, tuple[str, str]]
"""Method -> colour and marker."""

Group: TypeAlias = tuple[str, str, str]
"""Model, objective, method: the runs that differ in nothing but the seed."""


@dataclass(frozen=True)
class Run:
    """What the figures need of one run folder."""

    folder: Path
    config: dict[str, Any]
    scores: Frame
    """Mean over the evaluation images by (sampler, round): score and whatever else was measured."""
    spent: dict[int, dict[str, float]]
    """Round -> cumulative pairs, images and, where the run has them, the rest of `X_LABELS`."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What names the content of model, prompts and scorers; {} where that is not on record."""

    @property
    def group(self) -> Group:
        """The runs that this one is averaged with."""
        model, objective, method = (self.config[k] for k in ("model", "objective", "method"))
        return model, objective, method

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])


def plot(
    runs: Sequence[Path], out: Path | None = None, x: str = "pairs", *, unfinished: bool = False
) -> list[Path]:
    """Draw every run below `runs`.

    Args:
        runs: run folders, or folders of them at any depth.
        out: folder for the figures; `plots` in the first of `runs` if None.
        x: what the curves are drawn over; a key of `X_LABELS`.
        unfinished: draw runs that have not ended, too: a mean goes as far as all its seeds have.

    Returns:
        The files written: curves.png, curves.svg, and a samples-MODEL-OBJECTIVE-METHOD.png for
        each group of runs that has sample images.

    Raises:
        ValueError: `x` is none of `X_LABELS`.
        UserError: no run is found, one cannot be read, was cut short or has no evaluation, base
            models are mixed, seeds of a method do not belong together, or `out` cannot be
            written.
        RunError: the disk is full.
    """
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {', '.join(X_LABELS)}, got {x!r}")
    groups = read_groups(runs, unfinished=unfinished)
    out = out or runs[0] / "plots"
    files = _write_curves(
        curves([run for members in groups.values() for run in members], x), x, out
    )
    for group, members in groups.items():
        sheet = samples_sheet(members)
        if sheet is not None:
            files.append(_write(out / _sheet_name(group), sheet))
    return files


def _sheet_name(group: Group) -> str:
    # As in run folders: a model may be a folder or a hub id.
    model, objective, method = (part.strip("/").replace("/", "--") for part in group)
    return f"samples-{model}-{objective}-{method}.png"


# ---- reading


def read_groups(paths: Iterable[Path], *, unfinished: bool = False) -> dict[Group, list[Run]]:
    """Every run below `paths` by model, objective and method; groups and seeds sorted.

    Args:
        paths: run folders, or folders of them at any depth.
        unfinished: take runs that have not ended, too.

    Raises:
        UserError: none is found, one cannot be read or was cut short, they are of several base
            models or weights of a model or scorer, or those of a method have a seed twice or
            differ in more than the seed.
    """
    runs = sorted(map(read_run, find_runs(paths)), key=lambda run: (*run.group, run.seed))
    for run in [] if unfinished else runs:
        _require_its_end(run)
    _require_one_model(runs)
    _require_one_scorer(runs)
    groups = _grouped(runs)
    for members in groups.values():
        _require_one("prompts", members)
    return groups


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The folders at or below `paths` that hold config.json and eval.csv, each once, sorted.

    Runs whose settings turn evaluation off are passed over.

    Raises:
        UserError: there is none, or one that should have been evaluated was not.
    """
    paths = list(paths)
    folders = {c.parent.resolve(): c.parent for p in paths for c in p.rglob("config.json")}
    found = sorted(f for f in folders.values() if _is_evaluated(f))
    if not found:
        raise UserError(
            "Expected run folders (with config.json and eval.csv) below "
            f"{', '.join(map(str, paths)) or 'the given paths'}, got none. Make one with "
            "`d3po-bench run`, or name another folder."
        )
    return found


def _is_evaluated(folder: Path) -> bool:
    """Whether the folder has an evaluation; False where its settings ask for none.

    Raises:
        UserError: it should have one.
    """
    if (folder / "eval.csv").is_file():
        return True
    try:
        off = json.loads((folder / "config.json").read_text(encoding="utf-8"))["eval_every"] == 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        off = False
    if not off:
        raise UserError(
            f"Expected config.json and eval.csv in {folder}, got no eval.csv: the run was cut "
            "short. Remove that folder and run it again, or leave it out."
        )
    return False


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        UserError: a file is missing, damaged, cut short or has no row of the training sampler.
    """
    config = read_config(folder)
    try:
        scores, spent = _mean_scores(folder / "eval.csv"), _spent(folder)
        facts = read_facts(folder)
        inputs = facts.get("inputs")
        run = Run(folder, config, scores, spent, inputs if isinstance(inputs, dict) else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        detail = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise _unreadable(folder, detail) from problem
    require_content(folder, facts)
    if not any(sampler == "eta1" and n in run.spent for sampler, n in run.scores.index):
        raise UserError(
            "Expected evaluation rows of the sampler eta1 and a finished round in "
            f"{folder / 'eval.csv'}, got none. "
            "Run it again, or leave that folder out."
        )
    return run


def _unreadable(folder: Path, detail: str) -> UserError:
    return UserError(
        f"Expected a readable run in {folder}, got {detail}. Remove that folder and run it again, "
        "or leave it out."
    )


def _mean_scores(path: Path) -> Frame:
    """Means over the evaluation images; images without a score are left out.

    Raises:
        ValueError: the file does not end where an evaluation ends, or holds what none writes.
    """
    rows = _rows(path)
    counts = rows.groupby(["round", "sampler"]).size().unstack(fill_value=0).stack()
    if counts.nunique() > 1:
        (round_, sampler), count = counts.idxmin(), counts.min()
        raise ValueError(
            f"{count} of {counts.max()} images of round {round_}, sampler {sampler}, in {path.name}"
        )
    columns = [c for c in rows if c not in IMAGE]
    return rows.groupby(["sampler", "round"])[columns].mean().dropna(subset="score")


def _rows(path: Path) -> Frame:
    """The rows of the evaluation images, each image once, with numbers that can be averaged."""
    import pandas as pd

    text = path.read_text(encoding="utf-8")
    # Half a number reads as a number: 1.4 of 1.445.
    if not text.endswith("\n"):
        raise ValueError(f"half a line at the end of {path.name}")
    if "\0" in text:
        raise ValueError(f"a null byte in {path.name}")
    rows = pd.read_csv(io.StringIO(text))
    if rows[list(IMAGE)].isna().any(axis=None):
        raise ValueError(f"a row without round, sampler, prompt or index in {path.name}")
    for name in ("round", "index") if len(rows) else ():  # no column of no rows has a type
        if not pd.api.types.is_integer_dtype(rows[name]) or (rows[name] < 0).any():
            raise ValueError(f"another {name} than a whole number from 0 in {path.name}")
    if rows.duplicated(list(IMAGE)).any():
        raise ValueError(f"two rows of one image in {path.name}")
    _require_numbers(rows.drop(columns=list(IMAGE)), path.name)
    return rows


def _require_numbers(columns: Frame, name: str) -> None:
    """Refuse scores that are text, true or false, or infinite; one that is not there is none.

    Raises:
        ValueError: naming the column.
    """
    for column in columns:
        if len(columns) and column not in columns.select_dtypes("number"):
            raise ValueError(f"another {column} than a number in {name}")
        if (columns[column].abs() == math.inf).any():
            raise ValueError(f"an infinite {column} in {name}")


def _spent(folder: Path) -> dict[int, dict[str, float]]:
    """What each finished round had cost since the start; evaluation is not a cost.

    Raises:
        ValueError: a round is not there or there twice, or a number is none or goes back.
    """
    total, seconds = 0.0, {0: 0.0}
    for line in _rounds(folder / "timing.jsonl"):
        total += sum(_amount(line, stage) for stage in line if stage not in ("round", "evaluate"))
        seconds[line["round"]] = total
    spent = {0: dict.fromkeys(COUNTS, 0.0)}
    for line in _rounds(folder / "metrics.jsonl"):
        number = line["round"]
        known = ("pairs", "images", *(name for name in COUNTS[2:] if name in line))
        spent[number] = {name: _amount(line, name) for name in known}
        for name in spent[number].keys() & spent[number - 1].keys():
            if spent[number][name] < spent[number - 1][name]:
                raise ValueError(f"a count of {name} that goes back in round {number}")
    for round_ in spent.keys() & seconds.keys():
        spent[round_]["seconds"] = seconds[round_]
    return spent


def _rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of a file with one for each round, from 1; none where there is no file."""
    lines = read_lines(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if line["round"] != number:
            raise ValueError(f"round {line['round']} in line {number} of {path.name}")
    return lines


def _amount(line: Mapping[str, Any], name: str) -> float:
    """A count, or seconds."""
    value = line[name]
    if type(value) not in (int, float) or not 0 <= value <= MOST:
        raise ValueError(f"{ascii(value)[:40]} as {name} of round {line['round']}")
    return float(value)


def _require_its_end(run: Run) -> None:
    """Refuse a run that was stopped: its last scores are no end to compare with others'."""
    done, due = max(run.spent), run.config.get("rounds", RunConfig.rounds)
    evaluated = max(n for sampler, n in run.scores.index if sampler == "eta1")
    if done != due or evaluated != due:
        raise UserError(
            f"Expected runs that have ended, got {done} of {due} rounds in {run.folder}, evaluated "
            f"up to {evaluated}. Run its command again, which goes on from there, leave that "
            "folder out, or `plot --unfinished`."
        )


def _require_one_model(runs: Sequence[Run]) -> None:
    """Refuse runs of several base models: their scores do not start at the same height."""
    first = runs[0]
    for run in runs:
        if run.config["model"] != first.config["model"]:
            raise UserError(
                f"Expected runs of one base model, got {first.config['model']} in {first.folder} "
                f"and {run.config['model']} in {run.folder}. Name the folder of one model."
            )
    _require_one("model", runs)


def _require_one(name: str, runs: Iterable[Run]) -> None:
    """Refuse runs whose input of that name had other content, where that is on record.

    Raises:
        UserError: naming two such runs.
    """
    known = [run for run in runs if name in run.inputs]
    for run in known:
        if run.inputs[name] != known[0].inputs[name]:
            raise UserError(
                f"Expected runs that share their {name}, got {known[0].inputs[name]} in "
                f"{known[0].folder} and {run.inputs[name]} in {run.folder}: files of one name had "
                "other content. Name the runs of one."
            )


def _require_one_scorer(runs: Sequence[Run]) -> None:
    """Refuse runs whose scorers had other weights: their scores are not in one unit.

    Raises:
        UserError: naming the scorer and both runs.
    """
    first: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for name, weights in scorers_of(run).items():
            known, folder = first.setdefault(name, (weights, run.folder))
            if known != weights:
                raise UserError(
                    f"Expected runs scored by one {name}, got weights {known} in {folder} and "
                    f"{weights} in {run.folder}. Name the runs of one."
                )


def scorers_of(run: Run) -> dict[str, str]:
    """Scorer -> what names its weights, of a run; {} where that is not on record."""
    found = run.inputs.get("scorers")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _grouped(runs: Iterable[Run]) -> dict[Group, list[Run]]:
    """Runs by model, objective and method.

    Raises:
        UserError: runs of a group differ in more than the seed, so a mean would mix them.
    """
    groups: dict[Group, list[Run]] = {}
    for run in runs:
        members = groups.setdefault(run.group, [])
        if members:
            _require_seeds(members, run)
        members.append(run)
    return groups


def _require_seeds(members: Sequence[Run], run: Run) -> None:
    """Refuse a run that has the seed of a member, or other settings than the first."""
    twin = next((m for m in members if m.seed == run.seed), None)
    if twin is not None:
        raise UserError(
            f"Expected each seed of {run.config['method']} once, got seed {run.seed} in "
            f"{twin.folder} and {run.folder}. Name one of the two."
        )
    ours, theirs = run.config, members[0].config
    shared = (ours.keys() & theirs.keys()) - {"seed", "run_id"}
    for key in sorted(key for key in shared if ours[key] != theirs[key]):
        raise UserError(
            f"Expected the seeds of {ours['method']} to share their settings, got {key} "
            f"{theirs[key]!r} in {members[0].folder} and {ours[key]!r} in {run.folder}. Plot "
            "them one by one."
        )


# ---- numbers


def curves(runs: Iterable[Run], x: str) -> Frame:
    """The curve of every seed, with the training sampler.

    Args:
        runs: the runs.
        x: a key of `X_LABELS`.

    Returns:
        A row for each evaluated round of a run, with columns model, objective, method, seed,
        round, x, score (unit of the scorer) and animal (probability; NaN where not known).

    Raises:
        UserError: a run does not know what is asked for, seconds without a timing.jsonl, say.
    """
    import pandas as pd

    rows = [row for run in runs for row in _curve(run, x)]
    columns = ["model", "objective", "method", "seed", "round", "x", "score", "animal"]
    return pd.DataFrame(rows, columns=columns)


def _curve(run: Run, x: str) -> list[dict[str, Any]]:
    names = dict(zip(("model", "objective", "method"), run.group, strict=True))
    rows = []
    for round_, scores in run.scores.loc["eta1"].iterrows():
        # An interrupted run may have been evaluated after a round that it then did not log.
        if round_ not in run.spent:
            continue
        if x not in run.spent[round_]:
            where = run.folder / ("timing.jsonl" if x == "seconds" else "metrics.jsonl")
            raise UserError(
                f"Expected the {x} of round {round_} in {where}, got none. Choose --x pairs or "
                "--x images."
            )
        place = {"seed": run.seed, "round": round_, "x": run.spent[round_][x]}
        rows.append({**names, **place, **scores.reindex(["score", "animal"])})
    return rows


def averages(table: Frame, column: str = "score") -> Frame:
    """Mean and interval over seeds, at the rounds that all seeds of a method have.

    Args:
        table: what `curves` returns.
        column: score or animal.

    Returns:
        A row for each method and round, with columns model, objective, method, round, x (mean
        over seeds), mean, low, high (unit of the column) and seeds (their number).
    """
    import pandas as pd

    keys = ["model", "objective", "method"]
    parts = []
    for group, rows in table.groupby(keys):
        values = rows.pivot(index="seed", columns="round", values=column).dropna(axis=1)
        if values.empty:
            continue
        places = rows.groupby("round")["x"].mean()[values.columns]
        low, high = interval(values.to_numpy())
        numbers = {"x": places.to_numpy(), "mean": values.mean().to_numpy(), "low": low}
        numbers |= {"high": high, "seeds": len(values)}
        named = dict(zip(keys, group, strict=True)) | {"round": values.columns}
        parts.append(pd.DataFrame(named | numbers))
    columns = [*keys, "round", "x", "mean", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


# ---- curves


def _write_curves(table: Frame, x: str, out: Path) -> list[Path]:
    with _style():
        figure = curves_figure(table, x)
        return [_write(out / f"curves.{kind}", _rendered(figure, kind)) for kind in ("png", "svg")]


def _style() -> AbstractContextManager[None]:
    """Our settings over matplotlib's own defaults: a reader's matplotlibrc changes no figure."""
    from matplotlib import style

    return style.context(["default", STYLE])


def _rendered(figure: Figure, kind: str) -> bytes:
    """The figure as PNG or SVG, without the date and version that would make files differ."""
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> Path:
    from d3po_bench.store import write_atomically

    write_atomically(path, data)
    return path


def curves_figure(table: Frame, x: str) -> Figure:
    """A panel for each objective, over what `curves` returns for the runs of one base model.

    With the scores of the scorer `animal`, a smaller panel under each: a method that pleases
    the objective with pictures nobody can name falls there.
    """
    from matplotlib.figure import Figure

    objectives = sorted(table["objective"].unique())
    heights = [3.0, 1.3] if table["animal"].notna().any() else [3.2]
    # 8.5 inches fill a README's 850 pixels, where 10 points are then 14 pixels.
    width = 6.4 if len(objectives) == 1 else max(8.5, 2.9 * len(objectives))
    looks = _looks(table["method"].unique())
    figure = Figure(figsize=(width, sum(heights) + 1.1), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(objectives), height_ratios=heights)
    for column, objective in enumerate(objectives):
        part = table[table["objective"] == objective]
        axes = figure.add_subplot(grid[0, column])
        axes.set_title(_title(objective), fontweight="bold")
        axes.set_ylabel(_score_label(objective))
        _draw_panel(axes, part, "score", looks)
        if len(heights) > 1:
            below = figure.add_subplot(grid[1, column], sharex=axes)
            _draw_panel(below, part, "animal", looks)
            _finish_recognised(below, axes)
    figure.supxlabel(X_LABELS[x], fontsize=10)
    _draw_legend(figure, table, looks)
    return figure


def _draw_panel(axes: Axes, part: Frame, column: str, looks: Looks) -> None:
    """Seeds, means, intervals and the base model's line, of one objective."""
    base = part.loc[part["round"] == 0, column].mean()
    axes.axhline(base, color=MUTED, linestyle=":", linewidth=1.2)
    # Single seeds of many methods hide the bands that sum them up.
    seeds = part if part["method"].nunique() <= SEEDS_SHOWN else part[:0]
    for (method, _), rows in seeds.groupby(["method", "seed"]):
        axes.plot(rows["x"], rows[column], color=looks[method][0], alpha=0.25, linewidth=0.7)
    for method, rows in averages(part, column).groupby("method"):
        colour, marker = looks[method]
        axes.fill_between(
            rows["x"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(
            rows["x"], rows["mean"], color=colour, linewidth=2, marker=marker, markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.6, markevery=max(1, len(rows) // 10),
        )  # fmt: skip
    axes.margins(x=0.02)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _finish_recognised(axes: Axes, above: Axes) -> None:
    """The axes of the panel under a panel, which holds probabilities."""
    low = 0.0 if axes.dataLim.y0 < 0.5 else 0.5
    axes.set_ylim(low - 0.04 * (1 - low), 1 + 0.04 * (1 - low))
    axes.set_yticks([low, (1 + low) / 2, 1])
    axes.set_ylabel("recognised\n(probability)")
    above.tick_params(axis="x", labelbottom=False)


def _draw_legend(figure: Figure, table: Frame, looks: Looks) -> None:
    """Methods with their numbers of seeds, the base model's line and the band."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, label=seeds_label(table, method))
        for method, (colour, marker) in looks.items()
    ]
    handles.append(Line2D([], [], color=MUTED, linestyle=":", label="base model"))
    if table.groupby(["model", "objective", "method"])["seed"].nunique().max() > 1:
        handles.append(
            Patch(color=MUTED, alpha=0.25, linewidth=0, label="95 % interval over seeds")
        )
    widest = 4 if figure.get_figwidth() > 8 else 3
    # Full rows: six in two rows of three, seven in four and three.
    columns = -(-len(handles) // -(-len(handles) // widest))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def seeds_label(table: Frame, method: str) -> str:
    """A method with its number of seeds, or the range of it over the panels."""
    rows = table[table["method"] == method]
    counts = rows.groupby(["model", "objective"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    number = str(low) if low == high else f"{low}-{high}"
    return f"{method} ({number} {'seed' if high == 1 else 'seeds'})"


def _looks(methods: Iterable[str]) -> Looks:
    """The look of each method: ours have fixed ones, others follow by name."""
    given = set(methods)
    others = sorted(given - LOOKS.keys())
    looks = {name: look for name, look in LOOKS.items() if name in given}
    return looks | {n: FURTHER_LOOKS[i % len(FURTHER_LOOKS)] for i, n in enumerate(others)}


def _title(objective: str) -> str:
    sign = getattr(_objective(objective), "sign", 0)
    return objective + {1: " (↑ better)", -1: " (↓ better)", 0: ""}[sign]


def _score_label(objective: str) -> str:
    unit = _unit(objective)
    return f"held-out score ({unit})" if unit else "held-out score"


def _objective(name: str) -> Objective | None:
    """The objective of that name; None for one that is not installed here."""
    from d3po_bench import registry

    try:
        return registry.objective(name)
    except UserError:
        return None


def _unit(objective: str) -> str:
    """The unit of the objective's scorer, read from its file: loading it may need weights."""
    name = getattr(_objective(objective), "scorer", "")
    path = Path(__file__).parent / "scorers" / f"{name}.py"
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"""^    unit\b[^=\n]*=\s*["'](.*)["']""", source, re.MULTILINE)
    return found[1] if found else ""


def short_name(model: str) -> str:
    """A model's name, or the last part of its folder or hub id."""
    return Path(model).name or model


# ---- before and after


@dataclass(frozen=True)
class Strip:
    """A row of a sheet: what it shows, and its pictures by file name."""

    label: str
    pictures: dict[str, Image.Image]


def samples_sheet(runs: Sequence[Run]) -> bytes | None:
    """The sample images of the lowest seed that has any, as PNG; None where no run has.

    A column for each prompt; rows for the base model, a round in the middle and the last one,
    each with the mean held-out score of the sampler that drew the images.

    Raises:
        UserError: an image is damaged.
    """
    for run in sorted(runs, key=lambda run: run.seed):
        rounds = sorted({_round_of(path) for path in run.folder.glob("samples/round-*/*.png")})
        if rounds:
            shown = sorted({rounds[0], rounds[(len(rounds) - 1) // 2], rounds[-1]})
            model, objective, method = run.group
            title = f"{method} on {objective}, {short_name(model)}, seed {run.seed}"
            return _png(_sheet(title, [_strip(run, round_) for round_ in shown]))
    return None


def _round_of(picture: Path) -> int:
    digits = picture.parent.name.removeprefix("round-")
    if not digits.isdecimal():
        raise UserError(
            f"Expected the sample folder round-NUMBER, got {picture.parent}. Remove that folder."
        )
    return int(digits)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _strip(run: Run, round_: int) -> Strip:
    label = _when(round_, run.spent.get(round_, {}))
    # The samples are drawn with the deployment sampler, so its mean is the one beside them.
    means = run.scores["score"]
    if ("eta0", round_) in means.index:
        label += f"\nmean {_digits(means['eta0', round_])} {_unit(run.group[1])}".rstrip()
    folder = run.folder / "samples" / f"round-{round_:05d}"
    paths = sorted(folder.glob("*.png"))[:COLUMNS]
    return Strip(label, {path.stem: _picture(path) for path in paths})


def _digits(mean: float) -> str:
    """Three digits, zeros kept so that rows line up."""
    return f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:#.3g}"


def _when(round_: int, spent: Mapping[str, float]) -> str:
    """'base model', or what had been learnt from by then."""
    if round_ == 0:
        return "base model"
    if "pairs" not in spent:
        return f"after round {round_}"
    # A method that learns from single images counts as many units as images.
    unit = "images" if spent["pairs"] == spent["images"] else "pairs"
    return f"after {spent['pairs']:,.0f} {unit}"


def _picture(path: Path) -> Image.Image:
    """An image at the size it has on the sheet: small ones with every pixel kept visible."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError) as problem:
        raise UserError(
            f"Expected a PNG image in {path}, got a damaged one. Remove it, or run again."
        ) from problem
    if max(image.size) < CELL[0]:
        factor = -(-CELL[0] // max(image.size))
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((CELL[1], CELL[1]), Image.Resampling.LANCZOS)
    return image


def _sheet(title: str, strips: Sequence[Strip]) -> Image.Image:
    """The strips under each other, with a title, prompts on top and labels at the left."""
    from PIL import Image, ImageDraw

    names = list(dict.fromkeys(name for strip in strips for name in strip.pictures))[:COLUMNS]
    side = max(max(p.size) for strip in strips for p in strip.pictures.values())
    bold, plain, small = (
        _font("DejaVuSans-Bold", 28),
        _font("DejaVuSans", 22),
        _font("DejaVuSans", 20),
    )
    letter = small.getlength(ascii_lowercase) / len(ascii_lowercase)
    prompts = [_wrapped(name, int((side + GAP) / letter)) for name in names]
    labels = [line for strip in strips for line in strip.label.split("\n")]
    left = 5 * GAP + int(max(map(plain.getlength, labels)))
    top = TITLE + GAP + LINE * max(prompt.count("\n") + 1 for prompt in prompts)
    width = max(left + len(names) * (side + GAP), int(bold.getlength(title)) + 4 * GAP)
    sheet = Image.new("RGB", (width + GAP, top + len(strips) * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * GAP, 2 * GAP), title, "black", bold)
    for j, strip in enumerate(strips):
        y = top + j * (side + GAP)
        draw.multiline_text((2 * GAP, y + side / 2), strip.label, INK, plain, "lm", spacing=8)
        for i, name in enumerate(names):
            if name in strip.pictures:
                sheet.paste(strip.pictures[name], (left + i * (side + GAP), y))
    for i, prompt in enumerate(prompts):
        place = (left + i * (side + GAP) + side / 2, top - GAP)
        draw.multiline_text(place, prompt, INK, small, "md", align="center")
    return sheet


def _wrapped(name: str, letters: int) -> str:
    """A file name as the prompt it stands for, in at most two lines of so many letters."""
    lines = textwrap.wrap(name.replace("-", " "), max(4, letters), max_lines=2, placeholder="…")
    return "\n".join(lines)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """The typeface of the curves, which comes with matplotlib; size in pixels."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)
