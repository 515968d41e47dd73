"""A run folder, read. Somebody else, or a newer version, may have written it: nothing is trusted.

`d3po_bench.runs.store` is the writer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, count, product
from pathlib import Path
from typing import Any

from d3po_bench import __version__
from d3po_bench.config import RunConfig
from d3po_bench.digests import files_below
from d3po_bench.errors import UserError
from d3po_bench.runs.files import Row, read_csv, readable
from d3po_bench.runs.packed import PACKED, packed_at, place_of, unpacked

TEXT = ("config.json", "metrics.jsonl", "timing.jsonl", "eval.csv")
"""A run's text files but provenance.json, which holds their digests."""

BESIDE = ("round", "evaluate", "cpu")
"""Of a line of timing.jsonl, what is no stage of training, whose wall seconds the others are.

"cpu" is what all stages took of processors, of this process and all its threads."""

LORA, LAST = "lora", "checkpoints/last.safetensors"
"""The weights that a finished run leaves: for others to load, and for the next round of votes."""

SAMPLES = "samples"
"""The pictures that a run leaves, to look at; runs of earlier versions have no record of them."""

JOURNAL = "trials.log"
"""What a search remembers its trials by, in its folder; nothing else has one."""

IMAGE = ("round", "sampler", "prompt", "index")
"""Columns of eval.csv that name an evaluation image; the others, first the score, measure it."""


SCORE = {"scorer": str, "unit": str, "sign": int}
"""What provenance says of the column `score`."""


class RunFolder:
    """The run in a folder, finished or not. A file is read when it is first asked for, and kept.

    Everything here raises a UserError where a file is damaged or of a newer version.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: with a config.json, once the run has begun."""
        self.folder = folder

    @property
    def place(self) -> Path:
        """The folder, or where it would stand if it did not come from a `packed` file."""
        return place_of(self.folder)

    @cached_property
    def facts(self) -> Row:
        """provenance.json: where and how the run was made; {} where that is not there."""
        path = self.folder / "provenance.json"
        if not path.exists():
            return {}
        facts = read_object(path)
        with readable(path):
            _check_facts(facts)
        version = _writer(facts)
        if _numbers(version) > _numbers(__version__):
            raise UserError(
                f"The run in {self.folder} is of d3po-bench {version}, and this is {__version__}. "
                "Install that version."
            )
        return facts

    @cached_property
    def recorded(self) -> Row:
        """config.json, word for word."""
        return read_object(self.folder / "config.json")

    @cached_property
    def config(self) -> RunConfig:
        """What the run was asked for."""
        path = self.folder / "config.json"
        writer = _writer(self.facts) or "a version that is not on record"
        try:
            return RunConfig.from_json(self.recorded)
        except ValueError as problem:
            raise UserError(
                f"{path} {problem}. It was written by {writer}, and this is d3po-bench "
                f"{__version__}. Restore that file, or install the version that wrote it."
            ) from problem

    @cached_property
    def metrics(self) -> list[Row]:
        """A line for each round, from the first; [] before that has ended."""
        return _rounds(self.folder / "metrics.jsonl")

    @cached_property
    def timing(self) -> list[Row]:
        """Seconds of each round by stage; [] where they are not on record."""
        return _rounds(self.folder / "timing.jsonl")

    @cached_property
    def table(self) -> list[dict[str, str]]:
        """eval.csv, word for word: a row for each evaluation image."""
        path = self.folder / "eval.csv"
        if not path.exists():
            return []
        with readable(path):
            # Half a number reads as a number: 1.4 of 1.445.
            if not path.read_bytes().endswith(b"\n"):
                raise ValueError("half a line at its end")
            return read_csv(path)

    @cached_property
    def evaluation(self) -> list[Row]:
        """The rows of eval.csv with whole numbers as round and index.

        What measures an image is a float, NaN where a scorer had nothing to say about it.
        """
        with readable(self.folder / "eval.csv"):
            rows = [_image(row) for row in self.table]
            if rows:
                _check_images(rows)
            return rows

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return "ended" in self.facts

    def require_content(self, *more: str) -> None:
        """Refuse files that are not those that the run ended with.

        Text files of runs that are older than that record are taken as they are; weights are not.

        Args:
            more: what is used beside the text files, `LORA`, `LAST` or `SAMPLES`.

        Raises:
            UserError: naming the file.
        """
        known = self.facts.get("content")
        # Every start writes a run_id since before any run without that record ended.
        lost = known is None and self.finished and "run_id" in self.facts
        if lost or not all(any(n.startswith(part) for n in known or ()) for part in more):
            raise UserError(
                f"{self.folder / 'provenance.json'} does not say what {(*more, TEXT[0])[0]} was "
                "when the run ended: it was changed, or the run is of an earlier version. Restore "
                "it, or remove that folder and run it again."
            )
        used = {n: digest for n, digest in (known or {}).items() if n.startswith((*TEXT, *more))}
        now = content(self.folder, *more) if used else {}
        for name in used | now:
            if now.get(name) != used.get(name):
                raise UserError(
                    f"{self.folder / name} is missing or was changed after the run had ended. "
                    "Restore it, or remove that folder and run it again."
                )

    def require_inputs(self, today: Mapping[str, Any], instead: str) -> None:
        """Refuse other models, prompts or scorers than those that the run began with.

        Args:
            today: what names the content of each, as far as it is used.
            instead: what else can be done, for people.

        Raises:
            UserError: naming what is another.
        """
        began = self.facts.get("inputs", {})
        require_inputs(f"The run in {self.folder}", began, today, instead)


def require_inputs(
    owner: str, began: Mapping[str, Any], today: Mapping[str, Any], instead: str
) -> None:
    """Refuse other inputs than something began with, as far as those are on record.

    Args:
        owner: what began with them, for people.
        began: input -> what names its content.
        today: the same, of what would be used now.
        instead: what else can be done, for people.

    Raises:
        UserError: naming what is another.
    """
    for name, value in today.items():
        then = began.get(name, value)
        if then == value:
            continue
        if isinstance(then, Mapping) and isinstance(value, Mapping):
            other = next(k for k in {**then, **value} if then.get(k) != value.get(k))
            name, then, value = f"{name} {other}", then.get(other), value.get(other)
        raise UserError(
            f"{owner} began with other inputs: {name} {then}, not {value}, so its content has "
            f"changed. Bring that back, or {instead}."
        )


def find_runs(paths: Iterable[Path], *, trials: bool = False) -> list[RunFolder]:
    """The runs at or below `paths`, at any depth, packed ones too, each once, sorted by place.

    Args:
        paths: run folders, or folders of them.
        trials: those of searches below `paths`, too. Trials differ in their settings, so whoever
            compares runs has to name their folder.

    Raises:
        UserError: a packed file is damaged.
    """
    files = (file for path in paths for file in (_files if trials else _untried)(path))
    folders = {f.parent.resolve(): f.parent for f in files if f.name == "config.json"}
    # A network that was trained has one, too, in the folder of its run.
    trained = {place / LORA for place in folders}
    own = {place: f for place, f in folders.items() if trained.isdisjoint(place.parents)}
    return sorted(map(RunFolder, own.values()), key=lambda run: run.place)


def _files(path: Path) -> Iterator[Path]:
    """Every file below a folder, those in packed files too, also one that lies above it."""
    holds_runs = False
    for file in files_below(path):
        yield file
        holds_runs |= file.name in ("config.json", PACKED)
        if file.name == PACKED:
            yield from files_below(unpacked(file))
    if not holds_runs and (part := packed_at(path)):
        yield from files_below(part)


def _untried(path: Path) -> list[Path]:
    """Every file below a folder, but those of searches further down."""
    files = {file: place_of(file) for file in _files(path)}
    searches = {place.parent for place in files.values() if place.name == JOURNAL} - {path}
    return [file for file, place in files.items() if searches.isdisjoint(place.parents)]


def content(run: Path, *more: str) -> dict[str, str]:
    """File -> SHA-256 of the text files of a run, and of `more`: other files and folders of it.

    Raises:
        UserError: one cannot be read.
    """
    digests = {}
    for place in (run / name for name in (*TEXT, *more)):
        for path in files_below(place) if place.is_dir() else [place]:
            with readable(path):
                if path.exists():
                    # Not sha256_of, which trusts a time stamp that is coarse on some disks.
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    digests[path.relative_to(run).as_posix()] = digest
    return digests


def samples_of(prompts: Iterable[str]) -> dict[str, str]:
    """What the file of a prompt's picture below `SAMPLES` is called, without .png -> the prompt."""
    found: dict[str, str] = {}
    for prompt in prompts:
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-") or "prompt"
        others = (f"{name}-{n}" for n in count(2))
        found[next(n for n in chain([name], others) if n not in found)] = prompt
    return found


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
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or type(row.get("round")) is not int:
                raise ValueError(f"line {number} is not an object with a whole number `round`")
        return rows


def finite(value: Any) -> bool:
    """Whether a value from JSON is a number that can be counted with: neither text nor true."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check_facts(facts: Row) -> None:
    """Refuse provenance of another shape than all versions have written.

    Raises:
        ValueError: naming the part.
    """
    parts = ("packages", "plugins", "content", "inputs", "score")
    named = {name: facts.get(name, {}) for name in parts}
    if isinstance(named["inputs"], dict):
        named["scorers of inputs"] = named["inputs"].get("scorers", {})
    for name, part in named.items():
        if not isinstance(part, dict):
            raise ValueError(f"{name} is not an object")
    score = facts.get("score")
    kinds = {name: type(value) for name, value in (score or {}).items()}
    if score and (kinds != SCORE or score["sign"] not in (1, -1)):
        raise ValueError("score does not say scorer, unit and sign")
    sessions = facts.get("sessions", [{}])
    if not isinstance(sessions, list) or not sessions:
        raise ValueError("sessions is not a list of objects")
    for session in sessions:
        if not isinstance(session, dict) or type(session.get("after_round", 0)) is not int:
            raise ValueError("a session is not an object with a whole number `after_round`")


def _writer(facts: Mapping[str, Any]) -> str:
    """The version of d3po-bench that provenance names; "" where it does not."""
    version = facts.get("packages", {}).get("d3po-bench")
    return version if isinstance(version, str) else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in re.findall(r"\d+", version.partition("+")[0]))


def _rounds(path: Path) -> list[Row]:
    """The lines of a file that has one for each round, from 1; [] where there is no file."""
    rows = read_lines(path) if path.exists() else []
    with readable(path):
        for number, row in enumerate(rows, 1):
            if row["round"] != number:
                raise ValueError(f"line {number} is of round {row['round']}")
    return rows


def _image(row: Mapping[str, str]) -> Row:
    """A row of eval.csv, typed.

    Raises:
        ValueError: a value is missing or of another kind, or there is one too many.
    """
    if lacking := {*IMAGE, "score"} - row.keys():
        raise ValueError(f"no column {min(lacking)}")
    if None in row or None in row.values():
        raise ValueError("a row with more or fewer values than columns")
    for name in ("round", "index"):
        if not row[name].isdecimal():
            raise ValueError(f"{row[name]!r} is not a whole number from 0 as {name}")
    scores = {name: float(text or "nan") for name, text in row.items() if name not in IMAGE}
    for name, value in scores.items():
        if math.isinf(value):
            raise ValueError(f"an infinite {name}")
    return {**row, "round": int(row["round"]), "index": int(row["index"]), **scores}


def _check_images(rows: Sequence[Row]) -> None:
    """Refuse images that are there twice, and an evaluation that lacks some.

    Raises:
        ValueError: naming an image, or the evaluation.
    """
    ((image, most),) = Counter(tuple(row[name] for name in IMAGE) for row in rows).most_common(1)
    if most > 1:
        raise ValueError(f"two rows of one image: {image}")
    counts = Counter((row["round"], row["sampler"]) for row in rows)
    whole = max(counts.values())
    for round_, sampler in product(*map(set, zip(*counts, strict=True))):
        if counts[round_, sampler] < whole:
            raise ValueError(
                f"{counts[round_, sampler]} of {whole} images of round {round_}, sampler {sampler}"
            )
