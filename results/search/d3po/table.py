"""The table of docs/quick-preset.md: `python results/search/d3po/table.py [FOLDER]`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "| objective | seed | T | left out | fraction | prompts x images | pairs per update | lr "
    "| further | rounds | first | best | last three | held out | KL | saturated | recognised |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSON object for each line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(path: Path, last: int) -> dict[str, str]:
    """Means of the last round's evaluation, training sampler: gain in kB, and the classifier's."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["sampler"] == "eta1"]
    first, end = ([r for r in rows if r["round"] == str(n)] for n in (0, last))
    if not end:
        return {}
    score, base = (sum(float(r["score"]) for r in part) / len(part) for part in (end, first))
    known = {} if "animal" not in end[0] else {"animal": mean(end, "animal")}
    return {"score": f"{score - base:+.3f}", **known}


def mean(rows: list[dict[str, str]], column: str) -> str:
    """Mean of a column."""
    return f"{sum(float(r[column]) for r in rows) / len(rows):.2f}"


PLAIN = {"reference": "pretrained", "clip_range": 0.1, "pairs": "all"}
"""Options that are only named where they are something else."""


def further(c: dict[str, Any]) -> str:
    """Everything else that was not left as it is."""
    said = {k: v for k, v in c["options"].items() if PLAIN.get(k) != v}
    said |= {"passes": c["passes"]} if c["passes"] != 1 else {}
    said |= {"lora_rank": c["lora_rank"]} if c["lora_rank"] != 4 else {}
    return ", ".join(f"{k}={v}" for k, v in said.items())


def row(run: Path) -> str:
    """One try: its settings, training sizes, and what they cost."""
    c = json.loads((run / "config.json").read_text(encoding="utf-8"))
    metrics = lines(run / "metrics.jsonl")
    sizes, last = [m["score_mean"] for m in metrics], metrics[-1]
    rounds = f"{len(sizes)}" + ("" if len(sizes) == c["rounds"] else f" of {c['rounds']}")
    best = min(sizes) if c["objective"] == "compress" else max(sizes)
    found = held_out(run / "eval.csv", len(sizes))
    cells = [
        c["objective"], c["seed"], c["sampling_steps"], c.get("skip_steps", 0),
        f"{c['timestep_fraction']:g}", f"{c['prompts_per_round']} x {c['images_per_prompt'] or 2}",
        c["units_per_update"], f"{c['learning_rate']:g}", further(c), rounds,
        f"{sizes[0]:.3f}", f"{best:.3f}", f"{sum(sizes[-3:]) / len(sizes[-3:]):.3f}",
        found.get("score", ""), f"{last['kl']:.2f}" if "kl" in last else "",
        f"{last['saturated']:.2f}", found.get("animal", ""),
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
