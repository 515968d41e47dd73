"""`d3po-bench feedback agreement`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from d3po_bench.cli.options import PLACE, Result, Working, scorer_names

if TYPE_CHECKING:
    from d3po_bench.launch.progress import Board


@click.command(cls=Working)
@click.argument("data", type=PLACE)
@click.option("--scorers", default="clip,pick_score,hps_v2_1", show_default=True)
@click.option(
    "--pictures", type=PLACE,
    help="Where the pictures' paths in a table begin; default: at the table.",
)  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
)  # fmt: skip
@click.option("--question", help="Whose answers, where several were asked.")
@click.option("--labels", help="SQLAlchemy URL of a round's votes; default: in its folder.")
def agreement(
    data: Path, scorers: str, pictures: Path | None, device: str, question: str | None,
    labels: str | None, board: Board,
) -> Result:  # fmt: skip
    """Show how often scorers rank the pictures in DATA as people did.

    DATA is the folder of a round that people voted on, or a table of judged pictures: this
    page's export, Pick-a-Pic, HPD, ImageReward, Label Studio, the D3PO authors' labels.

    A pair that people left even is left out; a scorer that gives two pictures the same number has
    half a hit. Beside it: how often one rater ranks as the others did, where several judged a pair.

    \b
    Example:
        d3po-bench feedback agreement round-1 --scorers clip:tiny,image_reward:tiny
        d3po-bench feedback agreement pairs.csv --pictures pictures --json
    """  # noqa: D301
    from d3po_bench import registry
    from d3po_bench.feedback import existing
    from d3po_bench.machine import device_of
    from d3po_bench.training.progress import Counted
    from eval import golden
    from eval.analysis import agreement as analysis

    names = dict.fromkeys(scorer_names(scorers))
    for name in names:
        registry.require_scorer(name)
    registry.require_apart(list(names))
    table = existing.judgements(data, labels, pictures, question)
    where = device_of(device)
    loaded = {registry.name_of("scorer", n): golden.checked_scorer(n, where) for n in names}
    with board:
        if unchecked := golden.unchecked(loaded):
            board.note(golden.note(unchecked))
        found = analysis.compare(table, loaded, Counted("scoring", "picture", board.report))
    return Result(analysis.lines(found), found, analysis.notes(found))
