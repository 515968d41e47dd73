"""`d3po-bench verify`: are published results whole, consistent, and what their documents show?

`manifest.json` names every file of the folder with its sha256. Where the folder has a make.py, its
`--check` says whether tables and figures are still what the rows give. A check that fails is a
sentence; there is no score between right and wrong.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import d3po_bench
from d3po_bench import registry
from d3po_bench.config import RunConfig
from d3po_bench.digests import changed, sha256_of
from d3po_bench.errors import UserError
from d3po_bench.launch import grid
from d3po_bench.prompts import digest, read_prompts
from d3po_bench.prompts import names as lists
from d3po_bench.runs.files import write_atomically
from d3po_bench.runs.run import IMAGE, TEXT, RunFolder, find_runs, finite, read_object
from d3po_bench.runs.sessions import differing, sessions
from d3po_bench.training.tools import EvaluationSet, spread
from eval.analysis.runs import COUNTS, read_run
from eval.measure import OBJECTIVE, TRAINING
from eval.tools import TOOLS

MANIFEST = "manifest.json"
GRIDS = ("grid.toml", "further.toml")
FILES = (*TEXT, "provenance.json")
NUMBERS = ("round", *COUNTS, "score_mean", "score_std", "reward_mean", "loss", "grad_norm",
           "updates")  # fmt: skip
"""What every round of every method has in metrics.jsonl; methods add their own."""
Problems = Iterator[str]


def verify(folder: Path) -> dict[str, list[str]]:
    """Every check of a folder of results, with what it found wrong.

    Args:
        folder: holds manifest.json.

    Raises:
        UserError: it carries no manifest.
    """
    runs = find_runs([folder], trials=True)
    return {
        "manifest": list(check_manifest(folder)),
        "runs": [f"{r.place.relative_to(folder)}: {what}" for r in runs for what in check_run(r)],
        "sets": [*check_sets(runs, folder), *check_grids(runs, folder)],
        "tables": list(check_tables(folder)),
    }


# ---- manifest


def record(folder: Path) -> Path:
    """Write the manifest of what is there now.

    Raises:
        UserError: there is no such folder, nothing in it, or a link.
    """
    if not folder.is_dir() or not _listed(folder):
        raise UserError(f"{folder} is no folder, or is empty. Name a folder of results.")
    for name in _links(folder):
        raise UserError(f"{folder / name} is a link. Put the file itself in its place.")
    path = folder / MANIFEST
    listed = {name: sha256_of(folder / name) for name in _listed(folder)}
    write_atomically(path, (json.dumps(listed, indent=1, sort_keys=True) + "\n").encode())
    return path


def _listed(folder: Path) -> list[str]:
    """Every file, hidden ones too, but the manifest and what Python caches, which is not run."""
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    kept = (n for n in names if n.suffix != ".pyc" or n.parent.name != "__pycache__")
    return sorted(n.as_posix() for n in kept if str(n) != MANIFEST)


def _links(folder: Path) -> list[str]:
    """Links, to folders too: what is behind them is not of the folder."""
    paths = (path for path in folder.rglob("*") if path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def check_manifest(folder: Path) -> Problems:
    """Files that are missing, changed, links, or not in the manifest.

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
    for name in changed(folder, {n: manifest[n] for n in sorted(there & manifest.keys())}):
        yield f"{name} has changed since the manifest was written"
    for name in _links(folder):
        yield f"{name} is a link: what is behind it is not checked"


# ---- runs


def check_run(run: RunFolder) -> Problems:
    """Whether a run has all its files, has ended, and its files agree with each other."""
    missing = [name for name in FILES if not (run.folder / name).is_file()]
    if missing:
        yield f"has no {', '.join(missing)}"
        return
    try:
        read_run(run)  # what tables and figures refuse, files changed after its end among it
        yield from _check_record(run)
        yield from _check_metrics(run.metrics)
        yield from _check_evaluations(run)
    except UserError as problem:
        yield f"cannot be read ({problem})"


def _check_record(run: RunFolder) -> Problems:
    """Whether a run is what its config names, went to its end, and went there in one place."""
    config, recorded = run.config, run.recorded.get("run_id")
    if config.run_id != recorded:
        yield f"its config has the run_id {recorded}, its settings make {config.run_id}"
    place = [config.objective, config.method, f"seed-{config.seed}"]
    if list(run.folder.parts[-3:]) != place:
        yield f"its config belongs in {'/'.join(place)}"
    if len(run.metrics) != config.rounds:
        yield f"has {len(run.metrics)} of {config.rounds} rounds"
    if not run.finished:
        yield "has not ended"
    first, *later = sessions(run.facts)
    for session in later:
        # Bytes may come out otherwise there: nobody can make such a run again.
        if changed := differing(first, session):
            where = f"from round {session.get('after_round', '?')} with other {', '.join(changed)}"
            yield f"was made in several environments: {where}"


def _check_metrics(metrics: Sequence[Mapping[str, Any]]) -> Problems:
    # Nothing was learned in a round of ties alone, or whose gradients all overflowed.
    learned = [m for m in metrics if m.get("updates") != m.get("skipped", 0)]
    of = {"loss": learned, "grad_norm": learned}
    lacking = [k for k in NUMBERS if not all(k in m for m in of.get(k, metrics))]
    if lacking:
        yield f"its metrics.jsonl has no {', '.join(lacking)}"
    for m in metrics:
        wrong = [k for k, v in m.items() if not finite(v)]
        if wrong:
            yield f"round {m['round']} has no finite {', '.join(wrong)}"


def _check_evaluations(run: RunFolder) -> Problems:
    """Images that are missing or too many, alike in every evaluation too, or have no score."""
    rows, config = run.evaluation, run.config
    for name, part in ((OBJECTIVE, rows), ("kl", [r for r in rows if r["sampler"] == TRAINING])):
        if any(math.isnan(row.get(name, 0.0)) for row in part):
            yield f"an evaluation image has no {name}"
    found: dict[tuple[int, str], set[tuple[str, int]]] = defaultdict(set)
    for row in rows:
        found[row["round"], row["sampler"]].add((row["prompt"], row["index"]))
    prompts = _prompts(run) or list(dict.fromkeys(row["prompt"] for row in rows))
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


def _prompts(run: RunFolder) -> list[str] | None:
    """The list that a config names; None where it cannot be read here.

    Votes have no list, and a user's file may be gone, or be another of that name.
    """
    try:
        source = run.config.eval_source
        found = read_prompts(source)
    except UserError:
        return None
    inputs = run.facts.get("inputs") or {}
    known = inputs.get("eval_prompts", inputs.get("prompts"))
    return found if source in lists() or known in (None, digest(found)) else None


# ---- sets of runs


def check_sets(runs: Sequence[RunFolder], folder: Path) -> Problems:
    """Runs of one objective and method must be alike but for the seed, and no run be a copy."""
    firsts: dict[tuple[str, ...], tuple[RunFolder, str]] = {}
    seen: dict[tuple[str, Hashable], RunFolder] = {}
    for run in runs:
        try:
            config, own, shared = run.config, _own(run), _but_the_seed(run)
        except UserError:
            continue  # the check of runs has named it
        cell = (*run.place.relative_to(folder).parts[:-3], config.objective, config.method)
        first, theirs = firsts.setdefault(cell, (run, shared))
        if shared != theirs:
            yield f"{run.place} and {first.place} differ in more than the seed"
        for what, numbers in {"seed": (*cell, config.seed), **own}.items():
            other = seen.setdefault((what, numbers), run)
            if numbers and other is not run and not _same_but_in_name(run, other):
                yield f"{run.place} and {other.place} have the same {what}"


def _same_but_in_name(run: RunFolder, other: RunFolder) -> bool:
    """Whether two names of one method have made one run, as `raft` and `preferred_images` may."""
    one, two = (
        {**r.recorded, "method": registry.variant(r.config.method)[0], "run_id": ""}
        for r in (run, other)
    )
    return run.config.method != other.config.method and one == two


def _own(run: RunFolder) -> dict[str, Hashable]:
    """What no two runs share, as numbers, for a blank makes other bytes; round 0 is shared."""
    rounds = tuple(tuple(line.get(name) for name in NUMBERS) for line in run.metrics)
    later = (row for row in run.evaluation if row["round"])
    columns = (*IMAGE, OBJECTIVE, "kl")
    numbers = frozenset(tuple(str(row.get(name)) for name in columns) for row in later)
    return {"rounds": rounds, "evaluations": numbers}


def _but_the_seed(run: RunFolder) -> str:
    """Settings, inputs, and the versions that scores depend on, the JPEG encoder's among them."""
    kept = {k: v for k, v in run.recorded.items() if k not in ("seed", "run_id")}
    origin = [run.facts.get(name) for name in ("inputs", "packages", "plugins")]
    return json.dumps([kept, *origin], sort_keys=True)


def check_grids(runs: Sequence[RunFolder], folder: Path) -> Problems:
    """Beside grids lie the runs that they ask for, with the configs that they make; no others.

    A seed that was left out of tables and figures, too, is missing here. A grid of which no run is
    there is a plan.
    """
    paths = sorted(path for path in folder.rglob("*.toml") if path.name in GRIDS)
    for below in dict.fromkeys(path.parent for path in paths):
        there = {run.place.relative_to(below).parts: run
                 for run in runs if run.place.is_relative_to(below)}  # fmt: skip
        asked: dict[tuple[str, ...], tuple[RunConfig, Path]] = {}
        for path in (path for path in paths if path.parent == below):
            own: dict[tuple[str, ...], tuple[RunConfig, Path]] = {
                (c.objective, c.method, f"seed-{c.seed}"): (c, path)
                for c in grid.configs(grid.read(path), TOOLS)
            }
            if own.keys() & there.keys():
                asked.update(own)
        where = below.relative_to(folder)
        for place in sorted(there.keys() - asked.keys()):
            yield f"no grid of {where} asks for {'/'.join(place)}, which is there"
        for place, (config, path) in sorted(asked.items(), key=lambda item: item[0]):
            name = path.relative_to(folder)
            if place not in there:
                yield f"{name} asks for {'/'.join(place)}, which is missing"
                continue
            with suppress(UserError):  # the check of runs has named it
                found, made = vars(there[place].config), vars(config)
                if other := sorted(k for k in made if found[k] != made[k]):
                    yield f"{'/'.join(place)} has another {', '.join(other)} than {name} makes"


# ---- tables and figures

ALONE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import d3po_bench, eval
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with this d3po-bench, whatever lies beside the script."""


def check_tables(folder: Path) -> Problems:
    """What the make.py of a folder would change in it, or in the documents beside it."""
    script = folder / "make.py"
    if not script.is_file():
        return
    home = Path(d3po_bench.__file__).parents[1]
    with tempfile.TemporaryDirectory() as place:
        # No compiled code of the folder, no settings of where one is, such as a matplotlibrc.
        alone = [sys.executable, "-I", "-B", "-X", f"pycache_prefix={place}"]
        command = [*alone, "-c", ALONE, str(home), str(script.resolve()), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    if done.returncode == 1 and done.stdout:
        yield from done.stdout.splitlines()
    elif done.returncode:
        yield f"{script} --check failed: {''.join(done.stderr.strip().splitlines()[-1:])}"
