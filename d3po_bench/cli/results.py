"""Commands that look at runs: `plot`, `report`, `evaluate`, `table1`, `verify`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from d3po_bench.cli import completion
from d3po_bench.cli.options import (
    MOST_JOBS,
    PLACE,
    PROMPTS,
    RUNS,
    TRACK,
    Answering,
    Range,
    Result,
    Working,
    scorer_names,
)
from d3po_bench.config import MOST_SEEDS
from d3po_bench.errors import RunError, UserError, placed_by

if TYPE_CHECKING:
    from d3po_bench.launch.progress import Board


@click.command(cls=Answering)
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--x",
    type=click.Choice(
        [
            "rounds", "pairs", "images", "scorer_calls", "unet_forwards", "unet_backwards",
            "seconds", "cpu", "drift", "kl_trained", "kl",
        ]
    ),
    default="pairs", show_default=True,
    help="What the axis counts: what was spent, or how far the model has moved (the last three).",
)  # fmt: skip
@click.option("--out", type=PLACE, help="Folder for the figures.")
@click.option(
    "--unfinished", is_flag=True, help="Draw runs that have not ended, as far as they are."
)
def plot(runs: tuple[Path, ...], x: str, out: Path | None, unfinished: bool) -> Result:
    """Draw learning curves with intervals, and before/after sheets.

    RUNS are run folders or folders of them; default: runs/.

    \b
    Example:
        d3po-bench plot
        d3po-bench plot runs/tiny/incompress --x images --out figures
    """  # noqa: D301
    from eval.figures.curves import plot as draw

    return Result.of_paths(draw(runs or (Path("runs"),), out, x, unfinished=unfinished))


@click.command()
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--table",
    "tables",
    multiple=True,
    type=click.Choice(
        ["gains", "contrast", "cost", "efficiency", "drift", "steps", "settings", "crossed", "runs"]
    ),
    help="Repeatable; default: gains and cost.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv", "latex", "json", "lm-eval", "html"]),
    help="Default: by the name of --out, else md. md, latex and html are for people; csv and json "
    "have every number; lm-eval is lm-evaluation-harness's JSON.",
)
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@click.option("--measure", is_flag=True, help="First measure what the models draw; minutes.")
@click.option("--out", type=PLACE, help="Write to this file instead; .html is the page.")
def report(
    runs: tuple[Path, ...],
    tables: tuple[str, ...],
    form: str | None,
    measure: bool,
    out: Path | None,
) -> None:
    """Print tables of runs, or make a page of them: means over seeds with 95 % intervals.

    RUNS are run folders or folders of them; default: runs/. The tables: gains on the objective;
    cost (images, network passes, seconds, and what was lost); efficiency at equal pairs, images
    and passes; drift, what was gained where all have moved equally far; steps, the KL of each
    denoising step; settings; crossed, what training did to other scores; runs, a row for each run
    with the command that makes it. For crossed, and diversity, Vendi score and coverage in cost,
    --measure draws eight pictures of each prompt with every model and writes diversity.csv beside
    the objectives.

    The page is one file that needs no network: the table, curves, drift, pictures before and
    after, and behind each number its seeds, command and settings.

    \b
    Example:
        d3po-bench report
        d3po-bench report runs --out page.html
        d3po-bench report results/tiny --table efficiency
        d3po-bench report runs/tiny --measure --table crossed
        d3po-bench report runs --table runs --format csv --out runs.csv
    """  # noqa: D301
    from d3po_bench.runs.files import write_atomically
    from eval.analysis.report import ENDINGS
    from eval.analysis.report import report as made

    told = functools.partial(click.echo, err=True)
    form = form or ENDINGS.get(out.suffix.lower() if out else "", "md")
    text = made(runs or (Path("runs"),), tables, form, measured=measure, told=told)
    if out is not None:
        write_atomically(out, f"{text}\n".encode())
    click.echo(text if out is None else out)


@click.command(cls=Answering)
@click.argument("a", type=RUNS)
@click.argument("b", type=RUNS)
@click.option(
    "--require", "required", type=click.Choice(["not-worse", "better"]), default="not-worse",
    show_default=True, help="What must hold of A, or the exit status is 1.",
)  # fmt: skip
@click.option(
    "--margin", type=Range(0, 1e9, min_open=True),
    help="A difference that would not matter, in the score's unit: is A equivalent to B?",
)  # fmt: skip
@click.option("--plot", "drawn", type=PLACE, help="Draw seeds and their difference: .png, .svg.")
@placed_by("--plot")
def compare(a: Path, b: Path, required: str, margin: float | None, drawn: Path | None) -> Result:
    """Say whether the runs A are better than the runs B.

    A and B are run folders, or folders with the seeds of one method on one objective. Their gains
    are compared seed by seed where one has all seeds of the other and held-out images are the
    same, else by Welch's t. Exits with 0, or with 1 if A is shown to be worse (--require better:
    unless A is shown to be better), and with 2 if they cannot be compared.
    With --margin, two one-sided tests also say whether they are shown to be equivalent, which a
    large p-value alone does not; choose the margin before you look.

    \b
    Example:
        d3po-bench compare runs/tiny/incompress/d3po runs/tiny/incompress/ddpo
        d3po-bench compare runs-new/tiny/compress/d3po runs/tiny/compress/d3po --plot both.png
    """  # noqa: D301
    from eval.analysis.compare import compare as compared
    from eval.figures import compare as figure

    if drawn is not None:
        figure.require_kind(drawn)
    found = compared(a, b, margin)
    if drawn is not None:
        figure.draw(found, drawn)
    failed = found.verdict != "better" and (required == "better" or found.verdict == "worse")
    return Result([found.sentence()], found.as_json, end=lambda: sys.exit(1) if failed else None)


@click.command(cls=Working)
@click.argument("target", type=RUNS)
@click.option(
    "--scorers",
    shell_complete=completion.of("scorer", several=True),
    help="Names, with commas between them; name:weights for others than the model's, or a FILE.py "
    "of your own. Default: those of the run.",
)
@click.option("--model", help="Base model of a LoRA; default: tiny, or what the run was made with.")
@click.option(
    "--prompts",
    type=PROMPTS,
    help="A list or a file; default: held-out captions, or the run's own.",
)
@click.option("--count", type=click.IntRange(1, 10**6), help="Prompts, spread over the list.")
@click.option(
    "--images", type=click.IntRange(1, 1000), default=1, show_default=True, help="A prompt."
)
@click.option("--steps", type=click.IntRange(1, 999), help="Default: 20, or those of the run.")
@click.option("--guidance", type=Range(0, 100), help="Default: 5, or that of the run.")
@click.option(
    "--long-prompts", type=click.Choice(["refuse", "cut"]),
    help="With more tokens than the text encoder reads; default: refuse, or as the run.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--jobs", type=click.IntRange(1, MOST_JOBS), default=1, show_default=True, help="Processes."
)
@click.option("--out", type=PLACE, help="Default: in TARGET; evaluations/NAME of a model or LoRA.")
@click.option("--save", is_flag=True, help="Keep the pictures, with a metadata.csv.")
def evaluate(
    target: Path,
    scorers: str | None,
    model: str | None,
    prompts: str | None,
    count: int | None,
    images: int,
    steps: int | None,
    guidance: float | None,
    long_prompts: Literal["refuse", "cut"] | None,
    device: str,
    jobs: int,
    out: Path | None,
    save: bool,
    board: Board,
) -> Result:
    """Draw held-out prompts from fixed noise with both samplers, and score every image.

    TARGET is a run folder, a LoRA folder, a model (tiny, a folder, a hub id), or a folder of
    pictures with a metadata.csv or metadata.jsonl (file_name, text). Writes rows.csv, plan.json
    and provenance.json to OUT; the same command resumes where it was interrupted.

    \b
    Example:
        d3po-bench evaluate runs/tiny/incompress/d3po/seed-0 --scorers jpeg_size,animal
        d3po-bench evaluate tiny --scorers clip --count 50 --jobs 2
    """  # noqa: D301
    from d3po_bench.training.progress import IMAGE, Counted
    from eval.evaluate import plan, summary, work

    names = plan.scorers_of(target) if scorers is None else scorer_names(scorers)
    request = plan.EvaluateRequest(
        target=target, scorers=names, model=model, prompts=prompts, count=count,
        images=images, steps=steps, guidance=guidance, device=device, jobs=jobs, out=out,
        save=save, long_prompts=long_prompts,
    )  # fmt: skip
    with board:
        told = Counted("evaluation", IMAGE, board.report)
        folder = work.run(request, told, board.note)
    means = list(summary.summary(folder))
    lines = [
        f"{m['sampler'] or 'pictures'}  {m['column']}  {m['mean']:.4f}  ({m['images']} images)"
        for m in means
    ]
    rows = folder / "rows.csv"
    return Result(lines, {"rows": rows, "means": means}, [f"Rows are in {rows}"])


@click.command(cls=Working)
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--model", default="tiny", show_default=True, help="tiny, tiny2, sd15, a folder, a hub id."
)
@click.option(
    "--objective", default="image_reward", show_default=True,
    shell_complete=completion.of("objective"), help="The signal that trains.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(1, MOST_SEEDS), default=5, show_default=True)
@click.option("--scorers", default="clip,blip,image_reward", show_default=True)
@click.option("--preset", help="Settings to start from; default: alignment, or the model's own.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As in `run`.")
@click.option("--prompts", type=PROMPTS, help="Held-out list or file; default: the model's own.")
@click.option("--count", type=click.IntRange(1, 10**6), help="Of these prompts; default: all.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--jobs", type=click.IntRange(1, MOST_JOBS), help="Runs side by side.")
@click.option("--out", type=PLACE, default=Path("runs/table1"), show_default=True)
@TRACK
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
    track: tuple[str, ...],
    redraw: bool,
    board: Board,
) -> Result:
    """Compare all methods on prompt-image alignment, with the paper's Table 1 beside it.

    Trains every method on OBJECTIVE, or takes the finished RUNS, and scores held-out prompts.
    Writes OUT/table1.csv, .md and .tex; the same command resumes where it was interrupted.
    Where OUT/choices holds files of `feedback choices --out`, raters' first choices are a column.

    \b
    Example:
        d3po-bench table1 --seeds 2 --count 40 --set rounds=2
        d3po-bench table1 runs/tiny/image_reward --out runs/table1
        d3po-bench feedback choices duel --out runs/table1/choices/seed-0.csv
        d3po-bench table1 --redraw --out runs/table1
    """  # noqa: D301
    from d3po_bench.rewards import sums
    from d3po_bench.runs.files import read_csv
    from d3po_bench.setting import pairs_of
    from eval.analysis import table1 as tables

    request = tables.Table1Request(
        objective=sums.normal(objective), model=model, preset=preset, settings=pairs_of(settings),
        seeds=range(seeds), scorers=scorer_names(scorers), prompts=prompts, count=count,
        device=device, jobs=jobs, out=out, runs=runs, track=track,
    )  # fmt: skip
    text = tables.write(out) if redraw else tables.run(request, board)
    return Result([text], lambda: read_csv(out / "table1.csv"))


@click.command(cls=Working)
@click.argument("folder", type=PLACE)
@click.option("--record", is_flag=True, help="Write the manifest of what is there now.")
@click.option("--rerun", type=click.IntRange(1, 10**6), help="Make so many of its runs again.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Draws them."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="How --rerun computes.")
@click.option("--out", type=PLACE, help="Keep what --rerun makes here.")
def verify(
    folder: Path,
    record: bool,
    rerun: int | None,
    seed: int,
    settings: tuple[str, ...],
    out: Path | None,
    board: Board,
) -> Result:
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
    from eval.verify import folder as verifying

    if record:
        recorded = verifying.record(folder)
        return Result([str(recorded)], {"recorded": recorded})
    if rerun is None and (settings or out):
        raise UserError("--set and --out need --rerun. Add --rerun 1.")
    checks = _Checks(folder, rerun, seed, settings, out, board)
    return Result(checks.lines(), checks.as_json, end=checks.require_none)


class _Checks:
    """What is checked, as it comes: a run that is made again takes minutes."""

    def __init__(
        self, folder: Path, rerun: int | None, seed: int, settings: Sequence[str],
        out: Path | None, board: Board,
    ) -> None:  # fmt: skip
        self.folder, self.count, self.seed, self.out = folder, rerun, seed, out
        self.settings, self.board = settings, board
        self.failed = 0

    def made(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """Name, verdict, and what there is to say."""
        from d3po_bench.runs.run import find_runs
        from d3po_bench.setting import pairs_of
        from eval.verify import folder as verifying
        from eval.verify import rerun as again

        for name, problems in verifying.verify(self.folder).items():
            self.failed += len(problems)
            yield name, f"{len(problems)} problems" if problems else "fine", problems
        if self.count is not None:
            for verdict in again.rerun(
                self.folder, find_runs([self.folder], trials=True), self.count, seed=self.seed,
                settings=pairs_of(self.settings), out=self.out, board=self.board,
            ):  # fmt: skip
                self.failed += not verdict.reproduced
                yield verdict.cell, verdict.said, verdict.details

    def lines(self) -> Iterator[str]:
        """For people."""
        for name, said, details in self.made():
            yield f"{name}: {said}"
            yield from (f"  {detail}" for detail in details)

    def as_json(self) -> list[dict[str, object]]:
        """For programs."""
        return [{"check": n, "verdict": v, "details": list(d)} for n, v, d in self.made()]

    def require_none(self) -> None:
        """Fail if a check has.

        Raises:
            RunError: saying how much is wrong.
        """
        if self.failed:
            raise RunError(
                f"{self.failed} problems in {self.folder}. Restore its files, or measure again."
            )
