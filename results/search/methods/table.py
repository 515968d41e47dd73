"""The tries in a folder: `python results/search/methods/table.py [FOLDER]`.

Without FOLDER: the search for the methods' rates.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HEAD = (
    "| T | method | lr | further | seeds | rounds | training score | denoising error "
    "| held-out gain | KL | recognised | worst seed |\n"
    "|--:|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)

PRESET: dict[str, dict[str, Any]] = {
    "d3po": {"pairs": "extremes", "clip_range": 0.2, "units_per_update": 2},
    "ddpo": {"minimum": 8, "clip_range": 0.1, "units_per_update": 16},
    "dpok": {"minimum": 8, "clip_range": 0.1, "units_per_update": 16},
    "reward_weighted": {"minimum": 8, "units_per_update": 16},
    "preferred_images": {"units_per_update": 2},
}
"""Settings that are only named where they are something else."""

Key = tuple[int, str, float, str]


def key(config: dict[str, Any]) -> Key:
    """What tries that differ in the seed alone have in common."""
    plain = PRESET[config["method"]] | {"guidance": 5.0}
    own = config["options"] | {k: config[k] for k in ("units_per_update", "guidance")}
    other = {k: v for k, v in own.items() if plain.get(k) != v}
    said = ", ".join(f"{k}={str(v).lower()}" for k, v in other.items())
    return config["sampling_steps"], config["method"], config["learning_rate"], said


def ends(run: Path) -> dict[str, float]:
    """Rounds, training scores and denoising errors, and what the evaluation at the end says.

    The latter, training sampler, is not there for a run that was stopped by hand.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    found: dict[str, float] = {"rounds": len(metrics)}
    for name in ("score_mean", "denoising_error"):
        if name in metrics[0]:
            found |= {f"{name} first": metrics[0][name], f"{name} last": metrics[-1][name]}
    rows = pd.read_csv(run / "eval.csv")
    rows = rows[rows["sampler"] == "eta1"]
    first, last = (rows[rows["round"] == number] for number in (0, len(metrics)))
    if len(last):
        found["gain"] = last["score"].mean() - first["score"].mean()
        found |= {name: last[name].mean() for name in ("kl", "animal") if name in last}
    return found


def cell(found: list[dict[str, float]], name: str, form: str) -> str:
    """The mean over the tries that have it; nothing where none has."""
    values = [f[name] for f in found if not np.isnan(f.get(name, np.nan))]
    return format(np.mean(values), form) if values else ""


def way(found: list[dict[str, float]], name: str, form: str) -> str:
    """First and last round's."""
    first, last = (cell(found, f"{name} {end}", form) for end in ("first", "last"))
    return f"{first} -> {last}" if first else ""


def row(group: Key, found: list[dict[str, float]]) -> str:
    """One line of the table."""
    steps, method, rate, further = group
    rounds = sorted({int(f["rounds"]) for f in found})
    known = [f["animal"] for f in found if not np.isnan(f.get("animal", np.nan))]
    cells = [
        steps, method, f"{rate:g}", further, len(found), " and ".join(map(str, rounds)),
        way(found, "score_mean", ".3f"), way(found, "denoising_error", ".3f"),
        cell(found, "gain", "+.3f"), cell(found, "kl", ".2f"), cell(found, "animal", ".2f"),
        f"{min(known):.2f}" if known else "",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def table(folder: Path) -> str:
    """A row for each setting tried, mean over its seeds."""
    groups = defaultdict(list)
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        groups[key(config)].append(ends(path.parent))
    return "\n".join([HEAD, *(row(group, groups[group]) for group in sorted(groups))])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
