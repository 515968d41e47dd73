"""A record of every run, finished or not: the command that makes it, and how it went.

A search leaves hundreds of run folders behind, of which these records are what is worth keeping.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench import config, registry
from d3po_bench.config import RunConfig, method_of
from d3po_bench.errors import UserError
from d3po_bench.runs.files import readable
from d3po_bench.runs.run import RunFolder, find_runs
from eval.analysis.tables import Record, Table, number, text

Settings = dict[str, str]
"""KEY -> VALUE as `--set` takes it."""


def table(folders: Sequence[Path]) -> Table:
    """A row for each run below `folders` that has finished a round, in the order of their paths.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    found = [
        record(run, run.folder.relative_to(folder).as_posix())
        for folder in folders
        for run in find_runs([folder])
        if run.metrics
    ]
    if not found:
        raise UserError(
            f"No run below {', '.join(map(str, folders))} has finished a round. Make one with "
            "`d3po-bench run`, or name another folder."
        )
    columns = {
        "run": text("run"), "settings": text("settings"), "rounds": number("rounds", "d"),
        "training score, first round": number("score_first", ".3f"),
        "last round": number("score_last", ".3f"), "gain": number("gain", "+.3f"),
        "KL": number("kl", ".3f"), "recognised": number("recognised", ".2f"),
    }  # fmt: skip
    return Table(found, columns, left=("run", "settings"))


def record(run: RunFolder, name: str) -> Record:
    """What is worth keeping of a run.

    Args:
        run: with at least one finished round.
        name: what to call it.

    Returns:
        Names, settings, and numbers: of the first and last round in training (mean score, its
        best round and the mean of the last three, denoising error, loss, gradient norm, KL and
        the share of clipped ratios over the steps that are trained on), and of the last
        evaluation, training sampler (gain over round 0, KL, `recognised`), if the last round that
        was finished has one. NaN for what was not measured.

    Raises:
        UserError: a file is damaged or missing.
    """
    own, facts, rounds = run.config, run.facts, run.metrics
    with readable(run.folder / "metrics.jsonl"):
        scores = [_number(line, "score_mean") for line in rounds]
        images = _number(rounds[0], "images")
        first, last = ({name: _number(line, name) if name in line else math.nan
                        for name in _OF_A_ROUND} for line in (rounds[0], rounds[-1]))  # fmt: skip
    best = min if registry.objective(own.objective).sign < 0 else max
    return {
        "run": name,
        "started": facts.get("started", ""),
        "commit": str(facts.get("commit") or "") + ("+changes" if facts.get("dirty") else ""),
        "method": own.method,
        "objective": own.objective,
        "seed": own.seed,
        "settings": " ".join(f"{k}={v}" for k, v in differing(own).items()),
        "rounds": len(rounds),
        "images_first": images,
        "score_first": scores[0],
        "score_best": best(scores),
        "score_last": scores[-1],
        "score_last_three": sum(scores[-3:]) / len(scores[-3:]),
        "denoising_error_first": first["denoising_error"],
        "denoising_error_last": last["denoising_error"],
        "loss_first": first["loss"],
        "grad_norm_first": first["grad_norm"],
        "training_kl_last": last["kl"],
        "saturated_last": last["saturated"],
        **_end(run, len(rounds)),
        "command": command(own, run.folder),
    }


_OF_A_ROUND = ("denoising_error", "loss", "grad_norm", "kl", "saturated")


def _number(line: Record, name: str) -> Any:
    """A number of a round; NaN is one.

    Raises:
        ValueError: it is none.
    """
    if type(line[name]) not in (int, float):
        raise ValueError(f"{ascii(line[name])[:40]} as {name} of round {line['round']}")
    return line[name]


def _end(run: RunFolder, last: int) -> dict[str, float]:
    """Gain, KL and recognisability of the evaluation after that round."""
    means = {
        (number, name): float(np.mean([row.get(name, math.nan) for row in rows]))
        for number, rows in _by_round(run).items()
        for name in ("score", "kl", "animal")
    }
    nothing = math.nan
    return {
        "gain": means.get((last, "score"), nothing) - means.get((0, "score"), nothing),
        "kl": means.get((last, "kl"), nothing),
        "recognised": means.get((last, "animal"), nothing),
    }


def _by_round(run: RunFolder) -> dict[int, list[Record]]:
    """The rows of the training sampler."""
    found: dict[int, list[Record]] = {}
    for row in run.evaluation:
        if row["sampler"] == "eta1":
            found.setdefault(row["round"], []).append(row)
    return found


# ---- commands


def command(own: RunConfig, folder: Path) -> str:
    """The command line that makes a run of that config, which lies in that folder."""
    out = str(folder.parents[3]) if len(folder.parts) > 4 else "runs"
    return shlex.join(["d3po-bench", *arguments(own), "--out", out])


def arguments(own: RunConfig) -> list[str]:
    """What follows `d3po-bench` to make a run of that config, whatever the presets are by then."""
    pairs = [part for k, v in settings(own).items() for part in ("--set", f"{k}={v}")]
    model = [] if own.model == "tiny" else ["--model", own.model]
    lora = ["--lora", own.lora] if own.lora else []
    return [
        "run", "--method", own.method, "--objective", own.objective, *model, *lora,
        "--preset", "quick", "--seed-start", str(own.seed), *pairs,
    ]  # fmt: skip


def settings(own: RunConfig) -> Settings:
    """All settings of a config, the method's options included."""
    given = {**vars(own), **vars(method_of(own))}
    return {key: _text(given[key]) for key in _names(own.method)}


@cache
def _names(method: str) -> tuple[str, ...]:
    known = config.settings(method)
    return (*known["run"], *known["options"])


@cache
def options(method: str) -> Settings:
    """The defaults of a method's own options."""
    plain: Any = registry.method(method)()
    return {f.name: _text(getattr(plain, f.name)) for f in fields(plain)}


def differing(own: RunConfig) -> Settings:
    """The settings that are not those of the preset `quick`."""
    usual = _quick(own.method, own.objective)
    return {key: value for key, value in settings(own).items() if value != usual[key]}


@cache
def _quick(method: str, objective: str) -> Settings:
    made, _ = config.make(method, objective, "quick", {})
    return settings(made)


def settings_of(command: str) -> Settings:
    """What follows each --set of a command."""
    words = shlex.split(command)
    return config.pairs_of([v for k, v in pairwise(words) if k == "--set"])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
