"""What `verify --rerun` would say of published runs and tries, as a table: docs/determinism.md.

    python results/rerun_power.py

Each is compared with the published seeds of its method on its objective, as another seed, which
needs no training; the intervals of the same seed do, and are not used here. A run at a wrong rate
is also compared with one of its own seed at the published rate, by its first round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.analysis.statistics import another_seed
from eval.verify.rerun import FALSE_ALARM, end_of, other_start

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


Try = tuple[Path, dict[str, Any], dict[str, Any], list[Path]]
"""A run, its config, a published config of its method, and the published seeds of that."""


def tries() -> Iterator[Try]:
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


def by_seed(found: list[Try]) -> dict[tuple[Any, ...], Path]:
    """Method, objective and seed -> a run of those with the published settings."""
    return {
        tuple(config[k] for k in ("method", "objective", "seed")): run
        for run, config, published, _ in found
        if config["learning_rate"] == published["learning_rate"]
    }


def rows() -> Iterator[tuple[str, int, int, str]]:
    """What was compared, how many, and how many are called not reproduced, by end and by start."""
    own = [outside(seed, [s for s in seeds if s != seed]) for seeds in cells() for seed in seeds]
    yield "published seeds, each against the other four", len(own), sum(own), ""
    found = list(tries())
    right, fresh = by_seed(found), []
    wrong: dict[str, list[tuple[bool, bool]]] = {}
    for run, config, published, seeds in found:
        alarm, rates = outside(run, seeds), (config["learning_rate"], published["learning_rate"])
        if rates[0] == rates[1]:
            fresh.append(alarm)
            continue
        twin = right[config["method"], config["objective"], config["seed"]]
        name = f"{config['method']}, {rates[0]:g} for {rates[1]:g}"
        wrong.setdefault(name, []).append((alarm, any(other_start(twin, run))))
    yield "fresh seeds with the published settings", len(fresh), sum(fresh), ""
    for name, alarms in wrong.items():
        ends, starts = (sum(column) for column in zip(*alarms, strict=True))
        yield f"a wrong rate: {name}", len(alarms), ends, str(starts)


if __name__ == "__main__":
    print("| runs | number | not reproduced, by the end | by the first round of the same seed |")
    print("|---|--:|--:|--:|")
    for cells_ in rows():
        print(f"| {' | '.join(map(str, cells_))} |")
