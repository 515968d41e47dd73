"""The table of docs/quick-preset.md: `python results/tiny/quick-search/table.py [FOLDER]`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "| objective | seed | T | left out | fraction | pairs per update | lr | reference | clip "
    "| rounds | first | best | last three | KL | saturated | recognised |\n"
    "|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSON object for each line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recognised(path: Path, last: int) -> str:
    """Mean of the classifier at the last round, training sampler; empty if not evaluated."""
    if not path.exists():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            r for r in csv.DictReader(file) if (r["sampler"], r["round"]) == ("eta1", str(last))
        ]
    return f"{sum(float(r['animal']) for r in rows) / len(rows):.2f}" if rows else ""


def row(run: Path) -> str:
    """One try: its settings, training sizes, and what they cost."""
    c = json.loads((run / "config.json").read_text(encoding="utf-8"))
    metrics = lines(run / "metrics.jsonl")
    sizes, last, options = [m["score_mean"] for m in metrics], metrics[-1], c["options"]
    rounds = f"{len(sizes)}" + ("" if len(sizes) == c["rounds"] else f" of {c['rounds']}")
    best = min(sizes) if c["objective"] == "compress" else max(sizes)
    cells = [
        c["objective"], c["seed"], c["sampling_steps"], c.get("skip_steps", 0),
        f"{c['timestep_fraction']:g}", c["units_per_update"], f"{c['learning_rate']:g}",
        options.get("reference", "pretrained"), f"{options.get('clip_range', 0.1):g}", rounds,
        f"{sizes[0]:.3f}", f"{best:.3f}", f"{sum(sizes[-3:]) / 3:.3f}",
        f"{last['kl']:.2f}" if "kl" in last else "", f"{last['saturated']:.2f}",
        recognised(run / "eval.csv", len(sizes)),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def started(run: Path) -> str:
    """When a run began."""
    return str(json.loads((run / "provenance.json").read_text(encoding="utf-8"))["started"])


def table(folder: Path) -> str:
    """A row for each run below `folder`, in the order they were made."""
    runs = sorted((path.parent for path in folder.rglob("config.json")), key=started)
    return "\n".join([HEAD, *map(row, runs)])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
