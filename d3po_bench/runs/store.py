"""RunStore: the writer of a run's folder. `d3po_bench.runs.run` reads it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from d3po_bench.config import LATER, RunConfig
from d3po_bench.errors import RunError, TryAgainError, UserError, is_out_of_memory
from d3po_bench.runs.files import (
    FAILED,
    Hold,
    Row,
    csv_bytes,
    json_lines,
    png_bytes,
    remove,
    taken,
    write_atomically,
    write_folder,
)
from d3po_bench.runs.provenance import environment, now, packages
from d3po_bench.runs.remote import Mirror
from d3po_bench.runs.run import LAST, LORA, SAMPLES, TEXT, RunFolder, content, samples_of
from d3po_bench.runs.sessions import kept
from d3po_bench.runs.tensors import packed, read_tensors

NEWEST, BEFORE = LAST, "checkpoints/previous.safetensors"
"""Of a run's checkpoints."""

ENDED = ("ended", "content")
"""What provenance says of a run that has ended, and no more once it has been extended."""


class RunStore:
    """The files of one run. Open it with `RunStore.open`."""

    def __init__(
        self, folder: Path, config: RunConfig | None = None, hold: Hold | None = None
    ) -> None:
        """Read what is in `folder`.

        Args:
            folder: of the run.
            config: the run's; None for a folder that is only read.
            hold: of the folder, by whoever writes.

        Raises:
            UserError: a file in it is damaged.
        """
        self.folder, self.config, self.hold = folder, config, hold
        run = RunFolder(folder)
        self.metrics, self.timing = run.metrics, run.timing
        _ = run.evaluation  # refuses what is damaged
        self.evaluation: list[Row] = [*run.table]  # text, which is written again as it is
        self.damaged = False
        """Whether the newest checkpoint was passed over."""
        self._checkpointed = self._started = False
        self.mirror: Mirror | None = None
        """Where else the run is kept, if it is."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, config: RunConfig, *, resume: bool) -> Iterator[RunStore]:
        """Take the folder for this process, to begin or to resume; one left empty is removed.

        Raises:
            UserError: it cannot be written, belongs to another config, is in use, or holds a
                run that was not to be resumed.
        """
        mirror = Mirror.of(folder)
        with taken(folder) as hold, mirror.held() if mirror else contextlib.nullcontext():
            if mirror:
                mirror.pull()
            require_same(folder, config, resume)
            store = cls(folder, config, hold)
            store.mirror = mirror
            try:
                yield store
            except TryAgainError:
                raise
            except (Exception, SystemExit) as problem:
                store.failed(problem)
                raise

    # ---- writing

    def _write(self, name: str, data: bytes, keep: Path | None = None) -> None:
        """Write a file of the run, in the folder that was taken and no other."""
        if self.hold is not None:
            self.hold.require()
        write_atomically(self.folder / name, data, keep)

    def start(
        self, config: RunConfig, inputs: Row, *,
        after: int | None = None, facts: Row | None = None, **how: Any,
    ) -> None:  # fmt: skip
        """Make the folder this config's, and record that a process begins or resumes the run.

        Args:
            config: the run's.
            inputs: what names the content of the model, prompts and scorers: a run resumes only
                with those that it began with, where they are on record.
            after: round of the checkpoint that the process resumes from; None without one, which
                keeps nothing of earlier processes. A run that had ended begins again here.
            facts: anything else to keep.
            how: where and how it is computed, beside what this process knows of itself.

        Raises:
            UserError: an input is another than that of the rounds which are kept.
        """
        if after is not None:
            RunFolder(self.folder).require_inputs(inputs, "give another --out")
        known = {} if after is None else self.provenance()
        known = {name: fact for name, fact in known.items() if name not in ENDED}
        if not (self.folder / "config.json").exists():
            self._write("config.json", config.to_json().encode())
        (self.folder / FAILED).unlink(missing_ok=True)
        self._started = True
        session = {**environment(), **how}
        this = {**session, "after_round": after or 0, "rounds": config.rounds}
        self._checkpointed = after is not None
        self._write_facts({
            **(known or session), **(facts or {}), "run_id": config.run_id, "inputs": inputs,
            "checkpointed": self._checkpointed, "sessions": [*kept(known, after or 0), this],
        })  # fmt: skip
        if RunFolder(self.folder).config.rounds != config.rounds:  # now that it has not ended
            self._write("config.json", config.to_json().encode())
        remove(self.folder / LORA)  # of fewer rounds
        self._keep()

    def failed(self, problem: BaseException) -> None:
        """Leave word of what ended the run, if it had begun in this process."""
        if self._started:
            told = " ".join(str(problem).split()) or type(problem).__name__
            with contextlib.suppress(UserError):  # what ended the run is what is told
                self._write(FAILED, f"{told}\n".encode())
                self._keep()

    def _keep(self) -> None:
        """Bring what was written to where else the run is kept."""
        if self.mirror is not None:
            self.mirror.push()

    def require_packages(self) -> None:
        """Refuse to resume with other package versions, on which scores depend.

        Raises:
            UserError: naming the packages and both their versions.
        """
        began, here = self.provenance().get("packages", {}), packages()
        changed = [name for name in sorted(began.keys() & here.keys()) if began[name] != here[name]]
        if changed:
            told = (f"{n} {began[n] or '(none)'}, not {here[n] or '(none)'}" for n in changed)
            raise UserError(
                f"The run in {self.folder} began with other packages: {'; '.join(told)}. Install "
                "those versions, or give another --out."
            )

    def require_rest(self, *, checkpoint: bool) -> None:
        """Refuse a folder that has lost what a run that came so far had written.

        Args:
            checkpoint: whether it has one that can be read.

        Raises:
            UserError: naming what is not there.
        """
        known, lost = self.provenance(), ""
        if known.get("checkpointed") and not checkpoint:
            lost = "checkpoints/last.safetensors"
        elif not known and (checkpoint or self.metrics or self.evaluation):
            lost = "provenance.json"
        if lost:
            raise UserError(
                f"The run in {self.folder} has lost its {lost}. Restore that file, give another "
                "--out, or remove that folder to start again."
            )

    def log(self, metrics: Row, timing: Row) -> None:
        """Add a round: its line of metrics and its seconds."""
        self.metrics.append(metrics)
        self.timing.append(timing)
        self._write("timing.jsonl", json_lines(self.timing))
        self._write("metrics.jsonl", json_lines(self.metrics))

    def log_evaluation(self, rows: Sequence[Row]) -> None:
        """Add evaluation rows, one for each image."""
        self.evaluation.extend(rows)
        self._write("eval.csv", csv_bytes(self.evaluation))

    def save_samples(self, round_: int, images: Mapping[str, Tensor]) -> None:
        """Keep the evaluation image [3, h, w] uint8 of each prompt as PNG."""
        for name, prompt in samples_of(images).items():
            self._write(f"samples/round-{round_:05d}/{name}.png", png_bytes(images[prompt]))

    def keep_until(self, round_: int) -> None:
        """Forget what was logged after round `round_`: the run resumes from there."""
        self.metrics = [m for m in self.metrics if m["round"] <= round_]
        self.timing = [t for t in self.timing if t["round"] <= round_]
        self.evaluation = [e for e in self.evaluation if int(e["round"]) <= round_]

    def digests(self) -> dict[str, str]:
        """File -> SHA-256 of what it is to say: the config, and the rounds that are kept."""
        texts = {
            "config.json": self.config.to_json().encode() if self.config else b"",
            "metrics.jsonl": json_lines(self.metrics),
            "timing.jsonl": json_lines(self.timing),
            "eval.csv": csv_bytes(self.evaluation) if self.evaluation else b"",
        }
        return {name: hashlib.sha256(data).hexdigest() for name, data in texts.items() if data}

    def require_digests(self, expected: Mapping[str, str], round_: int) -> None:
        """Refuse rows that are not those of the checkpoint, or a checkpoint of another run.

        Args:
            expected: what the checkpoint says.
            round_: of the checkpoint.

        Raises:
            UserError: naming the file.
        """
        found = self.digests()
        for name in {**found, **expected}:
            if found.get(name) == expected.get(name):
                continue
            if name == "config.json" and self._extends(expected.get(name), round_):
                continue
            raise UserError(
                f"The checkpoint in {self.folder} is of another run, seed or version. Bring its "
                "own back, or remove the run folder and start again."
                if name == "config.json"
                else f"{self.folder / name} is damaged or was changed: the checkpoint knows other "
                "rows. Restore it, or remove the run folder and start again."
            )

    def _extends(self, digest: str | None, round_: int) -> bool:
        """Whether a digest is of this config but for fewer rounds, at least as many as done."""
        if self.config is None:
            return False
        fewer = (replace(self.config, rounds=n) for n in range(max(1, round_), self.config.rounds))
        return any(hashlib.sha256(c.to_json().encode()).hexdigest() == digest for c in fewer)

    def checkpoint(self, tensors: Mapping[str, Tensor], facts: Row) -> None:
        """Write the checkpoint of `tensors` and `facts`; the one before is kept beside it."""
        data = packed(tensors, facts)
        before = self.folder / BEFORE
        # A damaged one must not push out the whole one before it.
        self._write(NEWEST, data, keep=None if self.damaged else before)
        self.damaged = False
        if not self._checkpointed:  # from now on, a folder without one has lost it
            self.write_provenance(checkpointed=True)
            self._checkpointed = True
        self._keep()

    def load_checkpoint(self) -> tuple[dict[str, Tensor], Row] | None:
        """Tensors and facts of the newest checkpoint that is whole; None where there is none yet.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        problems: list[str] = []
        for path in (self.folder / NEWEST, self.folder / BEFORE):
            try:
                found = read_tensors(path)
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as problem:
                if is_out_of_memory(problem):
                    raise
                problems.append(f"{path} is damaged ({problem})")
                continue
            self.damaged = bool(problems)
            return found
        if problems:
            raise UserError(
                f"No whole checkpoint is left: {', and '.join(problems)}. Remove the run folder "
                "and start again."
            )
        return None

    def save_lora(self, save: Callable[[Path], None]) -> None:
        """Let `save` fill the folder of the trained weights."""
        if self.hold is not None:
            self.hold.require()
        write_folder(self.folder / LORA, save)

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return RunFolder(self.folder).finished

    def finish(self, **facts: Any) -> None:
        """Record that the run has ended, `facts`, and what names the content of its files.

        Raises:
            RunError: a text file is not as the run wrote it.
        """
        found = content(self.folder, LORA, LAST, SAMPLES)
        for name, digest in self.digests().items():
            if found.get(name) != digest:
                raise RunError(
                    f"{self.folder / name} was changed while the run was going. Restore it, and "
                    "run the same command again."
                )
        self.write_provenance(ended=now(), content=found, **facts)
        self._keep()

    def provenance(self) -> Row:
        """What is known about where the run was made."""
        return RunFolder(self.folder).facts

    def write_provenance(self, **facts: Any) -> None:
        """Record `facts`, keeping what was recorded before."""
        self._write_facts({**self.provenance(), **facts})

    def _write_facts(self, facts: Row) -> None:
        data = json.dumps(facts, indent=1, sort_keys=True).encode() + b"\n"
        self._write("provenance.json", data)


def require_same(folder: Path, config: RunConfig, resume: bool) -> None:
    """Refuse a folder that holds another run, or one that is not to be resumed.

    The same run with more rounds is no other.

    Raises:
        UserError: saying what differs.
    """
    if not (folder / "config.json").exists():
        rest = (*TEXT, "provenance.json", "checkpoints")
        left = [name for name in rest if (folder / name).exists()]
        if left:
            raise UserError(
                f"{folder} holds {left[0]} but no config.json, so nothing says which run it is. "
                "Restore that file, give another --out, or remove that folder to start again."
            )
        return
    run = RunFolder(folder)
    _ = run.config  # refuses what no run can have
    mine, there = LATER | json.loads(config.to_json()), LATER | run.recorded
    changed = [k for k in sorted(mine | there) if there.get(k) != mine.get(k)]
    settings = [k for k in changed if k != "run_id"] or changed
    if settings == ["rounds"]:
        if config.rounds < run.config.rounds:
            raise UserError(
                f"{folder} holds a run of {run.config.rounds} rounds, and {config.rounds} are "
                f"fewer. Give --rounds {run.config.rounds} or more, which extends it, or another "
                "--out."
            )
    elif changed:
        told = (f"{k} is {there.get(k)!r} there, not {mine.get(k)!r}" for k in settings[:3])
        raise UserError(
            f"{folder} holds another run: {', '.join(told)}. Give another --out, or remove that "
            "folder."
        )
    if not resume:
        raise UserError(
            f"There is a run in {folder} already. Resume it with --resume, give another --out, or "
            "remove that folder."
        )
