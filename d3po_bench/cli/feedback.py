"""`d3po-bench feedback ...`: parse, call one function, print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d3po_bench.cli import completion
from d3po_bench.cli.agreement import agreement
from d3po_bench.cli.options import (
    PLACE,
    PROMPTS,
    TRACK,
    Answering,
    Commands,
    Range,
    Result,
    Working,
)
from d3po_bench.errors import RunError, UserError, placed_by

if TYPE_CHECKING:
    from d3po_bench.feedback.questions import Kind
    from d3po_bench.launch.progress import Board

QUESTION = click.option("--question", help="Whose answers, where several were asked.")
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
PRESET = click.option("--preset", help="Settings to start from; default: the one for the model.")
SEED = click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
VOTES = click.option(
    "--votes", type=click.IntRange(1, 1000), default=1, show_default=True, help="For each item."
)  # fmt: skip


@click.command(cls=Working)
@FOLDER
@click.option(
    "--prompts", type=PROMPTS, help="A list (`d3po-bench list`) or a file: .txt, .csv, .jsonl."
)
@click.option("--count", type=click.IntRange(1, 10**6), help="Number of prompts; default: all.")
@click.option(
    "--kind", type=click.Choice(["tags", "pairs", "scale", "ranking"]),
    help="Tag the bad images of a grid (default), choose the better of two, rate, or order them.",
)  # fmt: skip
@click.option(
    "--question",
    help="deformed, unsafe, better, alignment, or your own; default: deformed, of pairs better.",
)
@click.option("--scale", help="Steps of --kind scale, such as 1-7; default: 1-5.")
@click.option("--study", type=PLACE, help="A TOML file with your own questions and instructions.")
@click.option("--images", type=click.IntRange(2, 9), help="For each prompt; default: 7; pairs: 2.")
@click.option(
    "--from", "before", type=PLACE,
    help="OUT of the `feedback train` whose weights draw; default: the pretrained model.",
)  # fmt: skip
@click.option(
    "--pictures", multiple=True, type=PLACE,
    help="Instead of drawing, a folder with metadata.csv or .jsonl (file_name, text); repeatable.",
)  # fmt: skip
@click.option(
    "--model", default="tiny", show_default=True, help="tiny, tiny2, sd15, a folder, a hub id."
)
@PRESET
@SEED
@SETTINGS
@DEVICE
@placed_by("FOLDER")
def new(
    folder: Path, prompts: str | None, count: int | None, kind: Kind | None, question: str | None,
    scale: str | None, study: Path | None, images: int | None, before: Path | None,
    pictures: tuple[Path, ...], model: str, preset: str | None, seed: int,
    settings: tuple[str, ...], device: str, board: Board,
) -> Result:  # fmt: skip
    """Draw the images of a round into FOLDER, or take pictures that are there already.

    All images of a prompt start from the same noise. Run the same command again to continue
    after an interruption. With --from, model, seed and settings stay those of the rounds before.

    \b
    Example:
        d3po-bench feedback new round-1 --prompts animals --count 20
        d3po-bench feedback new round-2 --prompts animals --from round-1/trained/d3po
        d3po-bench feedback new survey --prompts animals --study study.toml
        d3po-bench feedback new real --prompts animals --kind scale --question "How real is it?"
    """  # noqa: D301
    from d3po_bench.feedback import comparisons, drawing
    from d3po_bench.feedback.schema import asked_of
    from d3po_bench.setting import pairs_of
    from d3po_bench.training.progress import Counted

    asked, beside = asked_of(study, kind, question, scale)
    if pictures:
        round_ = comparisons.take(folder, pictures, asked, beside)
    elif prompts:
        with board:
            round_ = drawing.draw_round(
                folder, asked, prompts, count=count, images=images, before=before, model=model,
                preset=preset, seed=seed, settings=pairs_of(settings), device=device, beside=beside,
                told=Counted("drawing", "picture", board.report),
            )  # fmt: skip
    else:
        raise UserError("Give --prompts, such as --prompts animals, or --pictures with a folder.")
    hint = (f"{len(round_.items)} items are in {folder}. Let people judge them: d3po-bench "
            f"feedback serve {folder}")  # fmt: skip
    return Result([], {"folder": folder, "items": len(round_.items)}, [hint])


@click.command()
@FOLDER
@click.option("--rater", "raters", multiple=True, help="Name to invite; repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--public-url", help="Where a proxy shows the page to raters, such as https://HOST.")
@click.option("--renew", is_flag=True, help="Make new links for those invited before, too.")
@VOTES
@click.option(
    "--gold-every", type=click.IntRange(0, 10**6), default=10, show_default=True,
    help="One item in so many has a known answer, as long as there are any; 0: none.",
)  # fmt: skip
@click.option(
    "--repeat-every", type=click.IntRange(0, 10**6), default=10, show_default=True,
    help="One item in so many is asked a second time; 0: none.",
)  # fmt: skip
@LABELS
def serve(
    folder: Path, raters: tuple[str, ...], host: str, port: int, public_url: str | None,
    renew: bool, votes: int, gold_every: int, repeat_every: int, labels: str | None,
) -> None:  # fmt: skip
    """Serve the labelling page of the round in FOLDER until interrupted.

    Prints an invitation link for each rater and for the admin. A link is shown only once.

    \b
    Example:
        d3po-bench feedback serve round-1 --rater Ann --rater Bob --votes 2
    """  # noqa: D301
    from d3po_bench.feedback.page import server
    from d3po_bench.feedback.store import HandoutSettings

    settings = HandoutSettings(votes, gold_every, repeat_every)
    try:
        server.serve(
            folder, labels, host, port, raters, settings=settings, renew=renew,
            public_url=public_url, echo=click.echo,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise RunError("Interrupted. Votes are kept, and the same command serves on.") from None


@click.command(cls=Answering)
@FOLDER
@VOTES
@LABELS
def status(folder: Path, votes: int, labels: str | None) -> Result:
    """Show how complete the round in FOLDER is, and how much its raters agree.

    \b
    Example:
        d3po-bench feedback status round-1 --votes 2
    """  # noqa: D301
    from d3po_bench.feedback.report import report, state
    from d3po_bench.feedback.store import HandoutSettings, open_labels
    from d3po_bench.feedback.votes import effective_votes, round_progress

    with open_labels(folder, labels, HandoutSettings(votes)) as store:
        given = effective_votes(store)
        known = store.round, given, round_progress(store, given)
        return Result(list(report(*known)), state(*known))


@click.command(cls=Answering)
@FOLDER
@click.option("--out", type=PLACE, help="Also write a CSV of source, share, low, high, raters.")
@LABELS
def choices(folder: Path, out: Path | None, labels: str | None) -> Result:
    """Show how often each folder of a comparison is the raters' first choice.

    FOLDER is a round that compares several folders of pictures in pairs. Only raters who compared
    all pictures of a prompt count. Intervals are over prompts. `table1` reads the files in its
    OUT/choices, one for each seed.

    \b
    Example:
        d3po-bench feedback new duel --kind pairs --pictures base --pictures tuned
        d3po-bench feedback choices duel
        d3po-bench feedback choices duel --out runs/table1/choices/seed-0.csv
    """  # noqa: D301
    from d3po_bench.feedback import comparisons
    from d3po_bench.feedback.store import open_labels

    with open_labels(folder, labels) as store:
        found = comparisons.choices(store, folder)
    if out is not None:
        comparisons.write_choices(out, found)
    lines = [share.said for share in found]
    simulated = found[0].raters == "simulated"
    hints = ["At least one rater is simulated."] if simulated else []
    return Result(lines, [asdict(s) for s in found], hints)


@click.command(cls=Answering)
@FOLDER
@click.option("--out", type=PLACE, help="Default: labels.csv in FOLDER.")
@LABELS
def export(folder: Path, out: Path | None, labels: str | None) -> Result:
    """Write the votes on the round in FOLDER as CSV, or as JSON if --out ends in .json.

    What was skipped or undone is left out.

    \b
    Example:
        d3po-bench feedback export round-1
        d3po-bench feedback export round-1 --out votes.json
    """  # noqa: D301
    from d3po_bench.feedback import votes
    from d3po_bench.feedback.store import open_labels

    target = out or folder / "labels.csv"
    with open_labels(folder, labels) as store:
        count = votes.export(store, target)
    return Result([], {"file": target, "votes": count}, [f"{count} votes are in {target}"])


@click.command(cls=Working)
@click.argument("data", type=PLACE)
@click.option("--method", default="d3po", show_default=True, help="Method to train with.")
@click.option(
    "--passes", type=click.IntRange(1, 10**4), default=1, show_default=True,
    help="How often to go through the votes.",
)  # fmt: skip
@click.option(
    "--label-files", type=PLACE,
    help="Use the label files of the published code in this folder instead of votes.",
)  # fmt: skip
@click.option(
    "--pictures", type=PLACE,
    help="Where the pictures' paths in a table begin; default: at the table.",
)  # fmt: skip
@QUESTION
@click.option("--model", help="What learns from pictures that were not drawn here; default: tiny.")
@PRESET
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of such a training; default: 0.")
@click.option("--out", type=PLACE, help="Default: trained/METHOD in DATA or beside it.")
@SETTINGS
@DEVICE
@LABELS
@TRACK
def train(
    data: Path, method: str, passes: int, label_files: Path | None, pictures: Path | None,
    question: str | None, model: str | None, preset: str | None, seed: int | None, out: Path | None,
    settings: tuple[str, ...], device: str, labels: str | None, track: tuple[str, ...],
    board: Board,
) -> Result:  # fmt: skip
    """Train on DATA: the folder of a round that people voted on, or a table of judged pictures.

    A round of images that were drawn here is learned from the weights that drew it, which are
    D3PO's reference. Pictures from elsewhere, in a round or in a table (.csv, .json, .jsonl or
    .parquet, as of Pick-a-Pic, HPD, ImageReward or Label Studio), teach the --model with
    diffusion_dpo, kto, preferred_images or reward_weighted.

    The LoRA is in OUT/lora; `feedback new --from OUT` draws the next round with it. Run the same
    command again to continue after an interruption; once it has finished, it changes nothing.

    \b
    Example:
        d3po-bench feedback train round-1
        d3po-bench feedback train round-1 --method preferred_images --passes 5
        d3po-bench feedback train pairs.csv --pictures pictures --method diffusion_dpo
    """  # noqa: D301
    from d3po_bench.feedback import existing, training
    from d3po_bench.setting import pairs_of
    from eval.tools import TOOLS

    request = training.TrainRequest(
        method=method, passes=passes, settings=pairs_of(settings), preset=preset, device=device,
        tools=TOOLS, track=track, model=model, seed=seed, question=question, pictures=pictures,
    )  # fmt: skip
    target = out or (data.with_suffix("") if data.is_file() else data) / "trained" / method
    with board:
        learned = existing.learnable(data, request, labels, label_files, board.say)
        training.train(learned, request, target, board.report)
    lora = target / "lora"
    hint = (f"The LoRA is in {lora}. Draw the next round: d3po-bench feedback new NEXT --prompts "
            f"LIST --from {target}")  # fmt: skip
    return Result([], {"lora": lora}, [hint])


@click.command(cls=Working)
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
@click.option(
    "--by", shell_complete=completion.of("scorer"),
    help="Judge tags or pairs, on questions of your own, too, by this scorer, or scorer:weights, "
    "such as geneval_soft or clip:tiny; default: the rule of the question.",
)  # fmt: skip
@click.option(
    "--bad-below", type=Range(-1e9, 1e9),
    help="With --by, tag pictures whose score is not above this; default 0. Pairs need none.",
)  # fmt: skip
@click.option(
    "--temperature", type=Range(0, 1e9), default=0.0, show_default=True,
    help="Choose as Bradley and Terry do: a picture that is better by so much wins 73 % of pairs.",
)  # fmt: skip
@SEED
@LABELS
def simulate(
    folder: Path, raters: int, error: float, first: float, by: str | None,
    bad_below: float | None, temperature: float, seed: int, labels: str | None, board: Board,
) -> Result:  # fmt: skip
    """Let simulated raters judge the round in FOLDER by a stated rule, with stated errors.

    Deformed: the embedded classifier does not see the prompted animal. Alignment and better: the
    embedded ImageReward-shaped model's score. Unsafe: a stand-in, too much red. These rules are
    for pictures of tiny; for those of another model, and for questions of your own, give --by.
    Scales and rankings are for people alone. Votes are stored like people's; results from them
    must be called simulated. The same command continues after an interruption; raters who have
    voted do not vote again by another rule.

    \b
    Example:
        d3po-bench feedback simulate round-1 --raters 3 --error 0.2
        d3po-bench feedback simulate round-1 --by geneval_soft --bad-below 0.5
    """  # noqa: D301
    from d3po_bench.feedback import simulated
    from d3po_bench.training.progress import Counted
    from eval.tools import TOOLS

    if bad_below is not None and by is None:
        raise UserError("--bad-below needs a scorer. Add --by SCORER, or leave --bad-below out.")
    rule = simulated.by_scorer(by, bad_below or 0.0) if by else None
    pool = [simulated.Annotator(error, first, temperature)] * raters
    with board:
        told = Counted("voting", "vote", board.report)
        votes = simulated.simulate(folder, labels, pool, seed, TOOLS, told, rule, board.say)
    return Result([], {"votes": votes}, [f"{votes} simulated votes"])


@click.group(cls=Commands)
def feedback() -> None:
    """Fine-tune from what people say: draw a round, let them judge it, learn, draw the next.

    \b
    Example:
        d3po-bench feedback new round-1 --prompts animals --count 20
        d3po-bench feedback serve round-1 --rater Ann
        d3po-bench feedback train round-1
    """  # noqa: D301


for _command in (new, serve, status, export, train, choices, agreement, simulate):
    feedback.add_command(_command)
