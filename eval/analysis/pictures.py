"""What a trained model's pictures are like, apart from what it was trained for.

Evaluations draw one picture or a few of a prompt, and score them by the objective. Here the model
of every run, and the base model, draws eight pictures of each of its prompts, by the training
sampler and in as many steps as it was trained with: how much do they still differ, which of the
base model's kinds of picture are left, and what became of the other scores? diversity.csv, beside
the folders of the objectives, has a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from eval.analysis.tables import Record, Table, over_seeds, spread, text

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 8
"""Of a prompt. The Vendi score depends on it; rows of earlier versions are of four, without it."""
SCORERS = {
    "diversity": "mean cosine distance of a picture to the others of its prompt",
    "vendi": "effective number of different pictures among those of a prompt",
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
        found |= over_seeds(name, [float(own[name]) - float(base[name]) for base, own in pairs])
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
    drawn: dict[str, Tensor] = {}
    for run in runs:
        path = measured.place(run)
        if path is None:
            raise UserError(
                f"The run in {run.folder} is not in a folder MODEL/OBJECTIVE/METHOD/seed-N of its "
                "own names, beside which its numbers would lie. Move it to one."
            )
        plain = measured.row_of(run, base=True)[measured.OF]
        for base, weights in ((False, run.folder / LORA), (True, None)):
            rows, row = measured.read(path), measured.row_of(run, base=base)
            known = measured.found(run, rows, base=base)
            # Of a published run, an earlier version's row is all that there is.
            if known and (measured.whole(known) or not (run.folder / LORA).is_dir()):
                continue
            if weights is not None:
                require_unchanged(run.files, LORA, read_prompts(run.config.prompt_source))
            own = None if weights is None else _pictures(weights, run.config)
            if plain not in drawn:
                drawn[plain] = _pictures(None, run.config)
            made = row | (
                _means(drawn[plain], None, run.config)
                if own is None
                else _means(own, drawn[plain], run.config)
            )
            told(" ".join(str(made[name]) for name in made if name != measured.OF))
            rest = [other for other in rows if measured.key(other) != measured.key(row)]
            write_atomically(path, csv_bytes(sorted([*rest, made], key=measured.key)))


def _pictures(lora: Path | None, config: RunConfig) -> Tensor:
    """Pictures [P * IMAGES, 3, h, w] of a run's base model with that LoRA, drawn as in training."""
    from d3po_bench.diffusion.policy import Policy
    from d3po_bench.diffusion.sampling import Draws, sample
    from d3po_bench.machine import device_of
    from d3po_bench.models.sources import load, model_source
    from d3po_bench.training.trainer import training_of
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
    draws = Draws(
        seed=NOISE_SEED + config.eval_noise, round=0, noise="eval-noise", steps="eval-steps"
    )
    return model.decode(sample(policy, _prompts(config), draws).latents[:, 0, -1])


def _prompts(config: RunConfig) -> list[str]:
    listed = spread_over(read_prompts(config.eval_source), config.eval_prompts)
    return [prompt for prompt in listed for _ in range(IMAGES)]


def _means(pictures: Tensor, base: Tensor | None, config: RunConfig) -> Row:
    """Means over pictures, and which share of those of the base model they cover."""
    from d3po_bench.machine import device_of
    from d3po_bench.models.sources import model_source
    from eval.golden import checked_scorer
    from eval.scorers import _features
    from eval.scorers.diversity import coverage

    weights, device = model_source(config.model).scorers, device_of("auto")
    scorers = {name: checked_scorer(name, device, weights) for name in SCORERS}
    found: Row = {name: float(s(pictures, _prompts(config)).mean()) for name, s in scorers.items()}
    if base is not None:
        features, _ = _features.load(device, weights)
        found["coverage"] = coverage(features(base), features(pictures))
    return {name: round(value, 6) for name, value in found.items()}
