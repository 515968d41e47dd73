"""`d3po-bench tune`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3po_bench.cli import completion
from d3po_bench.cli.options import PLACE, PROMPTS, Range, Result, Working
from d3po_bench.cli.run import ASK, DEVICE, JOBS, WHERE
from d3po_bench.config import MOST_SEEDS
from d3po_bench.errors import UserError

if TYPE_CHECKING:
    from d3po_bench.launch.progress import Board


class Seeds(click.ParamType[Sequence[int]]):
    """Seeds with commas between them, or a list of them in a file."""

    name = "seeds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Sequence[int]:
        """The seeds."""
        parts = value.split(",") if isinstance(value, str) else value
        try:
            found = [int(part) for part in parts]
        except (TypeError, ValueError):
            found = []
        if not found or len({*found}) < len(found) or not all(0 <= n <= 2**31 for n in found):
            self.fail(f"{value!r} is no list of seeds. Give some, such as 901,902,903.", param, ctx)
        return found


def _protocol(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Take what is not given on the command line from the table [tune] of a file."""
    from d3po_bench.prompts.tables import read_text
    from d3po_bench.registry import unknown

    if path is None:
        return
    try:
        found = tomllib.loads(read_text(path))["tune"]
    except OSError as problem:
        raise UserError(
            f"{path} cannot be read: {problem.strerror}. Give a TOML file."
        ) from problem
    except (KeyError, ValueError) as problem:
        raise UserError(f"{path} has no TOML table [tune]: {problem}. Add it.") from problem
    known = [option.name or "" for option in ctx.command.params]
    for name in found:
        if name not in known:
            raise unknown(f"key of [tune] in {path}", name, known)
    ctx.meta[SETTINGS] = found.pop("settings", [])
    ctx.default_map = found


SETTINGS = "settings of the protocol"


def _with_protocol(
    ctx: click.Context, param: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    """The protocol's settings, and those of the command line, which come before them.

    Raises:
        UserError: one is no KEY=VALUE, or is there twice.
    """
    from d3po_bench.setting import pairs_of

    return pairs_of(ctx.meta.get(SETTINGS, [])) | pairs_of(given)


@click.command(cls=Working)
@click.option(
    "--protocol", type=PLACE, is_eager=True, expose_value=False, callback=_protocol,
    help="A TOML file whose table [tune] has what is not given here, such as seeds = [901, 902].",
)  # fmt: skip
@click.option(
    "--method", "methods", multiple=True, required=True, shell_complete=completion.of("method"),
    help="What is tuned; repeatable.",
)  # fmt: skip
@click.option(
    "--objective", required=True, shell_complete=completion.of("objective"),
    help="What each trial learns to please.",
)  # fmt: skip
@click.option(
    "--against", shell_complete=completion.of("objective"),
    help="The same score with the other sign: each trial learns both, and half the difference of "
    "their gains counts, so that drift does not.",
)  # fmt: skip
@click.option(
    "--trials", type=click.IntRange(1, 10**5), default=20, show_default=True,
    help="Settings that are tried, for each method; more of them go on from there.",
)  # fmt: skip
@click.option(
    "--seeds", type=Seeds(), required=True, metavar="N,N,...",
    help="Development seeds, of which nothing is reported: 901,902,903.",
)  # fmt: skip
@click.option(
    "--recognised", type=Range(0, 1), help="Least share of recognised pictures, for each seed."
)
@click.option(
    "--drift", type=Range(0, 1e6), help="Largest `drift` of the evaluation, for each seed."
)
@click.option(
    "--model", default="tiny", show_default=True, shell_complete=completion.of("model"),
    help="As in `d3po-bench run`.",
)  # fmt: skip
@click.option(
    "--prompts", type=PROMPTS, shell_complete=completion.prompts, help="As in `d3po-bench run`."
)
@click.option(
    "--images", type=click.IntRange(8, 10**6),
    help="Images of a round, the same for every method, however many a prompt has; as the preset "
    "if left out.",
)  # fmt: skip
@click.option("--preset", shell_complete=completion.preset, help="As in `d3po-bench run`.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", shell_complete=completion.setting,
    callback=_with_protocol,
    help="A setting of all runs, not searched then; repeatable. The protocol's others stay.",
)  # fmt: skip
@click.option(
    "--sampler-seed", type=click.IntRange(0, MOST_SEEDS), default=0, show_default=True,
    help="Seed of what is proposed.",
)  # fmt: skip
@DEVICE
@JOBS
@WHERE
@ASK
@click.option(
    "--out", type=PLACE, default=Path("runs/tune"), show_default=True,
    help="Folder of the search: its runs, trials.log and trials.csv.",
)  # fmt: skip
def tune(
    methods: tuple[str, ...], objective: str, against: str | None, trials: int,
    seeds: Sequence[int], recognised: float | None, drift: float | None, model: str,
    prompts: str | None, images: int | None, preset: str | None, settings: dict[str, str],
    sampler_seed: int, device: str, jobs: int | None, where: str, asked: tuple[str, ...],
    out: Path, board: Board,
) -> Result:  # fmt: skip
    """Search each METHOD's settings, with as many trials for each, on development seeds.

    Rate, optimizer steps, steps trained on, images of a prompt, shared noise and options of the
    method are searched. The first eight trials cover the space evenly, at the same rates for every
    METHOD; the next four repeat the most promising one at other rates; Optuna's TPE proposes the
    others. The best trial has the largest mean gain of those
    that keep to --recognised and --drift with every seed. All trials are written to OUT/trials.csv.
    The same command resumes where it was interrupted; with more methods or trials, it adds them.

    \b
    Example:
        d3po-bench tune --method d3po --method ddpo --objective aesthetic --seeds 901,902
        d3po-bench tune --method grpo --objective incompress --against compress --seeds 901
        d3po-bench tune --method awm --objective aesthetic --seeds 901 --recognised 0.85 --jobs 2
    """  # noqa: D301
    from d3po_bench.launch import launch
    from d3po_bench.launch.rule import Rule
    from d3po_bench.launch.tune import TuneRequest, run
    from d3po_bench.setting import pairs_of
    from eval.analysis.tries import ends
    from eval.tools import TOOLS

    request = TuneRequest(
        methods=methods, seeds=seeds, trials=trials, images=images or 0, against=against,
        measure=ends, rule=Rule(recognised, drift), sampler_seed=sampler_seed,
        run=launch.RunRequest(
            method=methods[0], objective=objective, model=model, prompts=prompts,
            preset=preset, settings=settings, seeds=range(1), device=device, out=out,
            tools=TOOLS, jobs=jobs, where=launch.Where(where, pairs_of(asked, "--ask")),
        ),
    )  # fmt: skip
    table, rows = run(request, board)
    return Result(_best(rows), {"table": table, "trials": rows}, [f"All trials: {table}"])


def _best(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The chosen settings of each method, as a grid of `sweep` has them."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        best = next((row for row in own if row["chosen"]), None)
        if best is None:
            lines.append(f"# {method}: each of its {len(own)} trials failed or broke a bound")
            continue
        lines.append(f"[method.{method}]  # {best['value']:+.3f}, trial {best['trial']}")
        lines += [f"{name} = {_toml(value)}" for name, value in best["settings"].items()]
    return lines


def _toml(text: str) -> str:
    """A setting in TOML."""
    try:
        float(text)
    except ValueError:
        return text if text in ("true", "false") else f'"{text}"'
    return text
