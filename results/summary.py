"""What each method gained over the base model, and at what cost: the tables of the README.

    python results/summary.py results/tiny

A row for each objective and method, in two Markdown tables. Scores are means over the held-out
images, training sampler unless "eta 0" is said; gains and differences keep the score's own sign,
so where smaller is better a negative one is good. Everything is averaged over seeds, with 95 %
intervals over seeds. What a run did not measure is an empty cell.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from d3po_bench import registry
from d3po_bench.errors import UserError, said_in_one_line
from d3po_bench.runs.files import read_csv
from eval.analysis.runs import Group, Run, read_groups
from eval.analysis.statistics import between, iqm, iqm_interval, mean_told, paired_difference

SIDES = {"tiny": 32, "sd15": 512}
"""Pixels a side of the pictures of the models that we know."""

Cells = dict[str, str]
"""Heading -> text, of one row."""


# ---- what a run says


def ends(run: Run, column: str = "score", sampler: str = "eta1") -> tuple[float, float]:
    """Mean of a column at the first and last evaluation of a logged round; NaN where not known."""
    if column not in run.scores or sampler not in run.scores.index.levels[0]:
        return float("nan"), float("nan")
    values = run.scores.loc[sampler][column]
    values = values[values.index.isin(list(run.spent))].reset_index(drop=True)
    return float(values.get(0, np.nan)), float(values.get(len(values) - 1, np.nan))


def held_out(run: Run) -> Any:
    """Scores of the last evaluation, training sampler, by (prompt, index)."""
    rows = pd.read_csv(run.folder / "eval.csv")
    rows = rows[(rows["sampler"] == "eta1") & rows["round"].isin(list(run.spent))]
    last = rows[rows["round"] == rows["round"].max()]
    return last.set_index(["prompt", "index"])["score"].sort_index()


def spent(runs: list[Run], what: str) -> float:
    """What a run had cost by its last round, mean over runs; NaN where not known."""
    return float(np.mean([run.spent[max(run.spent)].get(what, np.nan) for run in runs]))


def flat_size(side: int) -> float:
    """JPEG size of a flat grey image of that many pixels a side, kB."""
    image = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    return float(registry.scorer("jpeg_size", torch.device("cpu"))(image, [""])[0])


# ---- cells


def number(value: float, form: str) -> str:
    """The value in that form; nothing for NaN."""
    return "" if np.isnan(value) else format(value, form)


def before_after(runs: list[Run], column: str) -> str:
    """Mean of a column over runs, first and last evaluation."""
    before, after = np.mean([ends(run, column) for run in runs], axis=0)
    return "" if np.isnan(after) else f"{before:.2f} -> {after:.2f}"


def diversity(group: Group, runs: list[Run]) -> str:
    """The base model's and the mean over runs, as `results/diversity.py` measured them.

    Empty where it did not measure all of them.
    """
    path = runs[0].folder.parents[2] / "diversity.csv"
    rows = read_csv(path) if path.is_file() else []
    known = {(row["objective"], row["method"], row["seed"]): row["diversity"] for row in rows}
    keys = [(group[1], group[2], str(run.seed)) for run in runs]
    keys.append((group[1], "no-fine-tune", ""))
    if not all(key in known for key in keys):
        return ""
    *after, before = (float(known[key]) for key in keys)
    return f"{before:.2f} -> {np.mean(after):.2f}"


def share_of_excess(group: Group, base: float, gain: float) -> str:
    """The gain over what a flat image's file is smaller than the base model's."""
    model, objective, _ = group
    if registry.objective(objective).scorer != "jpeg_size" or model not in SIDES:
        return ""
    return f"{gain / (base - flat_size(SIDES[model])):+.0%}"


def against(runs: list[Run], d3po: list[Run]) -> str:
    """The difference to D3PO on the same held-out prompts and noise; unscored images left out.

    Raises:
        UserError: the held-out images are not the same.
    """
    if not d3po or runs[0].group == d3po[0].group:
        return ""
    ours, theirs = ([held_out(run) for run in part] for part in (runs, d3po))
    for run, scores in zip([*runs, *d3po], [*ours, *theirs], strict=True):
        if not scores.index.equals(ours[0].index):
            raise UserError(
                f"Expected the same evaluation images in {runs[0].folder} and {run.folder}, got "
                "others. Summarise the methods one by one."
            )
    scored = np.isfinite([*ours, *theirs]).all(0)
    a, b = (np.stack(part)[:, scored] for part in (ours, theirs))
    return between(*paired_difference(a, b))


# ---- tables


def learnt(group: Group, runs: list[Run], d3po: list[Run]) -> Cells:
    """A row of the first table."""
    base, end = np.array([ends(run) for run in runs]).T
    first, last = np.array([ends(run, sampler="eta0") for run in runs]).T
    gain, sign = end - base, registry.objective(group[1]).sign
    return {
        "objective": group[1],
        "method": group[2],
        "seeds": str(len(runs)),
        "base": f"{base.mean():.3f}",
        "end": f"{end.mean():.3f}",
        "gain (95 % interval)": mean_told(gain),
        "worst seed": f"{sign * (sign * gain).min():+.3f}",
        "share of excess": share_of_excess(group, base.mean(), gain.mean()),
        "IQM of the gain (95 % interval)": between(iqm(gain), *iqm_interval(gain)),
        "difference to d3po (95 % interval)": against(runs, d3po),
        "gain, eta 0": number((last - first).mean(), "+.3f"),
    }


def cost(group: Group, runs: list[Run]) -> Cells:
    """A row of the second table."""
    drift = float(np.mean([ends(run, "kl")[1] for run in runs]))
    return {
        "objective": group[1],
        "method": group[2],
        "recognised": before_after(runs, "animal"),
        "diversity": before_after(runs, "diversity") or diversity(group, runs),
        "KL at the end": number(drift, ".3f"),
        "pairs (or single images)": number(spent(runs, "pairs"), ",.0f"),
        "images": number(spent(runs, "images"), ",.0f"),
        "UNet passes": number(spent(runs, "unet_forwards"), ",.0f"),
        "backward passes": number(spent(runs, "unet_backwards"), ",.0f"),
        "seconds a seed": number(spent(runs, "seconds"), ",.0f"),
    }


def markdown(rows: list[Cells]) -> str:
    """The rows as a table: names to the left, numbers to the right."""
    names = list(rows[0])
    rule = ["---" if name in ("objective", "method") else "--:" for name in names]
    body = ["| " + " | ".join(cells) + " |" for cells in (names, *(r.values() for r in rows))]
    return "\n".join([body[0], "|" + "|".join(rule) + "|", *body[1:]])


def tables(folders: list[Path]) -> str:
    """Both tables of the runs below `folders`, each under its title.

    Raises:
        UserError: the runs cannot be read or do not belong together.
    """
    groups = read_groups(folders)
    gains = [learnt(g, runs, groups.get((*g[:2], "d3po"), [])) for g, runs in groups.items()]
    costs = [cost(g, runs) for g, runs in groups.items()]
    parts = ["What was learnt:", markdown(gains), "What it cost:", markdown(costs)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    with said_in_one_line():
        print(tables([Path(argument) for argument in sys.argv[1:]]))
