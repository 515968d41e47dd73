"""What a trained model's pictures are like, apart from what it was trained for.

Evaluations draw one picture or a few of a prompt, and score them by the objective. Here the model
of every run, and the base model, draws four pictures of each of its prompts, by the training
sampler and in as many steps as it was trained with: how much do they still differ, and what became
of the other scores? diversity.csv, beside the folders of the objectives, has a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import UserError
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, write_atomically
from d3po_bench.runs.run import LORA
from d3po_bench.training.inputs import require_unchanged
from d3po_bench.training.tools import spread as spread_over
from eval.analysis import measured
from eval.analysis.gains import Groups
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
    records = []
    for (_, objective, method), runs in sorted(groups.items(), key=lambda g: g[0][::-1]):
        pairs = [(base, own) for base, own in map(measured.numbers, runs) if base and own]
        if pairs:
            records.append(_crossed(method, objective, pairs))
    if not records:
        first = next(iter(groups.values()))[0]
        raise UserError(
            f"There is no diversity.csv of {first.folder}. Measure it: d3po-bench report RUNS "
            "--measure."
        )
    columns = {
        "method": text("method"), "trained on": text("objective"), "seeds": text("seeds"),
        **{SCORERS[name]: spread(name) for name in CROSSED},
    }  # fmt: skip
    return Table(records, columns, left=("method", "trained on"))


def _crossed(method: str, objective: str, pairs: Sequence[tuple[Row, Row]]) -> Record:
    found: Record = {"method": method, "objective": objective, "seeds": len(pairs)}
    for name in CROSSED:
        gains = np.array([float(own[name]) - float(base[name]) for base, own in pairs])
        low, high = map(float, interval(gains))
        found |= {name: float(gains.mean()), f"{name}_low": low, f"{name}_high": high}
    return found


def measure(runs: Iterable[Run], told: Callable[[str], None] = lambda text: None) -> None:
    """Add a row for each run that has none yet, and for its base model, to diversity.csv.

    A row of another run in its place is replaced.

    Args:
        runs: finished ones, with the weights that they trained in lora/.
        told: called with every row.

    Raises:
        UserError: a run's weights are not there, or those of a scorer, or it was taken out of the
            folders of its objective and method.
    """
    for run in runs:
        path = measured.place(run)
        if path is None:
            raise UserError(
                f"The run in {run.folder} is not in a folder MODEL/OBJECTIVE/METHOD/seed-N of its "
                "own names, beside which its numbers would lie. Move it to one."
            )
        for base, weights in ((False, run.folder / LORA), (True, None)):
            rows, row = measured.read(path), measured.row_of(run, base=base)
            known = measured.found(run, rows, base=base)
            # Of a published run, an earlier version's row is all that there is.
            if known and (known.get(measured.OF) or not (run.folder / LORA).is_dir()):
                continue
            if weights is not None:
                require_unchanged(run.files, LORA, read_prompts(run.config.prompt_source))
            made = row | _means(weights, run.config)
            told(" ".join(str(made[name]) for name in made if name != measured.OF))
            rest = [other for other in rows if measured.key(other) != measured.key(row)]
            write_atomically(path, csv_bytes(sorted([*rest, made], key=measured.key)))


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
    model = load(source, device, training_of(config, Execution().usual()))
    if lora is not None:
        model.load_saved(lora)
    policy = Policy(
        model, steps=config.sampling_steps, eta=config.eta, guidance=config.guidance,
        sampler=config.sampler, timestep_spacing=config.timestep_spacing,
    )  # fmt: skip
    listed = spread_over(read_prompts(config.prompt_source), config.eval_prompts)
    prompts = [prompt for prompt in listed for _ in range(IMAGES)]
    draws = Draws(seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps")
    pictures = model.decode(sample(policy, prompts, draws).latents[:, 0, -1])
    scorers = {name: checked_scorer(name, device, source.scorers) for name in SCORERS}
    return {name: round(float(s(pictures, prompts).mean()), 6) for name, s in scorers.items()}
