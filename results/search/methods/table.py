"""The search for the methods' rates: `python results/search/methods/table.py [FOLDER]`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HEAD = (
    "| T | method | lr | further | seeds | rounds | gain, kB | KL | recognised |\n"
    "|--:|---|--:|---|--:|--:|--:|--:|--:|"
)

PRESET = {
    "d3po": {"pairs": "extremes", "clip_range": 0.2},
    "ddpo": {"minimum": 8, "clip_range": 0.1},
    "dpok": {"minimum": 8, "clip_range": 0.1},
    "reward_weighted": {"minimum": 8},
    "preferred_images": {},
}
"""Options that are only named where they are something else."""

Key = tuple[int, str, float, str]


def key(config: dict[str, Any]) -> Key:
    """What tries that differ in the seed alone have in common."""
    plain = PRESET[config["method"]]
    other = {k: v for k, v in config["options"].items() if plain.get(k) != v}
    said = ", ".join(f"{k}={str(v).lower()}" for k, v in other.items())
    return config["sampling_steps"], config["method"], config["learning_rate"], said


def ends(run: Path) -> dict[str, float]:
    """Rounds, and of the last evaluation, training sampler: gain, KL, recognised, if known."""
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds, rows = len(metrics), pd.read_csv(run / "eval.csv")
    rows = rows[rows["sampler"] == "eta1"]
    first, last = (rows[rows["round"] == number] for number in (0, rounds))
    found = {name: last[name].mean() for name in ("kl", "animal") if name in last}
    return {"rounds": rounds, "gain": last["score"].mean() - first["score"].mean(), **found}


def cell(values: list[float], form: str) -> str:
    """The mean; nothing where a value is missing."""
    mean = float(np.mean(values))
    return "" if np.isnan(mean) else format(mean, form)


def row(group: Key, found: list[dict[str, float]]) -> str:
    """One line of the table."""
    steps, method, rate, further = group
    rounds = sorted({int(f["rounds"]) for f in found})
    cells = [
        steps, method, f"{rate:g}", further, len(found), " and ".join(map(str, rounds)),
        cell([f["gain"] for f in found], "+.3f"), cell([f.get("kl", np.nan) for f in found], ".2f"),
        cell([f.get("animal", np.nan) for f in found], ".2f"),
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
