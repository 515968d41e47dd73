"""`d3po-bench run` and `sweep`."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3po_bench.cli import completion
from d3po_bench.cli.options import MOST_JOBS, PLACE, PROMPTS, TRACK, Out, Result, Working
from d3po_bench.config import MOST_SEEDS

if TYPE_CHECKING:
    from d3po_bench.launch.progress import Board
    from d3po_bench.launch.state import State

DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
)
JOBS = click.option(
    "--jobs", type=click.IntRange(1, MOST_JOBS),
    help="Runs side by side; default: one per GPU, one per core for tiny, tiny2 on a CPU, else 1.",
)  # fmt: skip
RANKS = click.option(
    "--ranks", type=click.IntRange(1, MOST_JOBS), default=1, show_default=True,
    help="Processes that share each run, a GPU for each; the bytes are those of one.",
)  # fmt: skip
OUT = click.option(
    "--out",
    type=Out(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of run folders, or an address such as s3://BUCKET/runs.",
)
WHERE = click.option(
    "--where", default="local", show_default=True, shell_complete=completion.of("place"),
    help="Where the runs are made: local, ray or slurm.",
)  # fmt: skip
ASK = click.option(
    "--ask", "asked", multiple=True, metavar="KEY=VALUE",
    help="What each run asks of the cluster, such as num_gpus=0.25 (ray) or timeout_min=120 "
    "(slurm); repeatable.",
)  # fmt: skip
RESUME = click.option(
    "--resume/--no-resume", default=True, show_default=True,
    help="Continue runs that are already there.",
)  # fmt: skip


@click.command(cls=Working)
@click.option(
    "--method", required=True, shell_complete=completion.of("method"),
    help="What learns: see `d3po-bench list`; or a FILE.py of your own.",
)  # fmt: skip
@click.option(
    "--objective", required=True, shell_complete=completion.of("objective"),
    help="What it learns to please: see `d3po-bench list`; or FILE.py, package.module:NAME, the "
    "address of a server, or a sum such as aesthetic:0.7+clip:0.3.",
)  # fmt: skip
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
    shell_complete=completion.of("model"),
    help="tiny, tiny2, sd15, a diffusers folder, a hub id, or a FILE.py with a model family.",
)
@click.option(
    "--prompts",
    type=PROMPTS,
    shell_complete=completion.prompts,
    help="A list (`d3po-bench list`) or a file: .txt with one on each line, or a .csv, .tsv, .json "
    "or .jsonl with a field prompt, text or caption, or FILE:FIELD. Default: the objective's.",
)
@click.option(
    "--lora", type=PROMPTS,
    help="Begin where this LoRA ended: a .safetensors file, or the folder lora/ of a run.",
)  # fmt: skip
@click.option(
    "--preset", shell_complete=completion.preset,
    help="Settings to start from; default: the one made for the model.",
)  # fmt: skip
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=completion.setting,
    help="Override one setting; repeatable. See `d3po-bench list --settings`.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 10**6),
    help="Sampling rounds (the paper's epochs); more of them extend runs that are there.",
)  # fmt: skip
@DEVICE
@JOBS
@RANKS
@WHERE
@ASK
@OUT
@RESUME
@click.option(
    "--deterministic/--no-deterministic",
    default=None,
    help="The same bits each time, or an error; default: on a CPU alone.",
)
@TRACK
def run(
    method: str,
    objective: str,
    seeds: int,
    seed_start: int,
    model: str,
    prompts: str | None,
    lora: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    rounds: int | None,
    device: str,
    jobs: int | None,
    where: str,
    asked: tuple[str, ...],
    ranks: int,
    out: Path,
    resume: bool,
    deterministic: bool | None,
    track: tuple[str, ...],
    board: Board,
) -> Result:
    """Fine-tune a model with METHOD on OBJECTIVE, a run for each seed.

    Writes OUT/MODEL/OBJECTIVE/METHOD/seed-N/ with metrics, evaluation rows, samples and the
    final LoRA. The same command resumes where it was interrupted.

    \b
    Example:
        d3po-bench run --method d3po --objective incompress --seeds 5
        d3po-bench run --method d3po --objective compress --set learning_rate=1e-3 --rounds 20
        d3po-bench run --method d3po --objective ./my_reward.py
    """  # noqa: D301
    from d3po_bench.launch import launch
    from d3po_bench.setting import pairs_of
    from eval.tools import TOOLS

    request = launch.RunRequest(
        method=method, objective=objective, model=model, prompts=prompts, lora=lora,
        preset=preset, settings=pairs_of(settings), rounds=rounds,
        seeds=range(seed_start, seed_start + seeds), device=device, jobs=jobs,
        ranks=ranks, out=out, resume=resume, track=track, tools=TOOLS,
        where=launch.Where(where, pairs_of(asked, "--ask")),
        deterministic="auto" if deterministic is None else "on" if deterministic else "off",
    )  # fmt: skip
    return _ended(launch.run(request, board), out)


@click.command(cls=Working)
@click.argument("grid", type=PLACE)
@DEVICE
@JOBS
@RANKS
@WHERE
@ASK
@OUT
@RESUME
@TRACK
@click.option(
    "--method", "methods", multiple=True, shell_complete=completion.of("method"),
    help="Only this method of the grid; repeatable.",
)  # fmt: skip
@click.option(
    "--objective", "objectives", multiple=True, shell_complete=completion.of("objective"),
    help="Only this objective of the grid; repeatable.",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(1, MOST_SEEDS), help="Only so many seeds, the grid's first."
)
@click.option(
    "--model", shell_complete=completion.of("model"), help="Another model than the grid's."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", shell_complete=completion.setting,
    help="A setting of every run, which wins over the grid's; repeatable.",
)  # fmt: skip
@click.option(
    "--status", is_flag=True, help="Say where each run is, by the folders alone, and run nothing."
)
def sweep(
    grid: Path, device: str, jobs: int | None, ranks: int, where: str, asked: tuple[str, ...],
    out: Path, resume: bool, track: tuple[str, ...], methods: tuple[str, ...],
    objectives: tuple[str, ...], seeds: int | None, model: str | None,
    settings: tuple[str, ...], status: bool, board: Board,
) -> Result:  # fmt: skip
    """Run methods x objectives x seeds from the TOML file GRID.

    Finished runs are skipped, interrupted ones resumed; a failed one is named at the end and
    stops no other. GRID needs three lines; tables [set], [method.NAME], [objective.NAME] and
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
        d3po-bench sweep results/tiny/grid.toml --out grid --jobs 2
        d3po-bench sweep grid.toml --where slurm --ask timeout_min=120 --ask gpus_per_node=1
        d3po-bench sweep grid.toml --objective incompress --seeds 5 --model FOLDER
        d3po-bench sweep grid.toml --status
    """  # noqa: D301
    from d3po_bench.launch import grid as sweeping
    from d3po_bench.launch.launch import Where
    from d3po_bench.setting import pairs_of
    from eval.tools import TOOLS

    chosen = sweeping.part(sweeping.read(grid), methods, objectives, seeds)
    chosen = sweeping.other(chosen, model, pairs_of(settings))
    if status:
        return _status(sweeping.states(chosen, TOOLS, out))
    made = sweeping.run(
        chosen, TOOLS, out=out, jobs=jobs, ranks=ranks, device=device, resume=resume, track=track,
        board=board, where=Where(where, pairs_of(asked, "--ask")),
    )  # fmt: skip
    return _ended(made, out)


def _status(states: list[State]) -> Result:
    """Where each run is, and how many are where."""
    from d3po_bench.training.progress import label

    names = [label(state.config) for state in states]
    wide = max(map(len, names))
    lines = [
        f"{name:<{wide}}  {state.name:<9}  {f'{state.rounds}/{state.config.rounds}':>7}  "
        f"{state.gained:<16}  {state.why}".rstrip()
        for name, state in zip(names, states, strict=True)
    ]
    counts = Counter(state.name for state in states)
    data = [
        {"run": name, "state": state.name, "rounds": state.rounds, "of": state.config.rounds,
         "gain": state.gain, "unit": state.unit, "why": state.why}
        for name, state in zip(names, states, strict=True)
    ]  # fmt: skip
    return Result(
        lines, {"runs": data, "counts": counts},
        [", ".join(f"{n} {name}" for name, n in counts.items()) + f", of {len(states)} runs"],
    )  # fmt: skip


def _ended(folders: list[Path], out: Path) -> Result:
    """What the runs reached, and what to do with them next."""
    from d3po_bench.runs.remote import address_of
    from eval.analysis.ending import ending

    table, hints = ending(folders, out)
    if address := address_of(out):
        hints = [*hints, f"These are copies: the runs are kept in {address}"]
    tables = partial(_tables, folders) if table else None
    return Result([table] if table else [], {"runs": folders, "tables": tables}, hints)


def _tables(folders: list[Path]) -> Any:
    """What `report --format json` has of these runs."""
    from eval.analysis.report import report

    return json.loads(report(folders, form="json"))
