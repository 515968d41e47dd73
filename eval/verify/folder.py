"""`d3po-bench verify`: are published results whole, consistent, and what their documents show?

`manifest.json` names every file of the folder with its sha256. Where the folder has a make.py, its
`--check` says whether tables and figures are still what the rows give. A check that fails is a
sentence; there is no score between right and wrong.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

import d3po_bench
from d3po_bench.config import RunConfig
from d3po_bench.digests import sha256_of
from d3po_bench.errors import UserError
from d3po_bench.launch import grid as grids
from d3po_bench.prompts import names as lists
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import write_atomically
from d3po_bench.runs.run import TEXT, finite, read_config, read_facts, read_lines, read_object
from d3po_bench.runs.sessions import differing, sessions
from d3po_bench.training.tools import EvaluationSet, spread
from eval.analysis.runs import COUNTS, read_run
from eval.measure import OBJECTIVE
from eval.tools import TOOLS

MANIFEST = "manifest.json"
GRID = "grid.toml"
FILES = (*TEXT, "provenance.json")
NUMBERS = ("round", *COUNTS, "score_mean", "score_std", "reward_mean", "loss", "grad_norm",
           "updates")  # fmt: skip
"""What every round of every method has in metrics.jsonl; methods add their own."""
UNREADABLE = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error)
Problems = Iterator[str]


def verify(folder: Path) -> dict[str, list[str]]:
    """Every check of a folder of results, with what it found wrong.

    Args:
        folder: holds manifest.json.

    Raises:
        UserError: it carries no manifest.
    """
    runs = published(folder)
    return {
        "manifest": list(check_manifest(folder)),
        "runs": [f"{run.relative_to(folder)}: {what}" for run in runs for what in check_run(run)],
        "sets": [*check_sets(runs, folder), *check_grids(runs, folder)],
        "tables": list(check_tables(folder)),
    }


def published(folder: Path) -> list[Path]:
    """The run folders of a folder of results."""
    return sorted(path.parent for path in folder.rglob("config.json"))


# ---- manifest


def record(folder: Path) -> Path:
    """Write the manifest of what is there now.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir() or not _listed(folder):
        raise UserError(f"{folder} is no folder, or is empty. Name a folder of results.")
    path = folder / MANIFEST
    listed = {name: sha256_of(folder / name) for name in _listed(folder)}
    write_atomically(path, (json.dumps(listed, indent=1, sort_keys=True) + "\n").encode())
    return path


def _listed(folder: Path) -> list[str]:
    """Every file but the manifest and what tools leave behind: compiled code, hidden files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    names = (p.relative_to(folder) for p in paths if p.name != MANIFEST)
    return sorted(n.as_posix() for n in names if not any(part[0] == "." for part in n.parts))


def check_manifest(folder: Path) -> Problems:
    """Files that are missing, changed, or not in the manifest.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"There is no {MANIFEST} in {folder}. Name a folder of published results; "
            "`d3po-bench verify --record` writes the manifest of one."
        )
    manifest, there = read_object(folder / MANIFEST), set(_listed(folder))
    for name in sorted(manifest.keys() - there):
        yield f"{name} is missing"
    for name in sorted(there - manifest.keys()):
        yield f"{name} is not in the manifest"
    for name in sorted(there & manifest.keys()):
        if sha256_of(folder / name) != manifest[name]:
            yield f"{name} has changed since the manifest was written"


# ---- runs


def check_run(run: Path) -> Problems:
    """Whether a run has all its files, has ended, and its files agree with each other."""
    missing = [name for name in FILES if not (run / name).is_file()]
    if missing:
        yield f"has no {', '.join(missing)}"
        return
    try:
        # What the reader of all figures and tables would refuse, the digests of the end included.
        read_run(run)
        metrics = read_lines(run / "metrics.jsonl")
        yield from _check_record(run, len(metrics))
        yield from _check_metrics(metrics)
        yield from _check_evaluations(
            pd.read_csv(run / "eval.csv"), RunConfig.from_json(read_config(run)), read_facts(run)
        )
    except UNREADABLE as problem:
        yield f"cannot be read ({problem})"


def _check_record(run: Path, rounds: int) -> Problems:
    """Whether a run is what its config names, went to its end, and went there in one place."""
    found, facts = read_config(run), read_facts(run)
    config, recorded = RunConfig.from_json(found), found.get("run_id")
    if config.run_id != recorded:
        yield f"its config has the run_id {recorded}, its settings make {config.run_id}"
    place = [config.objective, config.method, f"seed-{config.seed}"]
    if list(run.parts[-3:]) != place:
        yield f"its config belongs in {'/'.join(place)}"
    if rounds != config.rounds:
        yield f"has {rounds} of {config.rounds} rounds"
    if "ended" not in facts:
        yield "has not ended"
    first, *later = sessions(facts)
    for session in later:
        # Bytes may come out otherwise there: nobody can make such a run again.
        if changed := differing(first, session):
            where = f"from round {session.get('after_round', '?')} with other {', '.join(changed)}"
            yield f"was made in several environments: {where}"


def _check_metrics(metrics: Sequence[Mapping[str, Any]]) -> Problems:
    lacking = [k for k in NUMBERS if not all(k in m for m in metrics)]
    if lacking:
        yield f"its metrics.jsonl has no {', '.join(lacking)}"
    for m in metrics:
        wrong = [k for k, v in m.items() if not finite(v)]
        if wrong:
            yield f"round {m['round']} has no finite {', '.join(wrong)}"


def _check_evaluations(rows: Any, config: RunConfig, facts: Mapping[str, Any]) -> Problems:
    """Images that are missing or too many, alike in every evaluation too, or have no score."""
    for name, part in ((OBJECTIVE, rows), ("kl", rows[rows["sampler"] == "eta1"])):
        if name in rows and part[name].isna().any():
            yield f"an evaluation image has no {name}"
    found: dict[tuple[int, str], set[tuple[str, int]]] = defaultdict(set)
    for number, sampler, *image in rows[["round", "sampler", "prompt", "index"]].values.tolist():
        found[number, sampler].add(tuple(image))
    prompts = _prompts(config, facts) or list(dict.fromkeys(rows["prompt"]))
    images = set(product(spread(prompts, config.eval_prompts), range(config.eval_images)))
    every, last = config.eval_every, config.rounds
    due = {n for n in range(last + 1) if n % every == 0 or n == last} if every else set()
    wrong = [
        f"{number} ({sampler})"
        for number, sampler in sorted({*found, *product(due, EvaluationSet.samplers)})
        if found.get((number, sampler)) != (images if number in due else None)
    ]
    if wrong:
        yield f"its evaluations of round {', '.join(wrong)} are not those that its config asks for"


def _prompts(config: RunConfig, facts: Mapping[str, Any]) -> list[str] | None:
    """The list that a config names; None where it cannot be read here.

    Votes have no list, and a user's file may be gone, or be another of that name.
    """
    from d3po_bench.prompts import digest

    try:
        source = config.prompt_source
        found = read_prompts(source)
    except UserError:
        return None
    known = (facts.get("inputs") or {}).get("prompts")
    return found if source in lists() or known in (None, digest(found)) else None


# ---- sets of runs


def check_sets(runs: Sequence[Path], folder: Path) -> Problems:
    """Runs of one objective and method must be alike but for the seed, and no run be a copy."""
    firsts: dict[tuple[str, ...], tuple[Path, str]] = {}
    seen: dict[tuple[str, Hashable], Path] = {}
    for run in runs:
        try:
            config, own, shared = read_config(run), _own(run), _but_the_seed(run)
        except UNREADABLE:
            continue  # the check of runs has named it
        cell = (*run.relative_to(folder).parts[:-3], config["objective"], config["method"])
        first, theirs = firsts.setdefault(cell, (run, shared))
        if shared != theirs:
            yield f"{run} and {first} differ in more than the seed"
        for what, numbers in {"seed": (*cell, config["seed"]), **own}.items():
            other = seen.setdefault((what, numbers), run)
            if numbers and other != run:
                yield f"{run} and {other} have the same {what}"


def _own(run: Path) -> dict[str, Hashable]:
    """What no two runs share, as numbers, for a blank makes other bytes; round 0 is shared."""
    rounds = tuple(tuple(m.get(k) for k in NUMBERS) for m in read_lines(run / "metrics.jsonl"))
    rows = pd.read_csv(run / "eval.csv")
    columns = ["round", "sampler", "prompt", "index", OBJECTIVE, *({"kl"} & {*rows})]
    later = rows.loc[rows["round"] > 0, columns].astype(str).values.tolist()
    return {"rounds": rounds, "evaluations": frozenset(map(tuple, later))}


def _but_the_seed(run: Path) -> str:
    """Settings, inputs, and the versions that scores depend on, the JPEG encoder's among them."""
    config, facts = read_config(run), read_facts(run)
    kept = {k: v for k, v in config.items() if k not in ("seed", "run_id")}
    origin = [facts.get("inputs"), facts["packages"], facts.get("plugins")]
    return json.dumps([kept, *origin], sort_keys=True)


def check_grids(runs: Sequence[Path], folder: Path) -> Problems:
    """Beside a grid.toml lie the runs that it asks for, with the configs that it makes; no others.

    A seed that was left out of tables and figures, too, is missing here.
    """
    for grid in sorted(folder.rglob(GRID)):
        name, below = grid.relative_to(folder), grid.parent
        asked: dict[tuple[str, ...], Any] = {
            (c.objective, c.method, f"seed-{c.seed}"): json.loads(c.to_json())
            for c in grids.configs(grids.read(grid), TOOLS)
        }
        there = {run.relative_to(below).parts: run for run in runs if run.is_relative_to(below)}
        for place in sorted(asked.keys() - there.keys()):
            yield f"{name} asks for {'/'.join(place)}, which is missing"
        for place in sorted(there.keys() - asked.keys()):
            yield f"{name} does not ask for {'/'.join(place)}, which is there"
        for place in sorted(asked.keys() & there.keys()):
            with suppress(*UNREADABLE):  # the check of runs has named it
                found, made = read_config(there[place]), asked[place]
                other = sorted(k for k in found.keys() | made.keys() if found.get(k) != made.get(k))
                if other:
                    yield f"{'/'.join(place)} has another {', '.join(other)} than {name} makes"


# ---- tables and figures

ALONE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import d3po_bench, eval
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with this d3po-bench, whatever lies beside the script or where one is."""


def check_tables(folder: Path) -> Problems:
    """What the make.py of a folder would change in it, or in the documents beside it."""
    script = folder / "make.py"
    if not script.is_file():
        return
    home = Path(d3po_bench.__file__).parents[1]
    command = [sys.executable, "-I", "-c", ALONE, str(home), str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 1 and done.stdout:
        yield from done.stdout.splitlines()
    elif done.returncode:
        yield f"{script} --check failed: {''.join(done.stderr.strip().splitlines()[-1:])}"
