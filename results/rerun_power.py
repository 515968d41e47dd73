"""What `verify --rerun` would say of published runs and tries, as a table: docs/determinism.md.

    python results/rerun_power.py

Each is compared with the published seeds of its method on its objective, as another seed, which
needs no training; the intervals of the same seed do, and are not used here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.rerun import FALSE_ALARM, end_of
from eval.statistics import another_seed

HOME = Path(__file__).parent
TINY = HOME / "tiny"
ONLY = {"run_id", "seed", "eval_every", "learning_rate"}
"""What a try may have of its own to be counted: a seed, and perhaps a rate."""


def outside(run: Path, seeds: list[Path]) -> bool:
    """Whether the run ends where no further seed does, in gain or drift."""
    found, ends = end_of(run), [end_of(seed) for seed in seeds]
    shared = [name for name in found if all(name in end for end in ends)]
    intervals = {
        name: another_seed([end[name] for end in ends], 1 - FALSE_ALARM / (2 * len(shared)))
        for name in shared
    }
    return any(not low <= found[name] <= high for name, (low, high) in intervals.items())


def cells() -> Iterator[list[Path]]:
    """The published seeds of each method on each objective."""
    for place in sorted({path.parent.parent for path in TINY.rglob("config.json")}):
        yield sorted(place.glob("seed-*"))


def tries() -> Iterator[tuple[Path, dict[str, Any], dict[str, Any], list[Path]]]:
    """Whole runs elsewhere of published settings, or of these at another rate."""
    for path in sorted([*HOME.glob("confirm/**/config.json"), *HOME.glob("search/**/config.json")]):
        config = json.loads(path.read_text(encoding="utf-8"))
        seeds = sorted((TINY / config["objective"] / config["method"]).glob("seed-*"))
        if not seeds or not (path.parent / "eval.csv").is_file():
            continue
        published = json.loads((seeds[0] / "config.json").read_text(encoding="utf-8"))
        lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        differing = {k for k in config if config[k] != published.get(k)}
        if differing <= ONLY and len(lines) == published["rounds"]:
            yield path.parent, config, published, seeds


def rows() -> Iterator[tuple[str, int, int]]:
    """What was compared, how many, and how many are called not reproduced."""
    own = [outside(seed, [s for s in seeds if s != seed]) for seeds in cells() for seed in seeds]
    yield "published seeds, each against the other four", len(own), sum(own)
    fresh: list[bool] = []
    wrong: dict[str, list[bool]] = {}
    for run, config, published, seeds in tries():
        found = outside(run, seeds)
        rates = config["learning_rate"], published["learning_rate"]
        if rates[0] == rates[1]:
            fresh.append(found)
        else:
            name = f"{config['method']}, {rates[0]:g} for {rates[1]:g}"
            wrong.setdefault(name, []).append(found)
    yield "fresh seeds with the published settings", len(fresh), sum(fresh)
    for name, alarms in wrong.items():
        yield f"a wrong rate: {name}", len(alarms), sum(alarms)


if __name__ == "__main__":
    print("| runs | number | called not reproduced |\n|---|--:|--:|")
    for what, number, alarms in rows():
        print(f"| {what} | {number} | {alarms} |")
