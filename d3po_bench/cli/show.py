"""`d3po-bench show`: what a run folder says of itself, for people."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from d3po_bench import registry
from d3po_bench.cli.options import PLACE
from d3po_bench.config import RunConfig, make
from d3po_bench.errors import UserError
from d3po_bench.presets import PRESETS
from d3po_bench.runs.run import Row, content, read_config, read_facts, read_lines, readable
from d3po_bench.runs.sessions import differing, sessions
from d3po_bench.text import section

ABSENT = "not on record"
"""What an older version did not write down."""

CONTENT = {"lora": "weights", "checkpoints": "a checkpoint", "samples": "sample images"}


def lines(run: Path) -> Iterator[str]:
    """What is known about a run, a fact to a line.

    Args:
        run: a run folder, finished or not, with or without weights.

    Raises:
        UserError: it is none, or a file in it is damaged or of a newer version.
    """
    if not (run / "config.json").is_file():
        raise UserError(
            f"Expected a run folder, got {run}, which has no config.json. Give the folder "
            "MODEL/OBJECTIVE/METHOD/seed-N of a run."
        )
    config, facts = read_config(run), read_facts(run)
    metrics, seconds = _lines(run / "metrics.jsonl"), _lines(run / "timing.jsonl")
    yield from section("run", _what(run, config, facts, metrics))
    yield from section("settings", _settings(config))
    yield from section("made with", _made_with(facts))
    if several := _sessions(facts):
        yield from section("made in several environments", several)
    yield from section("inputs", _inputs(facts))
    yield from section("content", _content(run, facts))
    yield from section("cost", _cost(metrics, seconds))
    yield from section("last evaluation", _evaluation(run / "eval.csv"))


def _lines(path: Path) -> list[Row]:
    return read_lines(path) if path.exists() else []


def _what(run: Path, config: Row, facts: Row, metrics: list[Row]) -> dict[str, str]:
    started, ended = facts.get("started"), facts.get("ended")
    rounds = f"{metrics[-1]['round'] if metrics else 0} of {config.get('rounds', ABSENT)}"
    there = [words for name, words in CONTENT.items() if (run / name).is_dir()]
    return {
        **{name: str(config[name]) for name in ("method", "objective", "model", "seed")},
        "run id": str(config.get("run_id", ABSENT)),
        "rounds": rounds,
        "started": str(started or ABSENT),
        "ended": f"{ended}{_taken(started, ended)}" if ended else "not yet",
        "kept": ", ".join(there) or "text alone",
    }


def _taken(started: object, ended: object) -> str:
    """Time from start to end, interruptions included."""
    try:
        taken = datetime.fromisoformat(str(ended)) - datetime.fromisoformat(str(started))
    except (ValueError, TypeError):
        return ""
    return f" ({timedelta(seconds=round(taken.total_seconds()))} after the start)"


# ---- settings


def _settings(config: Row) -> dict[str, str]:
    """The nearest preset, and what differs from it."""
    found = {name: _differing(config, name) for name in PRESETS}
    found = {name: changes for name, changes in found.items() if changes is not None}
    if not found:  # a method that is not installed here
        return _as_text(_plain(config))
    name = min(found, key=lambda preset: len(found[preset] or {}))
    changes = found[name] or {}
    return {"preset": name, **_as_text(changes)} if changes else {"preset": f"{name}, unchanged"}


def _differing(config: Row, preset: str) -> Row | None:
    """Settings that the preset does not make so; None where it cannot be made."""
    try:
        made, _ = make(config["method"], config["objective"], preset, {})
        defaults = vars(registry.method(made.method)())
    except UserError:
        return None
    ours = {**_plain(config), **{**defaults, **config.get("options", {})}}
    preset_s = {**_plain(vars(made)), **{**defaults, **made.options}}
    return {k: v for k, v in ours.items() if k not in preset_s or _same(v) != _same(preset_s[k])}


def _plain(config: Mapping[str, Any]) -> Row:
    """Settings that a preset can make, without the method's options; defaults for absent ones."""
    named = {"method", "objective", "model", "seed", "options", "run_id"}
    found = {f.name: f.default for f in fields(RunConfig) if f.default is not MISSING}
    return {k: v for k, v in {**found, **config}.items() if k not in named}


def _same(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _as_text(values: Row) -> dict[str, str]:
    return {k: ",".join(v) if isinstance(v, list | tuple) else str(v) for k, v in values.items()}


# ---- origin


def _made_with(facts: Row) -> dict[str, str]:
    """Code, versions and machine."""
    commit = str(facts.get("commit", ABSENT))
    if facts.get("dirty"):
        commit += f" with changes ({facts.get('diff', 'which ones is ' + ABSENT)})"
    packages = facts.get("packages", {})
    return {
        "commit": commit,
        "python": str(facts.get("python", ABSENT)),
        "packages": ", ".join(f"{k} {v}" for k, v in sorted(packages.items()) if v) or ABSENT,
        **{f"{what} from": str(package) for what, package in facts.get("plugins", {}).items()},
        "platform": str(facts.get("platform", ABSENT)),
        "processor": str(facts.get("cpu", ABSENT)),
        "device": " ".join(str(facts[k]) for k in ("device", "gpu") if facts.get(k)) or ABSENT,
        "threads": str(facts.get("threads", ABSENT)),
        "deterministic": str(facts.get("deterministic", ABSENT)),
    }


def _sessions(facts: Row) -> dict[str, str]:
    """Where the run went on after a stop, and what was not as above; {} if nothing ever was."""
    first, *later = sessions(facts)
    told = {
        f"start {number}, after round {session.get('after_round', '?')}": "; ".join(
            f"{name} {_known(then)} -> {_known(now)}"
            for name, (then, now) in differing(first, session).items()
        )
        for number, session in enumerate(later, 2)
    }
    return {k: v or "as above" for k, v in told.items()} if any(told.values()) else {}


def _known(value: object) -> str:
    return ABSENT if value is None else str(value)


def _inputs(facts: Row) -> dict[str, str]:
    """What names the content of model, prompts and scorers."""
    found = facts.get("inputs")
    if not isinstance(found, dict) or not found:
        return {"hashes": ABSENT}
    scorers = found.get("scorers")
    told = {k: str(v) for k, v in found.items() if k != "scorers"}
    if isinstance(scorers, dict):
        told |= {f"scorer {name}": str(value) for name, value in scorers.items()}
    unchecked = facts.get("unchecked_scorers")
    if unchecked and isinstance(unchecked, list):
        told["without golden scores"] = ", ".join(map(str, unchecked))
    return told


def _content(run: Path, facts: Row) -> dict[str, str]:
    """SHA-256 of the text files as the run left them, and whether they still are."""
    found = facts.get("content")
    if not found:
        return {"hashes": ABSENT if "ended" in facts else "when it has ended"}
    now = content(run)
    return {str(n): f"{digest}{_since(now.get(n), digest)}" for n, digest in found.items()}


def _since(now: str | None, digest: object) -> str:
    if now is None:
        return ", gone since"
    return "" if now == digest else ", CHANGED SINCE"


# ---- cost and score


def _cost(metrics: list[Row], seconds: list[Row]) -> dict[str, str]:
    """What the rounds so far have cost; evaluation is not part of it."""
    last = metrics[-1] if metrics else {}
    names = {"images": "images", "pairs": "pairs (or single images)",
             "scorer_calls": "scorer calls", "unet_forwards": "UNet passes",
             "unet_backwards": "UNet passes back"}  # fmt: skip
    told = {said: f"{last[k]:,}" for k, said in names.items() if isinstance(last.get(k), int)}
    told["seconds"] = f"{_sum(seconds, training=True):,.0f}" if seconds else ABSENT
    told["seconds of evaluation"] = f"{_sum(seconds, training=False):,.0f}" if seconds else ABSENT
    return told


def _sum(seconds: list[Row], *, training: bool) -> float:
    stages = (item for row in seconds for item in row.items() if item[0] != "round")
    return sum(v for k, v in stages if (k != "evaluate") == training and isinstance(v, int | float))


def _evaluation(path: Path) -> dict[str, str]:
    """Means of the last evaluation by sampler."""
    if not path.exists():
        return {"none": "not yet, or switched off"}
    with readable(path), path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
        last = max((int(row["round"]) for row in rows), default=-1)
        rows = [row for row in rows if int(row["round"]) == last]
        samplers = dict.fromkeys(row["sampler"] for row in rows)
        told = {s: _means([r for r in rows if r["sampler"] == s]) for s in samplers}
    return {"round": str(last), **told} if rows else {"none": "not yet"}


def _means(rows: list[dict[str, str]]) -> str:
    """The mean of every column of numbers; images that have none are left out."""
    told = []
    for column in (c for c in rows[0] if c not in ("round", "sampler", "prompt", "index")):
        values = [float(row[column]) for row in rows if row[column] not in ("", "nan")]
        if values:
            told.append(f"{column} {sum(values) / len(values):.4f}")
    return ", ".join([*told, f"{len(rows)} images"])


@click.command()
@click.argument("run", type=PLACE)
def show(run: Path) -> None:
    """Print what is known about the run in the folder RUN: settings, origin, cost, last score.

    Works on runs that have not ended, and on published ones, whose weights are not there.

    \b
    Example:
        d3po-bench show runs/tiny/incompress/d3po/seed-0
        d3po-bench show results/tiny/compress/dpok/seed-3
    """  # noqa: D301
    for line in lines(run):
        click.echo(line)
