"""`d3po-bench verify`: are published results whole, and do tables and figures say what rows say?

A folder of results carries two files. `manifest.json` names every file with its sha256;
`claims.json` says where runs, tables and figures come from (`eval/claims.py`).
A check that fails is a sentence; there is no score between right and wrong.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from d3po_bench.config import RunConfig
from d3po_bench.digests import sha256_of
from d3po_bench.errors import UserError
from d3po_bench.prompts import names as lists
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import write_atomically
from d3po_bench.runs.run import (
    TEXT,
    content,
    finite,
    read_config,
    read_facts,
    read_lines,
    read_object,
)
from d3po_bench.runs.sessions import differing, sessions
from d3po_bench.training.tools import EvaluationSet, spread
from eval.analysis.runs import COUNTS
from eval.measure import OBJECTIVE
from eval.verify import documents

MANIFEST = "manifest.json"
FILES = (*TEXT, "provenance.json")
NUMBERS = ("round", *COUNTS, "score_mean", "score_std", "reward_mean", "loss", "grad_norm",
           "updates")  # fmt: skip
"""What every round of every method has in metrics.jsonl; methods add their own."""
KEYS = ("round", "sampler", "prompt", "index")
"""Columns of eval.csv that name an image; the others are numbers."""
UNREADABLE = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error)
Problems = Iterator[str]
Rows = Sequence[Mapping[str, str]]


def verify(folder: Path) -> dict[str, list[str]]:
    """Every check of a folder of results, with what it found wrong.

    Args:
        folder: holds manifest.json and claims.json; documents lie beside it.

    Raises:
        UserError: it carries no manifest, or its claims are malformed.
    """
    runs = sorted(path.parent for path in folder.rglob("config.json"))
    whole = published(folder)
    tries = [run for run in runs if run not in whole]
    checks: dict[str, Callable[[], Problems]] = {
        "manifest": lambda: check_manifest(folder),
        "runs": lambda: _each(whole, folder, whole=True),
        "tries": lambda: _each(tries, folder, whole=False),
        "sets": lambda: check_sets(whole, folder),
        **documents.checks(folder, whole),
    }
    return {name: list(check()) for name, check in checks.items()}


def published(folder: Path) -> list[Path]:
    """The run folders of a folder of results, without the tries.

    Raises:
        UserError: its claims are malformed.
    """
    tries = documents.read(folder).get("tries", ())
    runs = sorted(path.parent for path in folder.rglob("config.json"))
    return [run for run in runs if not _is_try(run.relative_to(folder), tries)]


# ---- manifest


def record(folder: Path) -> Path:
    """Write the manifest of what is there now.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir() or not _listed(folder):
        raise UserError(
            f"Expected a folder of results, got {folder}, which is none or empty. Correct the path."
        )
    path = folder / MANIFEST
    listed = {name: sha256_of(folder / name) for name in _listed(folder)}
    write_atomically(path, (json.dumps(listed, indent=1, sort_keys=True) + "\n").encode())
    return path


def _listed(folder: Path) -> list[str]:
    """Every file but the manifest and what tools leave behind: compiled code, hidden files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    names = (p.relative_to(folder) for p in paths if p.name != MANIFEST)
    return sorted(n.as_posix() for n in names if not any(part[0] == "." for part in n.parts))


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"Expected {MANIFEST} in {folder}, got none. Name a folder of published results; "
            "`d3po-bench verify --record` writes the manifest of one."
        )
    return read_object(folder / MANIFEST)


def check_manifest(folder: Path) -> Problems:
    """Files that are missing, changed, or not in the manifest."""
    manifest = _manifest(folder)
    there = set(_listed(folder))
    for name in sorted(manifest.keys() - there):
        yield f"{name} is in the manifest and not in {folder}"
    for name in sorted(there - manifest.keys()):
        yield f"{name} is not in the manifest"
    for name in sorted(there & manifest.keys()):
        if sha256_of(folder / name) != manifest[name]:
            yield f"{name} has changed since the manifest was written"


# ---- runs


def _is_try(place: Path, tries: Sequence[str]) -> bool:
    """Whether a run lies in a folder of tries, which may have been stopped or kept in part."""
    return any(place.is_relative_to(name) for name in tries)


def _each(runs: Sequence[Path], folder: Path, *, whole: bool) -> Problems:
    for run in runs:
        place = run.relative_to(folder).as_posix()
        try:
            for problem in check_run(run, whole=whole):
                yield f"{place}: {problem}"
        except UNREADABLE as problem:
            yield f"{place}: cannot be read ({problem!r})"


def check_run(run: Path, *, whole: bool = True) -> Problems:
    """Whether a run's files agree with each other.

    Args:
        run: its folder.
        whole: it must have all its files and have ended, which not every try of a search has.
    """
    needed = FILES if whole else ("config.json", "metrics.jsonl")
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        yield f"lacks {', '.join(missing)}"
        return
    config = read_config(run)
    metrics = read_lines(run / "metrics.jsonl")
    if whole:
        yield from _check_config(config, run)
        if len(metrics) != config["rounds"]:
            yield f"has {len(metrics)} rounds of {config['rounds']}"
        if "ended" not in read_facts(run):
            yield "has not ended"
        yield from _check_sessions(run)
    yield from _check_content(run)
    yield from _check_metrics(metrics, whole)
    if (run / "eval.csv").is_file():
        rows = _rows(run)
        yield from _check_rows(rows, config, len(metrics), whole)
        if whole:
            yield from _check_prompts(rows, config, _prompts(config, read_facts(run)))


def _check_config(config: Mapping[str, Any], run: Path) -> Problems:
    made = RunConfig.from_json(config)
    if made.run_id != config.get("run_id"):
        yield f"its config says run_id {config.get('run_id')}, its settings make {made.run_id}"
    place = [config["objective"], config["method"], f"seed-{config['seed']}"]
    if list(run.parts[-3:]) != place:
        yield f"its config belongs into {'/'.join(place)}"


def _check_content(run: Path) -> Problems:
    """Files that are not as the run left them; older runs have no digests on record."""
    found = content(run)
    for name, digest in read_facts(run).get("content", {}).items():
        if name in found and found[name] != digest:
            yield f"its {name} is not the one that it ended with"


def _check_sessions(run: Path) -> Problems:
    """A run that went on where bytes may come out otherwise: nobody can make it again."""
    first, *later = sessions(read_facts(run))
    for session in later:
        changed = differing(first, session)
        if changed:
            where = f"from round {session.get('after_round', '?')} with other {', '.join(changed)}"
            yield f"was made in several environments: {where}"


def _check_metrics(metrics: Sequence[Mapping[str, Any]], whole: bool) -> Problems:
    lacking = [k for k in NUMBERS if whole and not all(k in m for m in metrics)]
    if lacking:
        yield f"its metrics.jsonl lacks {', '.join(lacking)}"
    for m in metrics:
        wrong = [k for k, v in m.items() if not finite(v)]
        if wrong:
            yield f"round {m['round']} has no finite {', '.join(wrong)}"
    rounds = [m["round"] for m in metrics]
    if rounds != list(range(1, len(metrics) + 1)):
        yield f"its rounds are {rounds}"
    for name in COUNTS:
        values = [m[name] for m in metrics if finite(m.get(name))]
        if values != sorted(values):
            yield f"its count of {name} goes back"


def _rows(run: Path) -> Rows:
    with (run / "eval.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _check_rows(rows: Rows, config: Mapping[str, Any], rounds: int, whole: bool) -> Problems:
    keys = [tuple(r[name] for name in KEYS) for r in rows]
    if len(set(keys)) != len(keys):
        yield "an evaluation image has two rows"
    sizes = Counter((number, sampler) for number, sampler, *_ in keys)
    if len(set(sizes.values())) > 1:
        yield f"its evaluations have {sorted(set(sizes.values()))} images"
    for name in (name for name in (rows[0] if rows else ()) if name not in KEYS):
        values = [r[name] for r in rows if r[name] or name == OBJECTIVE]
        if not all(math.isfinite(float(value)) for value in values):
            yield f"an evaluation image has no finite {name}"
    every = config["eval_every"]
    if whole and every:
        due = {n for n in range(rounds + 1) if n % every == 0 or n == rounds}
        found = {(int(n), s) for n, s in sizes}
        if found != {(n, s) for n in due for s in EvaluationSet.samplers}:
            yield f"its evaluations are of {sorted(found)}, due at rounds {sorted(due)}"


def _prompts(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str] | None:
    """The list that a config names; None where it cannot be read here.

    Votes have no list, and a user's file may be gone, or be another of that name.
    """
    from d3po_bench.prompts import digest

    try:
        source = RunConfig.from_json(config).prompt_source
        found = read_prompts(source)
    except UserError:
        return None
    known = (facts.get("inputs") or {}).get("prompts")
    return found if source in lists() or known in (None, digest(found)) else None


def _check_prompts(rows: Rows, config: Mapping[str, Any], known: list[str] | None) -> Problems:
    """Prompts or images that were left out of every evaluation alike: the config says how many.

    Of a list that cannot be read, prompts that are in no evaluation at all are not missed.
    """
    most, images = config["eval_prompts"], config["eval_images"]
    prompts = list(dict.fromkeys(r["prompt"] for r in rows)) if known is None else known
    due = Counter(product(spread(prompts, most), range(images)))
    found: dict[tuple[str, str], Counter[tuple[str, int]]] = {}
    for r in rows:
        image = r["prompt"], int(r["index"])
        found.setdefault((r["round"], r["sampler"]), Counter())[image] += 1
    wrong = [f"{number} ({sampler})" for (number, sampler), its in found.items() if its != due]
    if wrong:
        yield (
            f"its evaluations at round {', '.join(wrong)} are not of the prompts that its config "
            f"asks for, {images} of each"
        )


# ---- sets of runs


def check_sets(runs: Sequence[Path], folder: Path) -> Problems:
    """Runs of one objective and method in one folder must be alike but for the seed; no copies."""
    copied: dict[tuple[str, Hashable], Path] = {}
    seen: dict[tuple[str, ...], Path] = {}
    for run in runs:
        try:
            config = read_config(run)
            place = run.relative_to(folder).parts[:-3]
            cell = (*place, config["objective"], config["method"])
            alike, numbered = _but_the_seed(run), (*cell, str(config["seed"]))
            own = [(what, numbers) for what, numbers in _own(run).items() if numbers]
            copies = [f"{copied[n]} have the same {n[0]}" for n in own if n in copied]
        except UNREADABLE as problem:
            yield f"{run}: cannot be read ({problem!r})"
            continue
        if numbered in seen:
            yield f"{run} and {seen[numbered]} are of one seed"
        if cell in seen and _but_the_seed(seen[cell]) != alike:
            yield f"{run} and {seen[cell]} differ in more than the seed"
        for copy in copies:
            yield f"{run} and {copy}, number for number"
        copied |= {numbers: run for numbers in own if numbers not in copied}
        seen.setdefault(numbered, run)
        seen.setdefault(cell, run)


def _own(run: Path) -> dict[str, Hashable]:
    """What no two runs share, as numbers, for a blank makes other bytes; round 0 is shared."""
    rounds = tuple(tuple(m.get(k) for k in NUMBERS) for m in read_lines(run / "metrics.jsonl"))
    later = frozenset(
        (int(r["round"]), r["sampler"], r["prompt"], int(r["index"]),
         *(float(r[name]) for name in (OBJECTIVE, "kl") if r.get(name)))
        for r in _rows(run)
        if int(r["round"])
    )  # fmt: skip
    return {"rounds": rounds, "evaluations after round 0": later}


def _but_the_seed(run: Path) -> str:
    """Settings, inputs, and the versions that scores depend on, the JPEG encoder's among them."""
    config, facts = read_config(run), read_facts(run)
    kept = {k: v for k, v in config.items() if k not in ("seed", "run_id")}
    origin = [facts.get("inputs"), facts["packages"], facts.get("plugins")]
    return json.dumps([kept, *origin], sort_keys=True)
