"""`d3po-bench verify FOLDER --rerun N`: makes published runs again, and judges them.

On the same platform with the same versions, metrics.jsonl and eval.csv must come out with the
published bytes, but for columns that they did not have then. Elsewhere rounding differs, and
training amplifies it until a run is at worst as far from the published one as another seed is.
So the end of the new run is compared with the
published seeds, on both sides: could it be one more of them, and is it as near to its own seed as
two seeds are to each other? Its first round, where rounding has had no time to grow, must be the
same. docs/notes/determinism.md says how often this gives a false alarm, and what it detects.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from d3po_bench.config import Execution, make
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch.progress import Board
from d3po_bench.runs.files import Row, readable
from d3po_bench.runs.run import IMAGE, RunFolder, find_runs, finite
from d3po_bench.runs.sessions import differing
from eval.analysis.statistics import another_seed, same_seed

FALSE_ALARM = 0.05
"""Largest share of runs, honestly made again elsewhere, that are called not reproduced."""

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
"""Published seeds below which there is no spread to judge by."""

BYTES = ("metrics.jsonl", "eval.csv")
SAME = ("python", "platform", "machine", "cpu", "gpu", "packages", "plugins", "device",
        "threads", "deterministic")  # fmt: skip
"""Provenance that bytes depend on."""


@dataclass(frozen=True)
class Verdict:
    """Whether one published run was reproduced, and why."""

    cell: str
    reproduced: bool
    said: str
    details: tuple[str, ...] = ()


def rerun(
    folder: Path,
    runs: Sequence[RunFolder],
    count: int,
    *,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    out: Path | None = None,
    board: Board | None = None,
) -> Iterator[Verdict]:
    """Make `count` of the published runs again, one after the other.

    Args:
        folder: of the results.
        runs: the published runs in it.
        count: how many, drawn without replacement.
        seed: of the draw.
        settings: execution settings other than the recorded ones, as --set takes them.
        out: where the new runs go, and stay; a temporary folder if None.
        board: shows how far they are.

    Raises:
        UserError: there are not so many, a setting decides numbers, or a run cannot begin here.
    """
    from d3po_bench.launch import launch
    from d3po_bench.training.run import Job
    from eval.tools import TOOLS

    executions = {run.folder: _execution(run, settings or {}) for run in runs}
    somewhere = nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="d3po-bench-")
    with somewhere as place, board or Board() as shown:
        for run in drawn(runs, count, seed):
            name = str(run.place.relative_to(folder))
            job = Job(
                config=run.config, execution=executions[run.folder], folder=Path(place, name),
                tools=TOOLS,
            )  # fmt: skip
            failed = launch.execute([job], 1, shown)
            for problem in failed.values():
                if not isinstance(problem, RunError):
                    raise problem
                yield Verdict(name, False, f"not reproduced: {problem}")
            if not failed:
                yield judge(run, RunFolder(job.folder), name)


def drawn(runs: Sequence[RunFolder], count: int, seed: int) -> list[RunFolder]:
    """So many of the runs, drawn without replacement.

    Raises:
        UserError: there are not so many.
    """
    if count > len(runs):
        raise UserError(f"There are {len(runs)} runs, fewer than --rerun {count}.")
    chosen = random.Random(seed).sample(range(len(runs)), count)
    return [runs[number] for number in sorted(chosen)]


def _execution(run: RunFolder, settings: Mapping[str, str]) -> Execution:
    """As on record, except for `settings`; on a device that exists here."""
    from d3po_bench.machine import device_of

    known = {f.name for f in fields(Execution)} - {"device"}
    for key in settings.keys() - known:
        raise UserError(
            f"--set {key} would change the numbers of a run, or is unknown. With --rerun, --set "
            f"takes only how it is computed: {', '.join(sorted(known))}."
        )
    config, facts = run.config, run.facts
    config.check()
    with readable(run.folder / "provenance.json"):
        recorded = {k: v for k, v in facts.get("execution", {}).items() if k in known}
        if facts.get("threads"):
            recorded["threads"] = int(facts["threads"])
        _, made = make(
            config.source("method"), config.source("objective"), "official_code", settings
        )
        try:
            recorded["device"] = str(device_of(str(facts.get("device", "auto"))))
        except UserError:
            recorded["device"] = "auto"
        execution = Execution(**recorded | {key: getattr(made, key) for key in settings})
        execution.check()
    return execution


# ---- the verdict


def judge(published: RunFolder, again: RunFolder, cell: str) -> Verdict:
    """Compare a published run, whose folder lies beside those of other seeds, with a new one.

    Args:
        published: the run.
        again: the same run made again.
        cell: what to call it.

    Raises:
        UserError: a file of either is damaged.
    """
    if same := _as_before(published, again):
        return Verdict(cell, True, f"reproduced, {same}")
    why = "; ".join(_differences(published.facts, again.facts))
    if not why:
        said = "not reproduced: other bytes on the same platform with the same versions"
        return Verdict(cell, False, said)
    wrong, details = _compared(published, again)
    said = f"not reproduced: {'; '.join(wrong)}" if wrong else "reproduced"
    return Verdict(cell, not wrong, said, (why, *details))


def _as_before(then: RunFolder, now: RunFolder) -> str:
    """How what was published came again; "" if it did not.

    A later version may measure more: columns that were not there then are no difference.
    """
    said = "same bytes"
    for name in BYTES:
        if (then.folder / name).read_bytes() == (now.folder / name).read_bytes():
            continue
        old, new = ((run.table if name == "eval.csv" else run.metrics) for run in (then, now))
        more = {k for row in new for k in row} - {k for row in old for k in row}
        if not more or [{k: v for k, v in row.items() if k not in more} for row in new] != old:
            return ""
        said = "same numbers, and more columns"
    return said


def _differences(then: Row, now: Row) -> Iterator[str]:
    """What differs of what bytes depend on, and what of it was not recorded."""
    parts = []
    for facts in (then, now):
        # Other splits of the work round otherwise. What an earlier version did not have is as
        # it was then: at its default.
        recorded = facts.get("execution", {})
        recorded = {**vars(Execution().usual()), **recorded} if recorded else {}
        split = {k: v for k, v in recorded.items() if k not in SAME}
        parts.append({**{k: facts[k] for k in SAME if k in facts}, "execution": split})
    for name, (old, new) in differing(*parts).items():
        yield f"{name} is not on record" if old is None else f"{name} {old} -> {new}"


def _compared(published: RunFolder, again: RunFolder) -> tuple[list[str], list[str]]:
    """What is wrong, and what was compared."""
    wrong = list(_other_work(published, again))
    seeds = find_runs(published.folder.parent.glob("seed-*"))
    if len(seeds) < FEWEST:
        return [*wrong, f"other bytes, and {len(seeds)} published seeds give no spread"], []
    rows, new = {run.folder.name: _scores(run) for run in seeds}, _scores(again)
    own = published.folder.name
    if not rows[own].index.equals(new.index):
        return [*wrong, "its evaluations are of other images"], []
    wrong += _other_base(rows[own], new)
    off, start = _start(published, again)
    outside, end = _end(own, rows, new)
    return [*wrong, *off, *outside], [start, *end]


def _other_work(published: RunFolder, again: RunFolder) -> Iterator[str]:
    """Inputs with other content, and other rounds or images, which the config alone decides."""
    then, now = (run.facts.get("inputs", {}) for run in (published, again))
    for name in then.keys() & now.keys():
        if then[name] != now[name]:
            yield f"the {name} is another ({then[name]} -> {now[name]})"
    for name in ("round", "images"):
        a, b = ([line.get(name) for line in run.metrics] for run in (published, again))
        if a != b:
            yield f"its counts differ: {name} ends at {a[-1:]} and {b[-1:]}"


def _other_base(then: pd.DataFrame, now: pd.DataFrame) -> Iterator[str]:
    """Before any training, the same prompts and noise give the same pictures, up to rounding."""
    scores = pd.DataFrame({"then": then["score"], "now": now["score"]}).loc[0].dropna()
    off, spread = (scores["then"] - scores["now"]).abs().mean(), scores["then"].std(ddof=0)
    if off > NEAR * spread:
        yield f"the base model's scores differ by {off:.3g}, {NEAR:g} of their spread is allowed"


def apart(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float | None]:
    """How far off each number of `START` is, as a share of it; None where one is missing."""
    return {
        name: abs(then[name] - now[name]) / max(abs(then[name]), TINY)
        if finite(then.get(name)) and finite(now.get(name))
        else None
        for name in START
    }


def allowed(images: int, *, exact: bool) -> float:
    """How far off a number of a first round may be, as a share of it.

    Args:
        images: that the round drew.
        exact: both runs were made on a CPU in fp32.
    """
    return FIRST_ROUND["cpu" if exact else ""] * max(1, ROUND / max(1, images))


def _start(published: RunFolder, again: RunFolder) -> tuple[list[str], str]:
    """What of the first round is too far off, and how far all of it is."""
    then, now = (next(iter(run.metrics), {}) for run in (published, again))
    devices = {run.facts.get("device") for run in (published, again)}
    exact = published.config.dtype == "fp32" and devices == {"cpu"}
    most = allowed(then["images"] if finite(then.get("images")) else ROUND, exact=exact)
    wrong, told = [], []
    for name, off in apart(then, now).items():
        if off is None:
            said = f"{then.get(name, 'none')} was published, {now.get(name, 'none')} was made"
            wrong.append(f"round 1 has no {name} to compare: {said}")
            continue
        told.append(f"{name} {100 * off:.2g} %")
        if off > most:
            wrong.append(
                f"{name} of round 1 is {now[name]:.6g}, {then[name]:.6g} was published: off by "
                f"{100 * off:.3g} %, {100 * most:.3g} % is allowed"
            )
    both = ", ".join(told) or "nothing that both have"
    return wrong, f"first round off by {both} ({100 * most:.3g} % is allowed)"


def ends(gain: float, kl: float) -> dict[str, float]:
    """What the end of a run is judged by: gain, and the logarithm of the drift where it is known.

    Args:
        gain: mean held-out score at the end minus at the start, in the scorer's unit.
        kl: mean KL to the base model at the end; NaN where that was not measured.
    """
    if math.isnan(kl):
        return {"gain": gain}
    return {"gain": gain, "log kl": math.log(kl) if kl > 0 else -math.inf}


def _end(own: str, rows: Mapping[str, pd.DataFrame], new: pd.DataFrame) -> tuple[list[str], ...]:
    """The end of the run against the published seeds, on both sides."""
    seeds = {name: _ends(scores) for name, scores in rows.items()}
    found = _ends(new)
    shared = [c for c in found if all(c in end for end in seeds.values())]
    confidence = 1 - FALSE_ALARM / (2 * max(1, len(shared)))
    wrong, details = [], []
    for column in shared:
        values = [end[column] for end in seeds.values()]
        others = [end[column] for name, end in seeds.items() if name != own]
        for said, (low, high) in {
            "as another seed": another_seed(values, confidence),
            "as the same seed": same_seed(seeds[own][column], others, confidence),
        }.items():
            told = f"{column} {found[column]:+.4f}, {said} {low:+.4f} to {high:+.4f}"
            details.append(f"{told} (published {seeds[own][column]:+.4f})")
            if not low <= found[column] <= high:
                wrong.append(told)
    return wrong, details


def _ends(scores: pd.DataFrame) -> dict[str, float]:
    means = scores.xs("eta1", level="sampler").groupby("round").mean()
    first, last = means.iloc[0], means.iloc[-1]
    return ends(last["score"] - first["score"], last["kl"])


def _scores(run: RunFolder) -> pd.DataFrame:
    """Score and KL of every evaluation image, by round, sampler, prompt and index."""
    rows = pd.DataFrame(run.evaluation).set_index([*IMAGE])
    return rows.reindex(columns=["score", "kl"]).sort_index()
