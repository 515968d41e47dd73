"""Figure 7 on the embedded model with SIMULATED raters: whose picture is the first choice.

    python results/feedback/preference.py runs/table1 --seed 0 --out runs/feedback
    python results/feedback/preference.py runs/table1 --seed 0 --error 0.2 --out runs/feedback

Takes the models that `d3po-bench table1 --out runs/table1` trained from that seed, draws the
held-out captions with each and with the base model from the same noise, and lets five simulated
raters compare every two pictures of a caption. Adds to OUT/preference/error-E/seed-N.csv a row
for each model, and the same to OUT/preference/error-E/choices/seed-N.csv as `d3po-bench table1`
reads it; an interrupted call goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

import click

from d3po_bench.errors import said_in_one_line
from d3po_bench.feedback import comparisons
from d3po_bench.feedback.comparisons import Share
from d3po_bench.feedback.simulated import Annotator, simulate
from d3po_bench.feedback.store import open_labels
from d3po_bench.runs.files import csv_bytes, write_atomically
from d3po_bench.runs.run import read_config
from eval import evaluate
from eval.analysis.table1 import SAMPLER

BASE = "no-fine-tune"
METHODS = ("preferred_images", "reward_weighted", "d3po")
RATERS = 5


def drawn(target: Path, run: Path, out: Path, count: int | None) -> Path:
    """The pictures of a model, by the training sampler and drawn as `run` was."""
    own = read_config(run)
    request = evaluate.Request(
        target=target, scorers=(), model="tiny", prompts=None, count=count, images=1,
        steps=own["sampling_steps"], guidance=own["guidance"], device="cpu", jobs=1, out=out,
        save=True,
    )  # fmt: skip
    return evaluate.run(request) / "pictures" / SAMPLER


def compared(sources: list[Path], folder: Path, seed: int, error: float) -> list[Share]:
    """Shares of first choices, of each folder of pictures."""
    if not (folder / "round.json").exists():
        comparisons.take(folder, sources, ("pairs", "alignment"))
    simulate(folder, None, [Annotator(error=error)] * RATERS, seed)
    with open_labels(folder, None) as store:
        return comparisons.choices(store, folder)


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True))
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--error", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--count", type=click.IntRange(min=1), help="Captions; default: all 300.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/feedback"))
def main(runs: Path, seed: int, error: float, count: int | None, out: Path) -> None:
    """Compare the models of one seed of RUNS with each other and the base model."""
    place = out / "preference"
    trained = {m: next(runs.rglob(f"image_reward/{m}/seed-{seed}")) for m in METHODS}
    targets = {BASE: Path("tiny"), **trained}
    sources = [
        drawn(t, trained["d3po"], place / "drawn" / f"{m}-{seed}", count)
        for m, t in targets.items()
    ]
    folder = place / f"error-{error:g}" / f"seed-{seed}"
    shares = compared(sources, folder, seed, error)
    rows = [{"model": m, "share": round(s.share, 6)} for m, s in zip(targets, shares, strict=True)]
    write_atomically(folder.with_suffix(".csv"), csv_bytes(rows))
    comparisons.write_choices(folder.parent / "choices" / folder.with_suffix(".csv").name, shares)
    for row in rows:
        click.echo(row)


if __name__ == "__main__":
    with said_in_one_line():
        main()
