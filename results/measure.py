"""Measure what documents show and no run folder holds; minutes to hours each.

    python results/measure.py step-shares
    python results/measure.py coverage
    python results/measure.py rounds normalcy --seed 0
    python results/measure.py preference runs/table1
    python results/measure.py collect runs/feedback
    python results/measure.py publish runs/reproduce/tiny results/tiny
    python results/measure.py publish runs/reproduce/tiny2 results/tiny2 --pack

`step-shares`, `coverage`, `collect` and `publish` write into this folder, from which make.py then
writes the documents. Every rater is SIMULATED.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

# An editable install of another checkout has a folder `results`, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3po_bench import registry
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.seeding import normal, stream
from d3po_bench.errors import said_in_one_line
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, write_atomically
from d3po_bench.runs.packed import PACKED, pack
from d3po_bench.runs.run import find_runs
from eval.analysis.runs import evaluated
from eval.figures.curves import plot
from eval.verify.folder import FILES
from results import coverage, raters

sys.path.pop(0)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
PATH = click.Path(path_type=Path)
THERE = click.Path(path_type=Path, exists=True)


@click.group()
def main() -> None:
    """Measure what documents show and no run folder holds."""


# ---- which denoising steps decide a picture's JPEG size

REPEATS = 4


@main.command("step-shares")
def step_shares() -> None:
    """Draw animals again with the noise of one step alone drawn afresh; writes step-shares.csv.

    A share is the mean squared change of the JPEG size over the change when the noise of all
    steps is new. The first noise is kept, as in a pair of D3PO, and shares need not add up to 1.
    "Sensitivity" is E^2 / 2 s^2 of the sampler's step, with E the coefficient of the predicted
    noise and s the standard deviation: nats of KL per unit of squared change of that prediction.
    """
    torch.set_num_threads(1)
    rows = [row for steps in (10, 6) for row in _shares(steps)]
    write_atomically(HERE / "step-shares.csv", csv_bytes(rows))


@torch.no_grad()
def _shares(steps: int) -> list[dict[str, Any]]:
    policy = Policy(load(registry.model_source("tiny"), CPU, Training()), steps=steps)
    prompts, scorer = read_prompts("animals"), registry.load_scorer("jpeg_size", CPU)
    text, shape = policy.model.encode(prompts), policy.model.latent_shape

    def noise(index: int) -> Tensor:
        streams = (stream(0, "steps", index, i) for i in range(steps + 1))
        return normal((len(prompts), *shape), streams)

    def sizes(noise: Tensor) -> Tensor:
        x = noise[0]
        for step, step_noise in enumerate(noise[1:]):
            x = policy.step(x, torch.full((len(x),), step), text).sample(step_noise)
        return scorer(policy.model.decode(x), prompts)

    def change(fresh: Sequence[int]) -> float:
        """Mean squared change, kB^2, when the noise of these steps is drawn afresh."""
        total = 0.0
        for repeat in range(REPEATS):
            one, other = noise(2 * repeat), noise(2 * repeat + 1)
            mixed = one.clone()
            mixed[1:][fresh] = other[1:][fresh]
            total += float((sizes(mixed) - sizes(one)).square().mean()) / REPEATS
        return total

    whole = change(range(steps))
    sensitivity = policy.table.output.square() / (2 * policy.table.std.square())
    return [
        {"T": steps, "step": i + 1, "timestep": int(policy.levels[i]),
         "share": f"{change([i]) / whole:.3f}", "sensitivity": f"{float(sensitivity[i]):.2f}"}
        for i in range(steps)
    ]  # fmt: skip


@main.command("coverage")
def intervals_hold() -> None:
    """Draw seeds whose truth is known, and count how often our intervals hold it."""
    coverage.measure()


main.add_command(raters.rounds)
main.add_command(raters.preference)
main.add_command(raters.collect)


@main.command()
@click.argument("runs", type=THERE)
@click.argument("target", type=PATH)
@click.option("--sheets/--no-sheets", default=True, help="Draw the sheets of samples, too.")
@click.option("--pack", "packed", is_flag=True, help=f"As one file, {PACKED}.")
def publish(runs: Path, target: Path, sheets: bool, packed: bool) -> None:
    """Replace the runs in TARGET by the text files of those below RUNS.

    Weights and pictures stay behind, so the sheets of samples have to be drawn now.
    """
    found, old = evaluated([runs]), [run.folder for run in find_runs([target])]
    files = {(run.place / name).relative_to(runs).as_posix(): run.folder / name
             for run in found for name in FILES}  # fmt: skip
    if packed:
        pack(target / PACKED, files)
    for folder in old:
        if folder.is_relative_to(target):  # else it was unpacked
            shutil.rmtree(folder)
    if not packed:
        (target / PACKED).unlink(missing_ok=True)
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
    if (runs / "diversity.csv").is_file():
        write_atomically(target / "diversity.csv", (runs / "diversity.csv").read_bytes())
    if sheets:
        plot([runs], target / "figures")


if __name__ == "__main__":
    with said_in_one_line():
        main()
