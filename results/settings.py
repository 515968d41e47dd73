"""What each method was run with, and whether its clip ever acted: a table of docs/comparison.md.

    python results/settings.py results/tiny

Options are named where they are not the method's own defaults, which follow the published code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from d3po_bench import registry
from d3po_bench.errors import UserError, said_in_one_line
from d3po_bench.runs.run import read_config, read_lines

CLIPPED = ("clipped", "saturated")
"""Share of probability ratios that the clip changed, as methods call it."""

SHARED = ("learning_rate", "units_per_update", "skip_steps", "timestep_fraction")


def options(config: dict[str, Any]) -> str:
    """What differs from the method's defaults."""
    method: Any = registry.method(config["method"])()
    plain = {f.name: getattr(method, f.name) for f in fields(method)}
    return ", ".join(f"`{k}={v}`" for k, v in config["options"].items() if plain.get(k) != v)


def clipped(runs: list[Path]) -> str:
    """The most of a round, over all runs, and the mean; nothing for methods without a clip."""
    rounds = [line for run in runs for line in read_lines(run / "metrics.jsonl")]
    shares = [float(line[name]) for line in rounds for name in CLIPPED if name in line]
    return f"{max(shares):.1%} ({sum(shares) / len(shares):.1%})" if shares else ""


def rows(folder: Path) -> Iterator[str]:
    """A line for each method.

    Raises:
        UserError: a method was run with several settings, or a run cannot be read.
    """
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("config.json")):
        groups.setdefault(read_config(path.parent)["method"], []).append(path.parent)
    for method, runs in sorted(groups.items()):
        configs = [read_config(run) for run in runs]
        said = {json.dumps([c["options"], *(c[k] for k in SHARED)]) for c in configs}
        if len(said) > 1:
            raise UserError(
                f"Expected one set of settings for {method} in {folder}, got {len(said)}. Name "
                "the folder of one experiment."
            )
        first = configs[0]
        steps = first["sampling_steps"] - first["skip_steps"]
        learnt = f"{first['timestep_fraction']:.0%} of {steps}"
        cells = [method, f"{first['learning_rate']:g}", str(first["units_per_update"]), learnt]
        yield f"| {' | '.join([*cells, options(first), clipped(runs)])} |"


def table(folder: Path) -> str:
    """The whole table.

    Raises:
        UserError: as `rows` does.
    """
    head = (
        "| method | learning rate | pairs or images an update | steps learnt from | options "
        "| ratios clipped, most in a round (mean) |\n|---|--:|--:|--:|---|--:|"
    )
    return "\n".join([head, *rows(folder)])


if __name__ == "__main__":
    with said_in_one_line():
        print(table(Path(sys.argv[1])))
