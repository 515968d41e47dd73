"""Tables of what cards did: a file in gpu/ for each, written by `nox -s gpu` (tests/gpu.py).

Until there is one of a card, they show the dry run on a CPU, whose figures mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.analysis.tables import Cell, Record, Table, text

HERE = Path(__file__).resolve().parent / "gpu"

NOT_DONE = "-"


def reports() -> list[Record]:
    """What was measured, by file."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))]
    return [r for r in every if not r["dry"]] or every


def part(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a part found; nothing if there was no time for it, or it failed."""
    found: Mapping[str, Any] = report["parts"].get(name, {})
    return found


def shown(name: str, form: str = ".1f") -> Cell:
    """The cell of a number that may not have been measured."""
    return lambda record: NOT_DONE if record.get(name) is None else format(record[name], form)


def speed() -> Table:
    """Images and rows a second, and the most memory that each took."""
    kinds = ("bf16", "bf16 compiled", "fp16")
    rows = []
    for report in reports():
        few, many = report["steps"]
        for kind in kinds:
            drawn, learned = part(report, f"{kind} sampling"), part(report, f"{kind} update")
            rows.append({
                "card": report["card"], "precision": kind, **drawn, **learned,
                "few": drawn.get(f"images_per_s_{few}"), "many": drawn.get(f"images_per_s_{many}"),
                "T": f"{few}, {many}",
            })  # fmt: skip
    columns = {
        "card": text("card"), "precision": text("precision"), "T": text("T"),
        "images/s, fewer steps": shown("few", ".2f"), "more steps": shown("many", ".2f"),
        "rows/s of the update": shown("rows_per_s"), "peak of sampling, GB": shown("sampling_gb"),
        "of the update, GB": shown("update_gb"),
    }  # fmt: skip
    return Table(rows, columns, left=("card", "precision"))


def rounds() -> Table:
    """A round of the paper's size, and the plain loop beside it."""
    rows = []
    for report in reports():
        row = {"card": report["card"], **part(report, "bf16 round")}
        plain = part(report, "bf16 plain loop").get("pair_s")
        if plain is not None and "round_s" in row:
            row["faster"] = plain * row["pairs"] / row["round_s"]
        rows.append(row)
    columns: dict[str, Callable[[Record], str]] = {"card": text("card")}
    columns |= {"pairs": shown("pairs", "d"), "seconds": shown("round_s")}
    columns |= {name: shown(f"{name}_s") for name in ("sample", "score", "reference", "update")}
    columns |= {
        "inside the UNet": shown("inside", ".1%"), "peak, GB": shown("round_gb"),
        "planned, GB": shown("planned_gb"), "times the plain loop": shown("faster", ".2f"),
    }  # fmt: skip
    return Table(rows, columns, left=("card",))


def checks() -> Table:
    """Whether bytes repeat, and every method learns in every precision."""
    rows = []
    for report in reports():
        learned = part(report, "methods")
        counts = {
            kind: f"{sum(name.endswith(kind) for name in learned)} of 5"
            for kind in ("fp32", "bf16", "fp16")
        }
        equal = part(report, "equal bytes twice").get("equal")
        said = {None: NOT_DONE, True: "yes", False: "no"}[equal]
        rows.append({"card": report["card"], "equal": said, **counts})
    columns = {
        "card": text("card"), "equal bytes twice": text("equal"),
        **{f"methods in {kind}": text(kind) for kind in ("fp32", "bf16", "fp16")},
    }  # fmt: skip
    return Table(rows, columns, left=("card",))
