"""`d3po-bench verify DIR --rerun N`: published runs made again, and what that says of them.

On the same platform with the same versions, the bytes of metrics.jsonl and eval.csv must be the
published ones. Elsewhere rounding differs and training amplifies it, until a run is at worst as
far from the published one as another seed is. So the check asks, on both sides, whether the new
run could be another seed of its cell, and whether it is as near to the published seed as two seeds
are to each other; of the first round, where rounding has had no time to grow, whether it is the
same. See docs/determinism.md for the rate of false alarms, and for what it detects.
"""

from __future__ import annotations

import csv
import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs.run import Row, finite, read_config, read_facts, read_lines, readable
from eval.analysis.statistics import another_seed, same_seed

FALSE_ALARM = 0.05
"""Most cells in a hundred, made again in earnest elsewhere, that are called not reproduced."""

NEAR = 0.25
"""The base model's pictures: mean difference of their scores, as a share of the spread over them.

Other noise on the same prompts gives about 1; rounding, on a CPU, less than 0.01."""

FIRST_ROUND = {"cpu": 3e-4, "": 1e-2}
"""The first round, by device, anything else last: relative difference of its numbers.

It starts from the same pictures, and rounding has a few updates to grow in: 16 runs of all five
methods, made again on a CPU in fp32 with other batches, moved by at most 2e-5. Another learning
rate shows from the second update on."""

ROUND = 128
"""Images of a round at which that was measured; fewer of them average less of it out."""

START = ("score_mean", "loss", "grad_norm")
"""What is compared of it: every method has them, and none counts how often something happened.

Not score_std: one byte more in one of 128 JPEGs moved it by 1.6e-4, and score_mean by 6e-6."""

TINY = 1e-3
"""What smaller numbers of the first round count as: they are differences of nearly equal ones."""

FEWEST = 3
"""Published seeds of a cell without which there is no spread to judge by."""

BYTES = ("metrics.jsonl", "eval.csv")
SAME = ("python", "platform", "machine", "cpu", "gpu", "packages", "plugins", "device",
        "threads", "deterministic")  # fmt: skip
"""Provenance that bytes depend on."""

Scores = dict[tuple[str, str, str, str], dict[str, float]]
"""(round, sampler, prompt, index) -> column -> value."""


@dataclass(frozen=True)
class Verdict:
    """Whether one published run was reproduced, and why."""

    cell: str
    reproduced: bool
    said: str
    details: tuple[str, ...] = ()


def rerun(
    folder: Path,
    runs: Sequence[Path],
    count: int,
    *,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> Iterator[Verdict]:
    """Make `count` of the published runs again, one after the other.

    Args:
        folder: of the results.
        runs: the published runs in it.
        count: how many, drawn without replacement.
        seed: of the draw.
        settings: execution settings other than the recorded ones, as --set takes them.
        out: where the new runs go, and stay; a temporary folder if None.

    Raises:
        UserError: there are not so many, a setting decides numbers, or a run cannot begin here.
    """
    if count > len(runs):
        raise UserError(
            f"Expected at most {len(runs)} cells to run again, the runs in {folder}, got {count}. "
            "Give a smaller --rerun."
        )
    executions = {run: _execution(run, settings or {}) for run in runs}
    chosen = sorted(random.Random(seed).sample(list(runs), count))
    with _place(out) as place:
        for run in chosen:
            name = run.relative_to(folder)
            failure = _make_again(run, executions[run], place / name)
            yield failure or judge(run, place / name, str(name))


@contextmanager
def _place(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="d3po-bench-") as place:
        yield Path(place)


def _config(run: Path) -> RunConfig:
    config = RunConfig.from_json(read_config(run))
    config.check()
    return config


def _execution(run: Path, settings: Mapping[str, str]) -> Execution:
    """As on record, but for `settings`; on a device that there is."""
    known = {f.name for f in fields(Execution)} - {"device"}
    for key in settings:
        if key not in known:
            raise UserError(
                f"Expected execution settings after --set ({', '.join(sorted(known))}), got "
                f"{key}: it decides numbers, or is none. Leave it out."
            )
    config, facts = _config(run), read_facts(run)
    with readable(run / "provenance.json"):
        recorded = {k: v for k, v in facts.get("execution", {}).items() if k in known}
        recorded |= {"device": _device(str(facts.get("device", "auto")))}
        if facts.get("threads"):
            recorded["threads"] = int(facts["threads"])
        _, made = make(config.method, config.objective, "official_code", settings)
        execution = Execution(**recorded | {key: getattr(made, key) for key in settings})
        execution.check()
    return execution


def _device(recorded: str) -> str:
    from d3po_bench.machine import device_of

    try:
        return str(device_of(recorded))
    except UserError:
        return "auto"


def _make_again(run: Path, execution: Execution, target: Path) -> Verdict | None:
    """Train into `target`; a verdict only where that fails on the way."""
    from d3po_bench.launch import launch
    from d3po_bench.training.progress import label
    from d3po_bench.training.run import Job
    from eval.tools import TOOLS

    config = _config(run)
    job = Job(config=config, execution=execution, folder=target, tools=TOOLS)
    failed = launch.execute([job], 1, {label(config): label(config)})
    for problem in failed.values():
        if not isinstance(problem, RunError):
            raise problem
        return Verdict(str(run), False, f"not reproduced: {problem}")
    return None


# ---- the verdict


def judge(published: Path, again: Path, cell: str) -> Verdict:
    """Compare a published run with one that was made again.

    Args:
        published: its folder, beside those of the cell's other seeds.
        again: folder of the new run.
        cell: what to call it.

    Raises:
        UserError: a file of either is damaged.
    """
    if all((published / name).read_bytes() == (again / name).read_bytes() for name in BYTES):
        return Verdict(cell, True, "reproduced, same bytes")
    others, unknown = _differences(read_facts(published), read_facts(again))
    if not others and not unknown:
        return Verdict(
            cell, False, "not reproduced: other bytes on the same platform with the same versions"
        )
    wrong, details = _statistical(published, again)
    why = "; ".join([*others, *(f"{name} is not on record" for name in unknown)])
    if wrong:
        return Verdict(cell, False, f"not reproduced: {'; '.join(wrong)}", (why, *details))
    return Verdict(cell, True, "reproduced", (why, *details))


def _differences(then: Row, now: Row) -> tuple[list[str], list[str]]:
    """What differs of what bytes depend on, and what of it was not written down."""
    a, b = ({**facts, **_batches(facts)} for facts in (then, now))
    names = [*SAME, *_batches(now)]
    unknown = [name for name in names if name not in a and b.get(name) is not None]
    differ = [n for n in names if n in a and a[n] != b.get(n)]
    return [f"{n} {_short(a[n], b.get(n))}" for n in differ], unknown


def _batches(facts: Row) -> Row:
    """How the work was split: other splits round otherwise."""
    found = facts.get("execution", {})
    return {k: v for k, v in found.items() if k not in ("device", "threads", "deterministic")}


def _short(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        return ", ".join(f"{k} {then.get(k)} -> {now[k]}" for k in now if now[k] != then.get(k))
    return f"{then} -> {now}"


def _statistical(published: Path, again: Path) -> tuple[list[str], list[str]]:
    """What is wrong, and what was compared."""
    wrong = [*_other_inputs(published, again), *_other_work(published, again)]
    seeds = sorted(path.parent for path in published.parent.glob("seed-*/config.json"))
    if len(seeds) < FEWEST:
        return [*wrong, f"other bytes, and {len(seeds)} published seeds give no spread"], []
    rows, new = {run.name: _scores(run) for run in seeds}, _scores(again)
    if rows[published.name].keys() != new.keys():
        return [*wrong, "its evaluations are of other images"], []
    wrong += [*_other_base(rows[published.name], new), *other_start(published, again)]
    found, details = _other_end(published.name, rows, new)
    return wrong + found, [_start(published, again), *details]


def _other_inputs(published: Path, again: Path) -> Iterator[str]:
    then, now = (read_facts(run).get("inputs", {}) for run in (published, again))
    for name in then.keys() & now.keys():
        if then[name] != now[name]:
            yield f"the {name} is another ({then[name]} -> {now[name]})"


def _other_work(published: Path, again: Path) -> Iterator[str]:
    """Rounds and images are decided by the config alone."""
    then, now = (read_lines(run / "metrics.jsonl") for run in (published, again))
    for name in ("round", "images"):
        a, b = ([line.get(name) for line in lines] for lines in (then, now))
        if a != b:
            yield f"its counts differ: {name} ends at {a[-1:]} and {b[-1:]}"


def other_start(published: Path, again: Path) -> Iterator[str]:
    """Learning starts from the base model's pictures, so its first round can be told apart.

    Args:
        published: folder of a run.
        again: of one that should be the same seed with the same settings.

    Raises:
        UserError: a file of either is damaged.
    """
    then, now = _first_rounds(published, again)
    allowed = _allowed(published, again, then)
    for name, off in _apart(then, now).items():
        if off is None:
            said = f"{then.get(name, 'none')} was published, {now.get(name, 'none')} was made"
            yield f"round 1 has no {name} to compare: {said}"
        elif off > allowed:
            yield (
                f"{name} of round 1 is {now[name]:.6g}, {then[name]:.6g} was published: off by "
                f"{100 * off:.3g} %, {100 * allowed:.3g} % is allowed"
            )


def _first_rounds(published: Path, again: Path) -> tuple[Row, Row]:
    then, now = (next(iter(read_lines(r / "metrics.jsonl")), {}) for r in (published, again))
    return then, now


def _allowed(published: Path, again: Path, then: Row) -> float:
    """How far off a number of the first round may be, as a share of it."""
    facts, config = (read_facts(published), read_facts(again)), read_config(published)
    exact = config.get("dtype") == "fp32" and all(f.get("device") == "cpu" for f in facts)
    images = then["images"] if finite(then.get("images")) else ROUND
    return FIRST_ROUND["cpu" if exact else ""] * max(1, ROUND / max(1, images))


def _apart(then: Row, now: Row) -> dict[str, float | None]:
    """How far off each number of `START` is; None where a run lacks it."""
    return {
        name: abs(then[name] - now[name]) / max(abs(then[name]), TINY)
        if finite(then.get(name)) and finite(now.get(name))
        else None
        for name in START
    }


def _start(published: Path, again: Path) -> str:
    """How far off the first round is, for people."""
    then, now = _first_rounds(published, again)
    known = {n: 100 * off for n, off in _apart(then, now).items() if off is not None}
    allowed = 100 * _allowed(published, again, then)
    told = ", ".join(f"{name} {off:.2g} %" for name, off in known.items())
    return f"first round off by {told or 'nothing that both have'} ({allowed:.3g} % is allowed)"


def _scores(run: Path) -> Scores:
    path = run / "eval.csv"
    with readable(path), path.open(newline="", encoding="utf-8") as file:
        return {
            (r["round"], r["sampler"], r["prompt"], r["index"]): {
                name: float(r[name]) for name in ("score", "kl") if r.get(name)
            }
            for r in csv.DictReader(file)
        }


def _other_base(then: Scores, now: Scores) -> Iterator[str]:
    """Before any training, the same prompts and noise give the same pictures, up to rounding."""
    base = [k for k in then if k[0] == "0"]
    pairs = [(then[k]["score"], now[k]["score"]) for k in base]
    pairs = [p for p in pairs if all(map(math.isfinite, p))]
    if len(pairs) < 2:
        return
    mean = sum(a for a, _ in pairs) / len(pairs)
    spread = math.sqrt(sum((a - mean) ** 2 for a, _ in pairs) / len(pairs))
    off = sum(abs(a - b) for a, b in pairs) / len(pairs)
    if off > NEAR * spread:
        yield f"the base model's scores differ by {off:.3g}, {NEAR:g} of their spread is allowed"


def _other_end(own: str, rows: Mapping[str, Scores], new: Scores) -> tuple[list[str], list[str]]:
    """The end of the run against the published seeds, on both sides."""
    seeds = {name: _ends(scores) for name, scores in rows.items()}
    found = _ends(new)
    shared = [c for c in found if all(c in ends for ends in seeds.values())]
    confidence = 1 - FALSE_ALARM / (2 * max(1, len(shared)))
    wrong, details = [], []
    for column in shared:
        values = [ends[column] for ends in seeds.values()]
        others = [ends[column] for name, ends in seeds.items() if name != own]
        for said, (low, high) in {
            "as another seed": another_seed(values, confidence),
            "as the same seed": same_seed(seeds[own][column], others, confidence),
        }.items():
            told = f"{column} {found[column]:+.4f}, {said} {low:+.4f} to {high:+.4f}"
            details.append(f"{told} (published {seeds[own][column]:+.4f})")
            if not low <= found[column] <= high:
                wrong.append(told)
    return wrong, details


def end_of(run: Path) -> dict[str, float]:
    """How a run ended: gain in the scorer's unit and logarithm of the drift (KL).

    Raises:
        UserError: its eval.csv is damaged.
    """
    return _ends(_scores(run))


def _ends(scores: Scores) -> dict[str, float]:
    """As `end_of`, training sampler."""
    rounds = sorted({int(key[0]) for key in scores})
    first, last = (
        [v for k, v in scores.items() if k[1] == "eta1" and int(k[0]) == n]
        for n in (rounds[0], rounds[-1])
    )
    gain = _mean([v["score"] for v in last]) - _mean([v["score"] for v in first])
    ends = {"gain": gain}
    if all("kl" in v for v in last):
        kl = _mean([v["kl"] for v in last])
        ends["log kl"] = math.log(kl) if kl > 0 else -math.inf
    return ends


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
