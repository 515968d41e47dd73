"""What a trained model's pictures are like, apart from what it was trained for.

Evaluations draw one picture or a few of a prompt, and score them by the objective. Here the model
of every run, and the base model, draws four pictures of each of its prompts, by the training
sampler and in as many steps as it was trained with: how much do they still differ, and what became
of the other scores? diversity.csv, beside the folders of the objectives, has a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import UserError
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.runs.run import LORA
from d3po_bench.training.inputs import require_unchanged
from d3po_bench.training.tools import spread as spread_over
from eval.analysis.gains import BASE, Groups, beside
from eval.analysis.runs import Run
from eval.analysis.statistics import interval
from eval.analysis.tables import Record, Table, spread, text

IMAGES = 4
SCORERS = {
    "diversity": "mean cosine distance of a picture to the others of its prompt",
    "jpeg_size": "JPEG size, kB",
    "aesthetic": "aesthetic score, points",
}
CROSSED = ("jpeg_size", "aesthetic")
"""Scores that the methods are trained on, each here whatever was the objective."""

Row = dict[str, Any]


def crossed(groups: Groups) -> Table:
    """What training on one objective does to the scores of another: gains over the base model.

    Raises:
        UserError: `measure` was not called before.
    """
    places = list(dict.fromkeys(beside(run) for runs in groups.values() for run in runs))
    rows = [row for place in places for row in read_csv(place)]
    if not rows:
        raise UserError(f"There is no {places[0]}. Measure it: d3po-bench report RUNS --measure.")
    rows = sorted(rows, key=lambda row: (row["method"], row["objective"]))
    bases = {row["objective"]: row for row in rows if row["method"] == BASE}
    records = [
        _crossed(method, objective, list(seeds), bases[objective])
        for (method, objective), seeds in groupby(rows, lambda r: (r["method"], r["objective"]))
        if method != BASE
    ]
    columns = {
        "method": text("method"), "trained on": text("objective"), "seeds": text("seeds"),
        **{SCORERS[name]: spread(name) for name in CROSSED},
    }  # fmt: skip
    return Table(records, columns, left=("method", "trained on"))


def _crossed(method: str, objective: str, seeds: Sequence[Row], base: Row) -> Record:
    found: Record = {"method": method, "objective": objective, "seeds": len(seeds)}
    for name in CROSSED:
        gains = np.array([float(seed[name]) - float(base[name]) for seed in seeds])
        low, high = map(float, interval(gains))
        found |= {name: float(gains.mean()), f"{name}_low": low, f"{name}_high": high}
    return found


def measure(runs: Iterable[Run], told: Callable[[str], None] = lambda text: None) -> None:
    """Add a row for each run that has none yet, and for its base model, to diversity.csv.

    Args:
        runs: finished ones, with the weights that they trained in lora/.
        told: called with every row.

    Raises:
        UserError: a run's weights are not there, or those of a scorer.
    """
    for run in runs:
        objective, method = run.group[1:]
        path = beside(run)
        own: Row = {"objective": objective, "method": method, "seed": str(run.seed)}
        for row, weights in (
            (own, run.folder / LORA),
            (own | {"method": BASE, "seed": ""}, None),
        ):
            rows = read_csv(path)
            if _key(row) not in map(_key, rows):
                require_unchanged(run.files, LORA, read_prompts(run.config.prompt_source))
                rows.append(row | _means(weights, run.config))
                told(" ".join(map(str, rows[-1].values())))
                write_atomically(path, csv_bytes(sorted(rows, key=_key)))


def _key(row: Row) -> tuple[str, str, str]:
    return row["objective"], row["method"], row["seed"]


def _means(lora: Path | None, config: RunConfig) -> dict[str, float]:
    """Means over pictures of a run's base model with that LoRA, drawn as in training."""
    from d3po_bench.diffusion.policy import Policy
    from d3po_bench.diffusion.sampling import Draws, sample
    from d3po_bench.machine import device_of
    from d3po_bench.models.sources import load, model_source
    from d3po_bench.training.trainer import training_of
    from eval.golden import checked_scorer
    from eval.measure import NOISE_SEED

    if lora is not None and not lora.is_dir():
        raise UserError(f"{lora} is not there. Measuring needs the weights that a run trained.")
    source, device = model_source(config.model), device_of("auto")
    model = load(source, device, training_of(config, Execution()))
    if lora is not None:
        model.load_saved(lora)
    policy = Policy(
        model, steps=config.sampling_steps, eta=config.eta, guidance=config.guidance,
        sampler=config.sampler,
    )  # fmt: skip
    listed = spread_over(read_prompts(config.prompt_source), config.eval_prompts)
    prompts = [prompt for prompt in listed for _ in range(IMAGES)]
    draws = Draws(seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps")
    pictures = model.decode(sample(policy, prompts, draws).latents[:, 0, -1])
    scorers = {name: checked_scorer(name, device, source.scorers) for name in SCORERS}
    return {name: round(float(s(pictures, prompts).mean()), 6) for name, s in scorers.items()}
