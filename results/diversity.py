"""What pictures are like after training, beside the objective: `results/tiny/diversity.csv`.

    python results/diversity.py runs/reproduce/tiny

The published evaluations draw one picture of a prompt, which has no other to differ from. So every
model that was trained below RUNS, and the base model, draws four pictures of each animal here, by
the training sampler and in as many steps as it was trained with. Adds a row for each to
RUNS/diversity.csv: the mean cosine distance of a picture to the others of its prompt
(`eval/scorers/diversity.py`), the mean aesthetic score and JPEG size. A run that has its row
already is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from d3po_bench import registry
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.errors import said_in_one_line
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load, model_source
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.runs.run import read_config
from eval.measure import NOISE_SEED

IMAGES = 4
PROMPTS = "animals"
BASE = "no-fine-tune"
CPU = torch.device("cpu")
DRAWS = Draws(seed=NOISE_SEED, round=0, noise="eval-noise", steps="eval-steps")

Row = dict[str, Any]


SCORERS = ("diversity", "aesthetic", "jpeg_size")


def measures(lora: Path | None, config: dict[str, Any]) -> dict[str, float]:
    """Means over pictures of the embedded model with that LoRA, drawn as `config` draws them."""
    model = load(model_source("tiny"), CPU, Training())
    if lora is not None:
        model.load_saved(lora)
    policy = Policy(model, steps=config["sampling_steps"], eta=1.0, guidance=config["guidance"])
    prompts = [prompt for prompt in read_prompts(PROMPTS) for _ in range(IMAGES)]
    pictures = model.decode(sample(policy, prompts, DRAWS).latents[:, 0, -1])
    found = {name: registry.scorer(name, CPU, "tiny")(pictures, prompts) for name in SCORERS}
    return {name: round(float(scores.mean()), 6) for name, scores in found.items()}


def measured(runs: Path, known: list[Row]) -> Iterator[Row]:
    """Rows of the models below `runs` that `known` lacks, and of the base model."""
    seen = {_key(row) for row in known}
    for lora in sorted(runs.rglob("lora")):
        config = read_config(lora.parent)
        own: Row = {name: str(config[name]) for name in ("objective", "method", "seed")}
        for row, weights in ((own, lora), (own | {"method": BASE, "seed": ""}, None)):
            if _key(row) not in seen:
                seen.add(_key(row))
                yield row | measures(weights, config)


def _key(row: Row) -> tuple[str, str, str]:
    return row["objective"], row["method"], row["seed"]


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True))
def main(runs: Path) -> None:
    """Measure the models of RUNS."""
    path = runs / "diversity.csv"
    rows = read_csv(path) if path.exists() else []
    for row in measured(runs, list(rows)):
        click.echo(row)
        rows.append(row)
        write_atomically(path, csv_bytes(sorted(rows, key=_key)))


if __name__ == "__main__":
    with said_in_one_line():
        main()
