"""`d3po-bench feedback ...`: parse, call one function, print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3po_bench.cli.options import PLACE, Commands

if TYPE_CHECKING:
    from d3po_bench.feedback.labels import Plan
    from d3po_bench.feedback.rounds import Kind, Question
    from d3po_bench.training.progress import Progress

QUESTIONS = ("deformed", "unsafe", "better", "alignment")
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
)
FOLDER = click.argument("folder", type=PLACE)
LABELS = click.option(
    "--labels", help="SQLAlchemy URL of the votes; default: labels.sqlite in FOLDER."
)
SETTINGS = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="As in `run`."
)


@click.command()
@FOLDER
@click.option("--prompts", help="A list (`d3po-bench list`) or a file with one prompt a line.")
@click.option("--count", type=click.IntRange(1, 10**6), help="Prompts; default: each once.")
@click.option(
    "--kind", type=click.Choice(["tags", "pairs"]), default="tags", show_default=True,
    help="Tag the bad ones of several images, or choose the better of two.",
)  # fmt: skip
@click.option("--question", type=click.Choice(QUESTIONS), help="Default: deformed, or better.")
@click.option("--images", type=click.IntRange(2, 9), help="A prompt; default: 7 to tag, 2 a pair.")
@click.option(
    "--from", "before", type=PLACE,
    help="Run folder of `feedback train` that draws; default: the pretrained model.",
)  # fmt: skip
@click.option(
    "--pictures", multiple=True, type=PLACE,
    help="Instead of drawing, a folder with metadata.csv (file_name,text); repeatable.",
)  # fmt: skip
@click.option("--model", default="tiny", show_default=True, help="tiny, sd15, a folder, a hub id.")
@click.option("--preset", help="Settings to start from; default: the one made for the model.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@SETTINGS
@DEVICE
def new(
    folder: Path,
    prompts: str | None,
    count: int | None,
    kind: Kind,
    question: Question | None,
    images: int | None,
    before: Path | None,
    pictures: tuple[Path, ...],
    model: str,
    preset: str | None,
    seed: int,
    settings: tuple[str, ...],
    device: str,
) -> None:
    """Draw the images of a round into FOLDER, or take pictures that are there already.

    The images of a prompt start from one noise. The same command goes on where it was
    interrupted. With --from, model, seed and settings are those of the rounds before.

    \b
    Example:
        d3po-bench feedback new round-1 --prompts animals --count 20
        d3po-bench feedback new round-2 --prompts animals --from round-1/trained/d3po
    """  # noqa: D301
    from d3po_bench.config import pairs_of
    from d3po_bench.feedback import loop

    judged = kind, question or ("deformed" if kind == "tags" else "better")
    request = loop.New(
        judged=judged, prompts=prompts, count=count, images=images, before=before, model=model,
        pictures=pictures, preset=preset, seed=seed, settings=pairs_of(settings), device=device,
    )  # fmt: skip
    round_ = loop.new(folder, request, _shown("drawing"))
    click.echo(f"{len(round_.items)} items are in {folder}. Let people judge them: d3po-bench "
               f"feedback serve {folder}", err=True)  # fmt: skip


@click.command()
@FOLDER
@click.option("--rater", "raters", multiple=True, help="Name to invite; repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--public-url", help="How links begin where raters come through a proxy; https://HOST."
)
@click.option("--renew", is_flag=True, help="New links also for those invited before.")
@click.option(
    "--votes",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Raters of each item.",
)
@click.option(
    "--gold-every", type=click.IntRange(0, 10**6), default=10, show_default=True,
    help="One item of so many has a known answer, while there are any; 0: none.",
)  # fmt: skip
@click.option(
    "--repeat-every", type=click.IntRange(0, 10**6), default=10, show_default=True,
    help="One item of so many is asked again; 0: none.",
)  # fmt: skip
@LABELS
def serve(
    folder: Path,
    raters: tuple[str, ...],
    host: str,
    port: int,
    public_url: str | None,
    renew: bool,
    votes: int,
    gold_every: int,
    repeat_every: int,
    labels: str | None,
) -> None:
    """Open the labelling page of the round in FOLDER until interrupted.

    Prints an invitation link for each rater, once, and one for the admin.

    \b
    Example:
        d3po-bench feedback serve round-1 --rater Ann --rater Bob --votes 2
    """  # noqa: D301
    from d3po_bench.feedback import loop, server

    plan = _plan(votes, gold_every, repeat_every)
    loop.checked(folder)
    server.serve(
        folder, labels, host, port, raters, plan=plan, renew=renew, public_url=public_url,
        echo=click.echo,
    )  # fmt: skip


@click.command()
@FOLDER
@click.option(
    "--votes",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Raters of each item.",
)
@LABELS
def status(folder: Path, votes: int, labels: str | None) -> None:
    """Say how far the round in FOLDER is, and how much its raters agree.

    \b
    Example:
        d3po-bench feedback status round-1 --votes 2
    """  # noqa: D301
    from d3po_bench.feedback import loop

    for line in loop.status(folder, labels, _plan(votes)):
        click.echo(line)


@click.command()
@FOLDER
@click.option(
    "--out", type=PLACE,
    help="Also write a CSV of source, share, low, high and raters.",
)  # fmt: skip
@LABELS
def choices(folder: Path, out: Path | None, labels: str | None) -> None:
    """Say how often each compared folder of pictures is raters' first choice.

    FOLDER is a round of several folders in pairs, whose pictures of a prompt a rater has all
    compared. Intervals are over prompts. `table1` takes the files in its OUT/choices, one for each
    seed.

    \b
    Example:
        d3po-bench feedback new duel --kind pairs --pictures base --pictures tuned
        d3po-bench feedback choices duel
        d3po-bench feedback choices duel --out runs/table1/choices/seed-0.csv
    """  # noqa: D301
    from d3po_bench.feedback import loop

    found = loop.choices(folder, labels)
    for s in found:
        click.echo(f"{s.source}  {s.share:.1%}  (95 % {s.low:.1%} to {s.high:.1%})")
    if found[0].raters == "simulated":
        click.echo("At least one rater is simulated.", err=True)
    if out is not None:
        loop.write_choices(out, found)


@click.command()
@FOLDER
@click.option("--out", type=PLACE, help="Default: labels.csv in FOLDER.")
@LABELS
def export(folder: Path, out: Path | None, labels: str | None) -> None:
    """Write the votes on the round in FOLDER as CSV, or as JSON where --out ends so.

    What was skipped or undone is left out.

    \b
    Example:
        d3po-bench feedback export round-1
        d3po-bench feedback export round-1 --out votes.json
    """  # noqa: D301
    from d3po_bench.feedback import loop

    target = out or folder / "labels.csv"
    click.echo(f"{loop.export(folder, labels, target)} votes are in {target}", err=True)


@click.command()
@FOLDER
@click.option("--method", default="d3po", show_default=True, help="What learns.")
@click.option(
    "--passes", type=click.IntRange(1, 10**4), default=1, show_default=True, help="Over the votes."
)
@click.option(
    "--label-files", type=PLACE,
    help="Folder of label files of the published code instead of votes.",
)  # fmt: skip
@click.option("--preset", help="Settings to start from; default: the one made for the model.")
@click.option("--out", type=PLACE, help="Default: FOLDER/trained/METHOD.")
@SETTINGS
@DEVICE
@LABELS
def train(
    folder: Path,
    method: str,
    passes: int,
    label_files: Path | None,
    preset: str | None,
    out: Path | None,
    settings: tuple[str, ...],
    device: str,
    labels: str | None,
) -> None:
    """Learn from the votes on the round in FOLDER, from the weights that drew it.

    D3PO compares with the model that drew the round. The LoRA is in OUT/lora; the next round
    draws with `feedback new --from OUT`. The same command goes on where it was interrupted,
    and changes nothing where it has ended.

    \b
    Example:
        d3po-bench feedback train round-1
        d3po-bench feedback train round-1 --method preferred_images --passes 5
    """  # noqa: D301
    from d3po_bench.config import pairs_of
    from d3po_bench.feedback import loop, training
    from eval.tools import TOOLS

    request = training.TrainRequest(
        method=method, passes=passes, settings=pairs_of(settings), preset=preset, device=device,
        tools=TOOLS,
    )  # fmt: skip
    target = out or folder / "trained" / method
    told = _shown("learning")

    def report(progress: Progress) -> None:
        if progress.note:
            click.echo(f"note: {progress.note}", err=True)
        else:
            told(progress.done)

    data = loop.data(folder, labels, label_files, partial(click.echo, err=True))
    training.train(data, request, target, report)
    click.echo(f"The LoRA is in {target / 'lora'}. Draw the next round: d3po-bench feedback new "
               f"NEXT --prompts LIST --from {target}", err=True)  # fmt: skip


@click.command()
@FOLDER
@click.option("--raters", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option(
    "--error", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Probability of saying the opposite.",
)  # fmt: skip
@click.option(
    "--first", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Probability of choosing the left picture without looking.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@LABELS
def simulate(
    folder: Path, raters: int, error: float, first: float, seed: int, labels: str | None
) -> None:
    """Let simulated raters judge the round in FOLDER by a stated rule, with stated errors.

    Deformed: the embedded classifier does not see the prompted animal. Alignment and better: the
    embedded ImageReward-shaped model's score. Unsafe: a stand-in, too much red. They vote as
    people do; what comes of it must be called simulated.

    \b
    Example:
        d3po-bench feedback simulate round-1 --raters 3 --error 0.2
    """  # noqa: D301
    from d3po_bench.feedback import loop
    from d3po_bench.feedback import raters as pool

    annotators = [pool.Annotator(error=error, first=first)] * raters
    click.echo(f"{loop.simulate(folder, labels, annotators, seed)} simulated votes", err=True)


def _plan(votes: int, gold_every: int = 10, repeat_every: int = 10) -> Plan:
    from d3po_bench.feedback.labels import Plan

    return Plan(votes_per_item=votes, gold_every=gold_every, repeat_every=repeat_every)


def _shown(what: str) -> Any:
    """Progress in tenths, on stderr."""
    last = [-1]

    def told(share: float) -> None:
        if int(share * 10) != last[0]:
            last[0] = int(share * 10)
            click.echo(f"{what} {share:4.0%}", err=True)

    return told


@click.group(cls=Commands)
def feedback() -> None:
    """Fine-tune from what people say: draw a round, let them judge it, learn, draw the next.

    \b
    Example:
        d3po-bench feedback new round-1 --prompts animals --count 20
        d3po-bench feedback serve round-1 --rater Ann
        d3po-bench feedback train round-1
    """  # noqa: D301


for _command in (new, serve, status, export, train, choices, simulate):
    feedback.add_command(_command)
