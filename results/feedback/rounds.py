"""Figures 4 and 5 on the embedded model with SIMULATED raters: rates over rounds of feedback.

    python results/feedback/rounds.py normalcy --seed 0 --out runs/feedback
    python results/feedback/rounds.py safety --seed 0 --error 0.2 --out runs/feedback

A round draws seven images of each prompt from one noise (normalcy: the 135 training captions,
safety: the 45 animals), simulated raters tag the bad ones, D3PO learns from the tags against the
model that drew the round, and the next round draws with what was learnt. Writes
OUT/EXPERIMENT/error-E/seed-N/rates.csv, a row for each round; an interrupted call goes on where
it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from d3po_bench.config import pairs_of
from d3po_bench.errors import said_in_one_line
from d3po_bench.feedback import simulated, training
from d3po_bench.feedback.drawing import draw_round
from d3po_bench.feedback.rounds import Question, Round
from d3po_bench.feedback.simulated import Annotator
from d3po_bench.feedback.votes import scores_of
from d3po_bench.runs.files import csv_bytes, write_atomically


@dataclass(frozen=True)
class Experiment:
    """What is asked, and the settings that were chosen for it on seeds 100 and 101."""

    question: Question
    drawing: dict[str, str]
    learning: dict[str, str]
    prompts: str = "animals"


EXPERIMENTS = {
    # Five steps, so that the embedded model makes mistakes: with ten it draws every animal right.
    "normalcy": Experiment(
        "deformed",
        {"sampling_steps": "5", "skip_steps": "2"},
        # One update from all tags of 45 prompts: few pictures are bad, and fewer tags are noise.
        {
            "skip_steps": "2",
            "timestep_fraction": "1",
            "prompts_per_round": "45",
            "units_per_update": "100000",
            "learning_rate": "0.005",
        },
        prompts="captions",
    ),
    "safety": Experiment("unsafe", {}, {"units_per_update": "16"}),
}


def play(
    experiment: Experiment, folder: Path, seed: int, rounds: int, pool: list[Annotator]
) -> None:
    """Go through the rounds: draw, tag, learn."""
    rows: list[dict[str, float | int]] = []
    before = None
    for number in range(rounds + 1):
        place = folder / f"round-{number}"
        round_ = draw_round(
            place, ("tags", experiment.question), experiment.prompts, seed=seed, before=before,
            settings={} if before else experiment.drawing, device="cpu",
        )  # fmt: skip
        simulated.simulate(place, None, pool, seed * 1000 + number)
        rows.append({"round": number, **rates(place, round_, experiment)})
        click.echo(rows[-1])
        write_atomically(folder / "rates.csv", csv_bytes(rows))
        if number < rounds:
            before = place / "trained" / "d3po"
            learn(experiment, place, before)


def learn(experiment: Experiment, place: Path, out: Path) -> None:
    """One pass over the tags."""
    request = training.Request(
        method="d3po", passes=1, settings=experiment.learning, preset=None, device="cpu"
    )
    training.train(training.data_of(place, scores_of(place)), request, out)


def rates(place: Path, round_: Round, experiment: Experiment) -> dict[str, float | int]:
    """Share of good images, as the raters said and as the rule says without errors."""
    said = scores_of(place)
    worth = simulated.worths(place, round_, simulated.RULES[experiment.question])
    truth = torch.stack([worth[item.id] > 0 for item in round_.items])
    return {
        "images": truth.numel(),
        "said_good": round(1 + float(said.mean()), 6),
        "good": round(float(truth.float().mean()), 6),
        "recognised": round(float(recognised(place, round_)), 6),
    }


def recognised(place: Path, round_: Round) -> float:
    """Share of images in which the classifier sees the prompted animal: what safety costs."""
    worth = simulated.worths(place, round_, simulated.recognised)
    return float(torch.stack(list(worth.values())).gt(0).float().mean())


@click.command()
@click.argument("experiment", type=click.Choice(list(EXPERIMENTS)))
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--raters", "number", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--error", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--prompts", help="Another list or file.")
@click.option("--draw", multiple=True, metavar="KEY=VALUE", help="Another way to draw.")
@click.option("--set", "learn_", multiple=True, metavar="KEY=VALUE", help="Another way to learn.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/feedback"))
def main(
    experiment: str, seed: int, rounds: int, number: int, error: float, prompts: str | None,
    draw: tuple[str, ...], learn_: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Play one seed of EXPERIMENT with NUMBER simulated raters."""
    folder = out / experiment / f"error-{error:g}" / f"seed-{seed}"
    own = EXPERIMENTS[experiment]
    played = replace(
        own, drawing=own.drawing | pairs_of(draw), learning=own.learning | pairs_of(learn_),
        prompts=prompts or own.prompts,
    )  # fmt: skip
    play(played, folder, seed, rounds, [Annotator(error=error)] * number)


if __name__ == "__main__":
    with said_in_one_line():
        main()
