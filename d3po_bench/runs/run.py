"""Files of run folders, read with suspicion: somebody else, or a newer version, wrote them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from d3po_bench import __version__
from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.runs.sessions import misshapen

Row = dict[str, Any]

NEEDED = ("method", "objective", "model", "seed")
"""Of every config; what else an older version did not know yet has its default."""

TEXT = ("config.json", "metrics.jsonl", "timing.jsonl", "eval.csv")
"""A run's text files but provenance.json, which holds their digests."""

REMEDY = "Restore that file, leave that folder out, or run it again."


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a malformed file raises into one line.

    Raises:
        UserError: naming the file.
    """
    try:
        yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error,
    ) as problem:  # fmt: skip
        detail = f"{type(problem).__name__}: {problem}"[:200]
        raise UserError(f"Expected a readable {path}, got {detail}. {REMEDY}") from problem


def read_object(path: Path) -> Row:
    """The JSON object in a file.

    Raises:
        UserError: it is not there, or holds something else.
    """
    with readable(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} instead of an object")
        return found


def read_lines(path: Path) -> list[Row]:
    """The objects of a file with a JSON object on each line, `round` a whole number in each.

    Raises:
        UserError: it is not there, or a line is something else.
    """
    with readable(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or type(row.get("round")) is not int:
                raise ValueError(f"no object with a whole number `round` in line {number + 1}")
        return rows


def finite(value: Any) -> bool:
    """Whether a value from JSON is a number that can be counted with: neither text nor true."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def read_facts(folder: Path) -> Row:
    """The provenance of a run, {} where there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    path = folder / "provenance.json"
    if not path.exists():
        return {}
    facts = read_object(path)
    if expected := misshapen(facts):
        raise UserError(f"Expected {expected} in {path}, got another thing. {REMEDY}")
    version = writer(facts)
    if version is not None and _numbers(version) > _numbers(__version__):
        raise UserError(
            f"Expected a run of d3po-bench {__version__} or older in {folder}, got one of "
            f"{version}. Install that version."
        )
    return facts


def writer(facts: Mapping[str, Any]) -> str | None:
    """The version of d3po-bench that provenance names; None where it does not."""
    version = facts.get("packages", {}).get("d3po-bench")
    return version if isinstance(version, str) else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in re.findall(r"\d+", version.partition("+")[0]))


def read_config(folder: Path) -> Row:
    """The config of a run as JSON gives it, every setting of the type that it must have.

    Raises:
        UserError: it is not there or damaged, or a newer version wrote it.
    """
    path = folder / "config.json"
    found, facts = read_object(path), read_facts(folder)
    kinds = get_type_hints(RunConfig) | {"run_id": str}
    strange = sorted(found.keys() - kinds.keys())
    if strange:
        raise UserError(
            f"Expected settings that d3po-bench {__version__} knows in {path}, got "
            f"{', '.join(strange)[:80]} from version {writer(facts) or '(not on record)'}. "
            "Install the version that wrote it."
        )
    wrong = [name for name in NEEDED if name not in found]
    wrong += [name for name, value in found.items() if not _fits(value, kinds[name])]
    wrong += [] if wrong or found["seed"] >= 0 else ["seed"]
    if wrong:
        raise UserError(
            f"Expected {', '.join(NEEDED)} and settings that a run can have in {path}, got "
            f"{wrong[0]} = {ascii(found.get(wrong[0], 'nothing'))[:60]}. {REMEDY}"
        )
    return found


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can be that of a field of this type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, bool, str) else isinstance(value, dict)


def content(run: Path) -> dict[str, str]:
    """File -> SHA-256 of the text files of a run.

    Raises:
        UserError: one cannot be read.
    """
    there = [run / name for name in TEXT if (run / name).exists()]
    digests = {}
    for path in there:
        with readable(path):
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def require_content(run: Path, facts: Mapping[str, Any]) -> None:
    """Refuse text files that are not those that a run ended with, where these are on record.

    Args:
        run: its folder.
        facts: its provenance.

    Raises:
        UserError: naming the file.
    """
    found = content(run)
    for name, digest in facts.get("content", {}).items():
        if found.get(name) != digest:
            raise UserError(
                f"Expected {name} as the run in {run} has left it, got another file or none. "
                "Restore it, or remove that folder and run it again."
            )
