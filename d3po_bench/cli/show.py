"""`d3po-bench show`: what a run folder says of itself, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import click

from d3po_bench import registry
from d3po_bench.cli.options import RUNS, Answering, Result
from d3po_bench.config import RunConfig, of_preset
from d3po_bench.errors import UserError
from d3po_bench.presets import PRESETS
from d3po_bench.runs.files import Row
from d3po_bench.runs.packed import packed_at
from d3po_bench.runs.run import BESIDE, IMAGE, LAST, LORA, SAMPLES, RunFolder, content, finite
from d3po_bench.runs.sessions import differing, sessions

ABSENT = "not on record"
"""What an older version did not write down."""

CONTENT = {"lora": "weights", "checkpoints": "a checkpoint", "samples": "sample images"}

COSTS = {
    "images": "images", "pairs": "pairs (or single images)", "scorer_calls": "scorer calls",
    "unet_forwards": "UNet passes", "unet_backwards": "UNet passes back",
}  # fmt: skip
"""Counts of metrics.jsonl, in words."""


def known(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What is known about a run, by title.

    Args:
        folder: of a run, finished or not, with or without weights.

    Raises:
        UserError: it is not a run, or a file in it is damaged or of a newer version.
    """
    place = folder if (folder / "config.json").is_file() else packed_at(folder)
    if not place or not (place / "config.json").is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.json. Give the folder "
            "MODEL/OBJECTIVE/METHOD/seed-N of a run."
        )
    run = RunFolder(place)
    yield "run", _what(run)
    yield "settings", _settings(run.config)
    yield "made with", _made_with(run.facts)
    if several := _sessions(run.facts):
        yield "started again", several
    yield "inputs", _inputs(run.facts)
    yield "content", _content(run)
    yield "cost", _cost(run)
    yield "last evaluation", _evaluation(run)


def _what(run: RunFolder) -> dict[str, str]:
    started, ended = run.facts.get("started"), run.facts.get("ended")
    there = [words for name, words in CONTENT.items() if (run.folder / name).is_dir()]
    return {
        **{name: str(getattr(run.config, name)) for name in ("method", "objective", "model")},
        "seed": str(run.config.seed),
        "run id": str(run.recorded.get("run_id", ABSENT)),
        "rounds": f"{len(run.metrics)} of {run.config.rounds}",
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


def _settings(config: RunConfig) -> dict[str, str]:
    """The nearest preset, and what differs from it."""
    found = {name: _differing(config, name) for name in PRESETS}
    name, changes = min(found.items(), key=lambda item: len(item[1]))
    return {"preset": name, **_as_text(changes)} if changes else {"preset": f"{name}, unchanged"}


def _differing(config: RunConfig, preset: str) -> Row:
    """Settings that the preset does not make so."""
    made = of_preset(config.method, config.objective, preset)
    known = config.method in registry.names("method")
    defaults = vars(registry.method(config.method)()) if known else {}
    ours, theirs = ({**_plain(c), **defaults, **c.options} for c in (config, made))
    return {k: v for k, v in ours.items() if k not in theirs or v != theirs[k]}


def _plain(config: RunConfig) -> Row:
    """Settings that a preset can make, without the method's options."""
    named = {"method", "objective", "model", "seed", "options", "sources"}
    return {k: v for k, v in vars(config).items() if k not in named}


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
    """Where the run resumed after a stop, and what was not as above; {} if all was the same."""
    first, *later = sessions(facts)
    told, rounds = {}, first.get("rounds")
    for number, session in enumerate(later, 2):
        others = differing(first, session)
        if rounds and session.get("rounds") != rounds:
            others["rounds"] = (rounds, session.get("rounds"))
        rounds = session.get("rounds")
        told[f"start {number}, after round {session.get('after_round', '?')}"] = "; ".join(
            f"{name} {_known(then)} -> {_known(now)}" for name, (then, now) in others.items()
        )
    return {k: v or "as above" for k, v in told.items()} if any(told.values()) else {}


def _known(value: object) -> str:
    return ABSENT if value is None else str(value)


def _inputs(facts: Row) -> dict[str, str]:
    """What names the content of model, prompts and scorers."""
    found = dict(facts.get("inputs", {}))
    if not found:
        return {"hashes": ABSENT}
    scorers = found.pop("scorers", {})
    told = {k: str(v) for k, v in found.items()}
    told |= {f"scorer {name}": str(value) for name, value in scorers.items()}
    unchecked = facts.get("unchecked_scorers")
    if unchecked and isinstance(unchecked, list):
        told["without golden scores"] = ", ".join(map(str, unchecked))
    return told


def _content(run: RunFolder) -> dict[str, str]:
    """SHA-256 of the files as the run left them, and whether they still are."""
    found = run.facts.get("content")
    if not found:
        return {"hashes": ABSENT if run.finished else "when it has ended"}
    now, told = content(run.folder, LORA, LAST, SAMPLES), {}
    for name, digest in found.items():
        since = ", gone since" if name not in now else ", CHANGED SINCE"
        told[name] = f"{digest}{'' if now.get(name) == digest else since}"
    return told


# ---- cost and score


def _cost(run: RunFolder) -> dict[str, str]:
    """What the rounds so far have cost; evaluation is not part of it."""
    last = run.metrics[-1] if run.metrics else {}
    told = {said: f"{last[k]:,}" for k, said in COSTS.items() if isinstance(last.get(k), int)}
    known = [(k, v) for row in run.timing for k, v in row.items() if finite(v)]
    stages = [v for k, v in known if k not in BESIDE]
    for said, seconds in (
        ("seconds", stages), ("seconds of evaluation", [v for k, v in known if k == "evaluate"])
    ):  # fmt: skip
        told[said] = f"{sum(seconds):,.0f}" if run.timing else ABSENT
    return told


def _evaluation(run: RunFolder) -> dict[str, str]:
    """Means of the last evaluation by sampler."""
    if not run.evaluation:
        return {"none": "not yet, or switched off"}
    last = max(row["round"] for row in run.evaluation)
    rows = [row for row in run.evaluation if row["round"] == last]
    samplers = dict.fromkeys(row["sampler"] for row in rows)
    told = {s: _means([row for row in rows if row["sampler"] == s]) for s in samplers}
    return {"round": str(last), **told}


def _means(rows: list[Row]) -> str:
    """The mean of every measure; images without one are left out."""
    told = []
    for column in (name for name in rows[0] if name not in IMAGE):
        values = [row[column] for row in rows if not math.isnan(row[column])]
        if values:
            told.append(f"{column} {sum(values) / len(values):.4f}")
    return ", ".join([*told, f"{len(rows)} images"])


@click.command(cls=Answering)
@click.argument("run", type=RUNS)
def show(run: Path) -> Result:
    """Print what is known about the run in the folder RUN: settings, origin, cost, last score.

    Works on runs that have not ended, and on published ones, whose weights are not there.

    \b
    Example:
        d3po-bench show runs/tiny/incompress/d3po/seed-0
        d3po-bench show runs/tiny/compress/dpok/seed-3
    """  # noqa: D301
    return Result.of_sections(known(run))
