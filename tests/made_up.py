"""Run folders that are made up, so that tables and figures of them can be checked by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d3po_bench.config import RunConfig

ROUNDS = (0, 5, 10)
PAIRS, IMAGES = 32, 64
"""Of one round."""


def write_run(
    root: Path,
    objective: str = "incompress",
    method: str = "d3po",
    seed: int = 0,
    *,
    model: str = "tiny",
    rounds: Sequence[int] = ROUNDS,
    gain: float = 0.1,
    animal: bool = True,
    **settings: Any,
) -> Path:
    """A run with held-out score 7 + seed / 10 + gain * round (eta1) and 1 kB more with eta0."""
    folder = root / model / objective / method / f"seed-{seed}"
    folder.mkdir(parents=True)
    config = RunConfig(
        method=method, objective=objective, model=model, seed=seed,
        **{"rounds": max(rounds), **settings},
    )  # fmt: skip
    (folder / "config.json").write_text(config.to_json())
    write_evaluation(folder, rounds, 7 + seed / 10, gain, animal)
    metrics, timing = [], []
    for n in range(1, max(rounds) + 1):
        metrics.append({"round": n, "pairs": n * PAIRS, "images": n * IMAGES, "kl": 0.1})
        timing.append({"round": n, "sample": 2.0, "update": 1.0, "evaluate": 100.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (folder / "timing.jsonl").write_text("".join(json.dumps(t) + "\n" for t in timing))
    return folder


def write_evaluation(
    folder: Path, rounds: Sequence[int], base: float, gain: float, animal: bool
) -> None:
    """Two prompts and two images of each, half a kB to both sides of the mean."""
    lines = ["round,sampler,prompt,index,score" + ",animal" * animal]
    for n, sampler in itertools.product(rounds, ("eta1", "eta0")):
        for i, prompt in itertools.product((0, 1), ("cat", "sea horse")):
            score = base + gain * n + (sampler == "eta0") + i - 0.5
            lines.append(f"{n},{sampler},{prompt},{i},{score:.6f}" + ",0.8" * animal)
    (folder / "eval.csv").write_text("\n".join(lines) + "\n")


def add_columns(folder: Path, costs: dict[str, Any], kl: float = 0.0, **columns: str) -> None:
    """Further columns of a run's files.

    Args:
        folder: the run's.
        costs: of metrics.jsonl, so much more in every round.
        kl: so much more KL in every round, with the training sampler; 0 for no such column.
        columns: of eval.csv, the same in all rows.
    """
    head, *rows = (folder / "eval.csv").read_text().splitlines()
    own = {**columns, **({"kl": ""} if kl else {})}
    text = [",".join([head, *own])]
    for row in rows:
        number, sampler, *_ = row.split(",")
        last = [f"{kl * int(number)}" if sampler == "eta1" else ""] if kl else []
        text.append(",".join([row, *columns.values(), *last]))
    (folder / "eval.csv").write_text("\n".join(text) + "\n")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [json.dumps(m | {k: v * m["round"] for k, v in costs.items()}) for m in metrics]
    (folder / "metrics.jsonl").write_text("\n".join(logged) + "\n")


def write_opposites(root: Path) -> Path:
    """Two methods on two opposite objectives, two seeds each, with costs and drift.

    All files grow, also on `compress`: d3po gains 1.0 and 1.1 kB, ddpo 0.5 and 0.6.
    """
    for objective, method, seed in itertools.product(
        ("compress", "incompress"), ("d3po", "ddpo"), (0, 1)
    ):
        gain = {"d3po": 0.1, "ddpo": 0.05}[method] + seed / 100
        folder = write_run(root, objective, method, seed, gain=gain)
        add_columns(folder, {"unet_forwards": 7, "scorer_calls": 64}, kl=0.01 * (seed + 1))
    return root
