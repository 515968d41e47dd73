"""Tables of what cards did: a file in gpu/ for each, written by `nox -s gpu` (tests/gpu.py).

Until there is one of a card, they show the dry run on a CPU, whose figures mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d3po_bench.config import RunConfig, method_of
from d3po_bench.launch import grid
from d3po_bench.runs.files import read_csv
from d3po_bench.training.progress import IMAGE, planned
from eval.analysis.tables import Cell, Record, Table, text
from eval.tools import TOOLS

HERE = Path(__file__).resolve().parent / "gpu"
GRIDS = HERE.parent / "sd15"
MEMORY = HERE.parent / "memory.csv"

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
        said = {None: NOT_DONE, True: "yes", False: "no"}
        equal = {
            name: said[part(report, f"equal bytes {name}").get("equal")]
            for name in ("twice", "resumed")
        }
        rows.append({"card": report["card"], **equal, **counts})
    columns = {
        "card": text("card"), "equal bytes twice": text("twice"),
        "equal bytes resumed": text("resumed"),
        **{f"methods in {kind}": text(kind) for kind in ("fp32", "bf16", "fp16")},
    }  # fmt: skip
    return Table(rows, columns, left=("card",))


def hours() -> Table:
    """What the grids of Stable Diffusion 1.5 should take: time by card, memory by its size."""
    peaks = {r["card"]: int(r["peak"]) / 1e9 for r in read_csv(MEMORY) if r["model"] == "sd15"}
    rows = []
    for report in reports():
        for path in sorted(GRIDS.glob("*.toml")):
            row = {"card": report["card"], "grid": path.name, **peaks}
            runs = grid.configs(grid.read(path), TOOLS)
            row |= {"runs": len(runs), "images": sum(map(_images, runs)) / 1e3}
            measured = part(report, "bf16 round")
            if "pairs" in measured:
                each = [seconds(run, measured) / 3600 for run in runs]
                row |= {"least": min(each), "most": max(each), "all": sum(each)}
            rows.append(row)
    columns: dict[str, Callable[[Record], str]] = {"grid": text("grid"), "card": text("card")}
    columns |= {"runs": text("runs"), "thousand images": shown("images", ",.0f")}
    columns |= {"hours a run, least": shown("least"), "most": shown("most")}
    columns |= {"hours of all": shown("all", ",.0f")}
    columns |= {f"GB, card of {size}": shown(size) for size in peaks}
    return Table(rows, columns, left=("grid", "card"))


def seconds(run: RunConfig, measured: Mapping[str, Any]) -> float:
    """What a run should take, by a round of D3PO in the same number of steps that was measured.

    Every image counts as learned from, and as scored in no time beside that of its JPEG size.
    """
    sample, score, update = (
        measured[f"{stage}_s"] / measured["pairs"] / 2 for stage in ("sample", "score", "update")
    )
    method, evaluated = method_of(run), planned(run).left.get(IMAGE, 0)
    if not getattr(method, "guided", True):
        update /= 2
    # The round that was measured is the first, in which the pretrained network has no pass.
    again = sample if method.reference == "pretrained" else 0
    learned = (_images(run) - evaluated) * (sample + score + again + update)
    # Half of the others are drawn by the sampler of training, whose drift is measured.
    found: float = learned + evaluated * (1.5 * sample + score)
    return found


def _images(run: RunConfig) -> float:
    """Drawn by a run, to learn from and to be evaluated."""
    each: int = run.images_per_prompt or method_of(run).images_per_prompt
    return run.rounds * run.prompts_per_round * each + planned(run).left.get(IMAGE, 0)
