"""The command line: parse, call one function, print."""

from __future__ import annotations

import errno
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from d3po_bench import __version__
from d3po_bench.errors import RunError, UserError, fail, of_file
from d3po_bench.feedback.commands import COMMANDS
from d3po_bench.places import PLACE

MOST_SEEDS = 10_000
"""More are a slip: each is a run."""

MOST_JOBS = 1024

EXTRA = ("fastapi", "itsdangerous", "jinja2", "krippendorff", "sqlalchemy", "uvicorn")
"""Modules that the extra `feedback` brings."""


class _Command(click.Group):
    """A group whose unknown command gets a suggestion, and whose order is that of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from d3po_bench.registry import unknown

        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise unknown("command", args[0], list(self.commands))
        return super().resolve_command(ctx, args)


class _Range(click.FloatRange):
    """A range that does not hold nan, which no comparison puts outside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not in the range {self.min}<=x<={self.max}.", param, ctx)
        return found


@click.group(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="d3po-bench")
def cli() -> None:
    """Fine-tune text-to-image diffusion models from preferences and rewards.

    \b
    Example, minutes on a laptop, no download:
        d3po-bench run --method d3po --objective incompress --seeds 5
        d3po-bench plot
    """  # noqa: D301


@cli.command()
@click.option("--method", required=True, help="What learns: see `d3po-bench list`.")
@click.option("--objective", required=True, help="What it learns to please.")
@click.option(
    "--seeds",
    type=click.IntRange(1, MOST_SEEDS),
    default=1,
    show_default=True,
    help="Number of seeds: 5 means seeds 0 to 4.",
)
@click.option(
    "--seed-start", type=click.IntRange(0, 2**31), default=0, show_default=True, help="First seed."
)
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="tiny, sd15, a diffusers folder, or a hub id.",
)
@click.option("--preset", help="Settings to start from; default: the one made for the model.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting; repeatable. See `d3po-bench list --settings`.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 10**6), help="Sampling rounds (the paper's epochs)."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--jobs",
    type=click.IntRange(1, MOST_JOBS),
    help="Seeds run side by side; default: one per core for tiny on a CPU, else 1.",
)
@click.option(
    "--out",
    type=PLACE,
    default=Path("runs"),
    show_default=True,
    help="Folder of run folders.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on with runs that are already there.",
)
@click.option(
    "--deterministic/--no-deterministic",
    default=None,
    help="The same bits each time, or an error; default: on a CPU alone.",
)
@click.option(
    "--track",
    type=click.Choice(["tensorboard"]),
    help="Also write the metrics for a tracker (extra `track`).",
)
def run(
    method: str,
    objective: str,
    seeds: int,
    seed_start: int,
    model: str,
    preset: str | None,
    settings: tuple[str, ...],
    rounds: int | None,
    device: str,
    jobs: int | None,
    out: Path,
    resume: bool,
    deterministic: bool | None,
    track: str | None,
) -> None:
    """Fine-tune a model with METHOD on OBJECTIVE, a run for each seed.

    Writes OUT/MODEL/OBJECTIVE/METHOD/seed-N/ with metrics, evaluation rows, samples and the
    final LoRA. The same command goes on where it was interrupted.

    \b
    Example:
        d3po-bench run --method d3po --objective incompress --seeds 5
        d3po-bench run --method d3po --objective compress --set learning_rate=1e-3 --rounds 20
    """  # noqa: D301
    from d3po_bench import launch
    from d3po_bench.config import pairs_of

    launch.run(
        launch.Request(
            method=method,
            objective=objective,
            model=model,
            preset=preset,
            settings=pairs_of(settings),
            rounds=rounds,
            seeds=range(seed_start, seed_start + seeds),
            device=device,
            jobs=jobs,
            out=out,
            resume=resume,
            track=track,
            deterministic="auto" if deterministic is None else "on" if deterministic else "off",
        )
    )


def _names(text: str) -> tuple[str, ...]:
    """Names of scorers with commas between them, at least one."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise UserError(f"Expected a scorer, got {ascii(text)[:80]}. `d3po-bench list` names them.")
    return found


@cli.command()
@click.argument("runs", nargs=-1, type=PLACE)
@click.option(
    "--x",
    type=click.Choice(
        ["pairs", "images", "scorer_calls", "unet_forwards", "unet_backwards", "seconds"]
    ),
    default="pairs",
    show_default=True,
    help="What the horizontal axis counts.",
)
@click.option("--out", type=PLACE, help="Folder for the figures.")
@click.option(
    "--unfinished", is_flag=True, help="Draw runs that have not ended, as far as they are."
)
def plot(runs: tuple[Path, ...], x: str, out: Path | None, unfinished: bool) -> None:
    """Draw learning curves with intervals, and before/after sheets.

    RUNS are run folders or folders of them; default: runs/.

    \b
    Example:
        d3po-bench plot
        d3po-bench plot runs/tiny/incompress --x images --out figures
    """  # noqa: D301
    from eval.report import plot as draw

    for path in draw(runs or (Path("runs"),), out, x, unfinished=unfinished):
        click.echo(path)


@cli.command()
@click.argument("runs", nargs=-1, type=PLACE)
@click.option(
    "--table",
    "tables",
    multiple=True,
    type=click.Choice(["gains", "cost", "efficiency", "settings", "crossed", "runs"]),
    help="Repeatable; default: gains and cost.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "json"]),
    default="md",
    show_default=True,
    help="Markdown for people; CSV and JSON have every number.",
)
@click.option("--measure", is_flag=True, help="First measure what the models draw; minutes.")
@click.option("--out", type=PLACE, help="Write to this file instead.")
def report(
    runs: tuple[Path, ...], tables: tuple[str, ...], form: str, measure: bool, out: Path | None
) -> None:
    """Print tables of runs: means over seeds with 95 % intervals.

    RUNS are run folders or folders of them; default: runs/. The tables: gains on the objective;
    cost (images, network passes, seconds, and what was lost); efficiency at equal pairs, images
    and passes; settings; crossed, what training did to other scores; runs, a row for each run with
    the command that makes it. For crossed, and the diversity in cost, --measure draws four
    pictures of each prompt with every model and writes diversity.csv beside the objectives.

    \b
    Example:
        d3po-bench report
        d3po-bench report results/tiny --table efficiency
        d3po-bench report runs/tiny --measure --table crossed
        d3po-bench report runs --table runs --format csv --out runs.csv
    """  # noqa: D301
    from d3po_bench.store import write_atomically
    from eval.analysis.report import report as made

    told = functools.partial(click.echo, err=True)
    text = made(runs or (Path("runs"),), tables, form, measured=measure, told=told)
    if out is None:
        click.echo(text)
    else:
        write_atomically(out, f"{text}\n".encode())


@cli.command()
@click.argument("grid", type=PLACE)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--jobs",
    type=click.IntRange(1, MOST_JOBS),
    help="Runs side by side; default: one per core for tiny on a CPU, else 1.",
)
@click.option(
    "--out",
    type=PLACE,
    default=Path("runs"),
    show_default=True,
    help="Folder of run folders.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on with runs that are already there.",
)
def sweep(grid: Path, device: str, jobs: int | None, out: Path, resume: bool) -> None:
    """Run methods x objectives x seeds from the TOML file GRID.

    Finished runs are skipped, half ones go on; a failed one is named at the end and stops no
    other. GRID needs three lines; tables [set], [method.NAME], [objective.NAME] and
    [cell."METHOD.OBJECTIVE"] hold further settings, each as after --set:

    \b
        methods = ["d3po", "ddpo"]
        objectives = ["incompress", "compress"]
        seeds = 5
        [method.ddpo]
        learning_rate = 1e-3

    \b
    Example:
        d3po-bench sweep grid.toml
        d3po-bench sweep results/tiny/grid.toml --out runs/grid --jobs 2
    """  # noqa: D301
    from d3po_bench import sweep as sweeping

    sweeping.run(grid, out=out, jobs=jobs, device=device, resume=resume)


@cli.command()
@click.argument("target", type=PLACE)
@click.option(
    "--scorers",
    default="",
    help="Names, with commas between them; name:weights for others than the model's.",
)
@click.option("--model", help="Base model of a LoRA; default: tiny, or what the run was made with.")
@click.option("--prompts", help="A list or a file; default: held-out captions, or the run's own.")
@click.option("--count", type=click.IntRange(1, 10**6), help="Prompts, spread over the list.")
@click.option(
    "--images", type=click.IntRange(1, 1000), default=1, show_default=True, help="A prompt."
)
@click.option("--steps", type=click.IntRange(1, 999), help="Default: 20, or those of the run.")
@click.option("--guidance", type=_Range(0, 100), help="Default: 5, or that of the run.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--jobs", type=click.IntRange(1, MOST_JOBS), default=1, show_default=True, help="Processes."
)
@click.option("--out", type=PLACE, help="Default: beside the target.")
@click.option("--save", is_flag=True, help="Keep the pictures, with a metadata.csv.")
def evaluate(
    target: Path,
    scorers: str,
    model: str | None,
    prompts: str | None,
    count: int | None,
    images: int,
    steps: int | None,
    guidance: float | None,
    device: str,
    jobs: int,
    out: Path | None,
    save: bool,
) -> None:
    """Draw held-out prompts from fixed noise with both samplers, and score every image.

    TARGET is a run folder, a LoRA folder, a model (tiny, a folder, a hub id), or a folder of
    pictures with a metadata.csv (file_name,text). Writes rows.csv, plan.json and provenance.json
    to OUT; the same command goes on where it was interrupted.

    \b
    Example:
        d3po-bench evaluate runs/tiny/incompress/d3po/seed-0 --scorers jpeg_size,animal
        d3po-bench evaluate tiny --scorers clip --count 50 --jobs 2
    """  # noqa: D301
    from eval import evaluate as evaluating

    request = evaluating.Request(
        target=target, scorers=_names(scorers), model=model, prompts=prompts, count=count,
        images=images, steps=steps, guidance=guidance, device=device, jobs=jobs, out=out,
        save=save,
    )  # fmt: skip
    told = evaluating.lines_of_progress(lambda text: click.echo(text, err=True))
    folder = evaluating.run(request, told, lambda text: click.echo(f"note: {text}", err=True))
    for line in evaluating.summary(folder):
        click.echo(line)
    click.echo(f"Rows are in {folder / 'rows.csv'}", err=True)


@cli.command()
@click.argument("runs", nargs=-1, type=PLACE)
@click.option("--model", default="tiny", show_default=True, help="tiny, sd15, a folder, a hub id.")
@click.option(
    "--objective", default="image_reward", show_default=True, help="The signal that trains."
)
@click.option("--seeds", type=click.IntRange(1, MOST_SEEDS), default=5, show_default=True)
@click.option("--scorers", default="clip,blip,image_reward", show_default=True)
@click.option("--preset", help="Settings to start from; default: alignment, or the model's own.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As in `run`.")
@click.option("--prompts", help="Held-out list or file; default: the model's own.")
@click.option("--count", type=click.IntRange(1, 10**6), help="Of these prompts; default: all.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--jobs", type=click.IntRange(1, MOST_JOBS), help="Runs side by side.")
@click.option("--out", type=PLACE, default=Path("runs/table1"), show_default=True)
@click.option("--redraw", is_flag=True, help="Only write the table of the rows in OUT again.")
def table1(
    runs: tuple[Path, ...],
    model: str,
    objective: str,
    seeds: int,
    scorers: str,
    preset: str | None,
    settings: tuple[str, ...],
    prompts: str | None,
    count: int | None,
    device: str,
    jobs: int | None,
    out: Path,
    redraw: bool,
) -> None:
    """Compare all methods on prompt-image alignment, with the paper's Table 1 beside it.

    Trains every method on OBJECTIVE, or takes the finished RUNS, and scores held-out prompts.
    Writes OUT/table1.csv, .md and .tex; the same command goes on where it was interrupted.
    Where OUT/choices holds files of `feedback choices --out`, raters' first choices are a column.

    \b
    Example:
        d3po-bench table1 --seeds 2 --count 40 --set rounds=2
        d3po-bench table1 runs/tiny/image_reward --out runs/table1
        d3po-bench feedback choices duel --out runs/table1/choices/seed-0.csv
        d3po-bench table1 --redraw --out runs/table1
    """  # noqa: D301
    from d3po_bench.config import pairs_of
    from eval import table1 as tables

    request = tables.Request(
        objective=objective, model=model, preset=preset, settings=pairs_of(settings),
        seeds=range(seeds), scorers=_names(scorers), prompts=prompts, count=count,
        device=device, jobs=jobs, out=out, runs=runs,
    )  # fmt: skip
    told = functools.partial(click.echo, err=True)
    click.echo(tables.write(out) if redraw else tables.run(request, told))


@cli.command()
@click.argument("folder", type=PLACE)
@click.option("--record", is_flag=True, help="Write the manifest of what is there now.")
@click.option("--rerun", type=click.IntRange(1, 10**6), help="Make so many of its runs again.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Draws them."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="How --rerun computes.",
)
@click.option("--out", type=PLACE, help="Keep what --rerun makes here.")
def verify(
    folder: Path,
    record: bool,
    rerun: int | None,
    seed: int,
    settings: tuple[str, ...],
    out: Path | None,
) -> None:
    """Check published results: their files, runs, tables and figures.

    FOLDER carries a manifest.json, which --record writes. If it has a make.py, that script is run
    to see whether it would change a table or figure: look into a stranger's folder first. With
    --rerun, some of the runs are made again: on the same platform and versions their bytes must
    match, elsewhere their ends must lie where other seeds do, neither worse nor better. Exits
    with 1 if a check fails.

    \b
    Example:
        d3po-bench verify results
        d3po-bench verify results --rerun 1 --seed 7
        d3po-bench verify results --rerun 2 --set threads=2 --set micro_batch=8
    """  # noqa: D301
    from eval import verify as verifying

    if record:
        click.echo(verifying.record(folder))
        return
    if rerun is None and (settings or out):
        raise UserError("--set and --out need --rerun.")
    checks = verifying.verify(folder)
    for name, problems in checks.items():
        click.echo(f"{name}: {'fine' if not problems else f'{len(problems)} problems'}")
        for problem in problems:
            click.echo(f"  {problem}")
    failed = sum(map(len, checks.values()))
    if rerun is not None:
        from d3po_bench.config import pairs_of

        failed += _rerun(folder, rerun, seed, pairs_of(settings), out)
    if failed:
        raise RunError(f"{failed} problems in {folder}. Restore its files, or measure again.")


def _rerun(folder: Path, count: int, seed: int, settings: dict[str, str], out: Path | None) -> int:
    """Print a verdict for each cell that is made again; how many are not reproduced."""
    from eval import rerun as again
    from eval.verify import published

    failed = 0
    for verdict in again.rerun(
        folder, published(folder), count, seed=seed, settings=settings, out=out
    ):
        click.echo(f"{verdict.cell}: {verdict.said}")
        for detail in verdict.details:
            click.echo(f"  {detail}")
        failed += not verdict.reproduced
    return failed


@cli.command()
@click.argument("run", type=PLACE)
def show(run: Path) -> None:
    """Print what is known about the run in the folder RUN: settings, origin, cost, last score.

    Works on runs that have not ended, and on published ones, whose weights are not there.

    \b
    Example:
        d3po-bench show runs/tiny/incompress/d3po/seed-0
        d3po-bench show results/tiny/compress/dpok/seed-3
    """  # noqa: D301
    from d3po_bench import show as showing

    for line in showing.lines(run):
        click.echo(line)


@cli.command(name="list")
@click.option("--settings", is_flag=True, help="List what --set can change instead.")
@click.option("--method", default="d3po", show_default=True, help="Whose options to list.")
def list_(settings: bool, method: str) -> None:
    """List methods, objectives, scorers, models, presets and prompt lists.

    \b
    Example:
        d3po-bench list
        d3po-bench list --settings --method d3po
    """  # noqa: D301
    from d3po_bench import listing

    for line in listing.settings(method) if settings else listing.everything():
        click.echo(line)


@cli.command()
@click.option("--record", is_flag=True, help="Write the golden scores of the weights found here.")
def doctor(record: bool) -> None:
    """Say what is installed, which weights are present, and what each missing one needs.

    Scorers score eight fixed pictures and must give the scores that are on record for their
    weights; --record puts them on record.

    \b
    Example:
        d3po-bench doctor
    """  # noqa: D301
    from eval import doctor as doctor_

    doctor_.echo(doctor_.record() if record else doctor_.everything())


@cli.group(cls=_Command)
def weights() -> None:
    """List and fetch the checkpoints of the scorers.

    \b
    Example:
        d3po-bench weights list
        d3po-bench weights fetch clip laion_aesthetic
    """  # noqa: D301


@weights.command(name="list")
def weights_list() -> None:
    """List addresses, checksums, licences, and what is here.

    \b
    Example:
        d3po-bench weights list
    """  # noqa: D301
    from eval import doctor as doctor_

    doctor_.echo(doctor_.list_weights())


@weights.command(name="fetch")
@click.argument("names", nargs=-1, required=True)
def weights_fetch(names: tuple[str, ...]) -> None:
    """Fetch the weights NAMES into the cache, checked; a broken download goes on.

    \b
    Example:
        d3po-bench weights fetch clip laion_aesthetic
    """  # noqa: D301
    from eval import doctor as doctor_

    for folder in doctor_.fetch(names):
        click.echo(folder)


@cli.group(cls=_Command)
def feedback() -> None:
    """Fine-tune from what people say: draw a round, let them judge it, learn, draw the next.

    \b
    Example:
        d3po-bench feedback new round-1 --prompts animals --count 20
        d3po-bench feedback serve round-1 --rater Ann
        d3po-bench feedback train round-1
    """  # noqa: D301


for _command in COMMANDS:
    feedback.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one line on stderr and an exit status of 1 or 2.

    Args:
        arguments: what follows the program's name; None for the process's own.
    """
    try:
        cli(arguments, "d3po-bench", standalone_mode=False)
    except NoArgsIsHelpError as problem:
        click.echo(problem.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as problem:
        fail(_said(problem), 2)
    except (click.Abort, KeyboardInterrupt):
        fail("Interrupted. The same command goes on from the last checkpoint.", 1)
    except UserError as problem:
        fail(str(problem), problem.exit_code)
    except ModuleNotFoundError as problem:
        if problem.name not in EXTRA:
            raise
        fail(f"Expected the extra `feedback` to be installed, got no module {problem.name}. Run: "
             "pip install -c constraints.txt -e '.[feedback]'", 2)  # fmt: skip
    except OSError as problem:
        if problem.errno == errno.EPIPE:  # `d3po-bench list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if problem.filename is None:
            raise
        fail(str(of_file(problem)), 2)


def _said(problem: click.ClickException) -> str:
    """A mistake that click found, in three parts."""
    from d3po_bench.registry import unknown

    context: click.Context | None = getattr(problem, "ctx", None)
    manual = f"`{context.command_path if context else 'd3po-bench'} --help`"
    if isinstance(problem, click.NoSuchOption) and context:
        known = [name for option in context.command.get_params(context) for name in option.opts]
        return str(unknown("option", problem.option_name, known))
    if isinstance(problem, click.MissingParameter) and problem.param:
        return f"Expected {problem.param.opts[0]}, got a command without it. See {manual}."
    if isinstance(problem, click.BadParameter) and problem.param:
        name = problem.param.opts[0]
        return f"Expected a value that fits {name}, got another: {problem.message} See {manual}."
    return f"Expected a command as in {manual}, got another: {problem.format_message()}"
