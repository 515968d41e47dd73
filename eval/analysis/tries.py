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
from d3po_bench.presets import PRESETS
from d3po_bench.runs.files import readable
from d3po_bench.runs.run import RunFolder, find_runs
from d3po_bench.setting import pairs_of
from eval.analysis.scores import score_of
from eval.analysis.tables import Record, Table, number, text

Settings = dict[str, str]
"""KEY -> VALUE as `--set` takes it."""


def table(folders: Sequence[Path]) -> Table:
    """A row for each run below `folders` that has finished a round, in the order of their paths.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    found = [
        record(run, run.place.relative_to(folder).as_posix())
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
    best = min if score_of(run).sign < 0 else max
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
        "command": command(own, run.place),
    }


def ends(folder: Path) -> dict[str, float]:
    """Gain, drift, KL and recognisability at the end of a finished run, NaN where not measured."""
    run = RunFolder(folder)
    last = len(run.metrics)
    return _end(run, last) | {"drift": _mean(_by_round(run).get(last, ()), "drift")}


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
        (number, name): _mean(rows, name)
        for number, rows in _by_round(run).items()
        for name in ("score", "kl", "animal")
    }
    nothing = math.nan
    return {
        "gain": means.get((last, "score"), nothing) - means.get((0, "score"), nothing),
        "kl": means.get((last, "kl"), nothing),
        "recognised": means.get((last, "animal"), nothing),
    }


def _mean(rows: Sequence[Record], name: str) -> float:
    """Over the images that have the number, as in `gains`; NaN where none has."""
    known = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
    return float(np.mean(known)) if known else math.nan


def _by_round(run: RunFolder) -> dict[int, list[Record]]:
    """The rows of the training sampler."""
    found: dict[int, list[Record]] = {}
    for row in run.evaluation:
        if row["sampler"] == "eta1":
            found.setdefault(row["round"], []).append(row)
    return found


# ---- commands


def arguments(own: RunConfig) -> list[str]:
    """What follows `d3po-bench` to make a run of that config, whatever the presets are by then."""
    pairs = [part for k, v in settings(own).items() for part in ("--set", f"{k}={v}")]
    names = ["--method", own.source("method"), "--objective", own.source("objective")]
    model = [] if own.model == "tiny" else ["--model", own.model]
    lora = ["--lora", own.lora] if own.lora else []
    return [
        "run", *names, *model, *lora, "--preset", "quick", "--seed-start", str(own.seed), *pairs,
    ]  # fmt: skip


def command(own: RunConfig, folder: Path | None = None) -> str:
    """What makes a run of that config, in that run folder; if None, below runs/."""
    place = folder.parents[3] if folder and len(folder.parts) > 4 else "runs"
    out = ["--out", str(place)] if folder else []
    return shlex.join(["d3po-bench", *arguments(own), *out])


def settings(own: RunConfig) -> Settings:
    """All settings of a config, the method's options included.

    Of a method in a file, which is not loaded, those options that were changed.
    """
    chosen = own.options if "method" in own.sources else vars(method_of(own))
    given = {**{name: getattr(own, name) for name in _names()}, **chosen}
    return {key: _text(value) for key, value in given.items()}


@cache
def _names() -> tuple[str, ...]:
    return tuple(config.settings("d3po")["run"])


@cache
def options(method: str) -> Settings:
    """The defaults of a method's own options; of one that is not installed here, none."""
    if method not in registry.names("method"):
        return {}
    plain: Any = registry.method(method)()
    return {f.name: _text(getattr(plain, f.name)) for f in fields(plain)}


def differing(own: RunConfig, preset: str = "quick") -> Settings:
    """The settings that are not those of the preset."""
    usual = _usual(own.method, own.objective, preset)
    return {key: value for key, value in settings(own).items() if value != usual.get(key)}


def nearest(own: RunConfig) -> tuple[str, Settings]:
    """The preset that a config differs least from, and those settings."""
    found = {preset: differing(own, preset) for preset in PRESETS}
    return min(found.items(), key=lambda item: len(item[1]))


@cache
def _usual(method: str, objective: str, preset: str) -> Settings:
    made = config.of_preset(method, objective, preset)
    return {**options(method), **{k: _text(getattr(made, k)) for k in _names()},
            **{k: _text(v) for k, v in made.options.items()}}  # fmt: skip


def settings_of(command: str) -> Settings:
    """What follows each --set of a command."""
    words = shlex.split(command)
    return pairs_of([v for k, v in pairwise(words) if k == "--set"])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
