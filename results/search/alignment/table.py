"""The tries behind the preset `alignment`: `python results/search/alignment/table.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pandas as pd

HEAD = (
    "| T | guidance | method | lr | units an update | further | seeds | ImageReward, round 0 | "
    "held-out gain | KL | recognised, round 0 -> last |\n"
    "|--:|--:|---|--:|--:|---|--:|--:|--:|--:|--:|"
)

ROUND = 128
"""Images of a round: more units in an update change nothing."""

Key = tuple[int, float, str, float, str, str]


def key(run: Path) -> Key:
    """What tries that differ in the seed alone have in common."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    units = config["units_per_update"]
    return (
        config["sampling_steps"], config["guidance"], config["method"], config["learning_rate"],
        "all" if units >= ROUND else str(units),
        "shared_noise" if config["options"].get("shared_noise") else "",
    )  # fmt: skip


def ends(run: Path) -> pd.DataFrame | None:
    """Mean score, drift and recognisability of the first and last evaluation, training sampler.

    None for a run that was stopped by hand before its last round.
    """
    rows = pd.read_csv(run / "eval.csv")
    last = len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rows = rows[(rows["sampler"] == "eta1") & rows["round"].isin([0, last])]
    found = rows.groupby("round")[["score", "kl", "animal"]].mean()
    return found if len(found) == 2 else None


def row(group: Key, found: list[pd.DataFrame]) -> str:
    """One line of the table."""
    first, last = (sum(f.iloc[end] for f in found) / len(found) for end in (0, 1))
    cells = [
        group[0], f"{group[1]:g}", group[2], f"{group[3]:g}", *group[4:], len(found),
        f"{first['score']:.3f}", f"{last['score'] - first['score']:+.3f}", f"{last['kl']:.2f}",
        f"{first['animal']:.2f} -> {last['animal']:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def table(folder: Path) -> str:
    """A row for each setting tried, mean over its seeds."""
    groups = defaultdict(list)
    for path in sorted(folder.rglob("config.json")):
        found = ends(path.parent)
        if found is not None:
            groups[key(path.parent)].append(found)
    return "\n".join([HEAD, *(row(group, groups[group]) for group in sorted(groups))])


if __name__ == "__main__":
    print(table(Path(__file__).parent))
