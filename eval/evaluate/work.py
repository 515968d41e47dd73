"""`d3po-bench evaluate`: a run, a LoRA, a model or a folder of pictures, scored image by image.

Prompts and noise are fixed, so that two evaluations can be paired. The work is cut into pieces of
a few prompts; every piece is a file once it is done, so that a killed evaluation resumes, and any
number of processes ends with the same bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_bench import registry
from d3po_bench.errors import UserError
from d3po_bench.launch.job import End, attempt, died
from d3po_bench.launch.local import Died, side_by_side
from d3po_bench.pictures import open_picture
from d3po_bench.runs.files import csv_bytes, png_bytes, read_csv, write_atomically
from d3po_bench.runs.provenance import environment, now
from eval.evaluate.plan import EvaluateRequest, Plan, planned

if TYPE_CHECKING:
    from torch import Tensor

    from d3po_bench.types import Model


PIECE = 8
"""Prompts in a piece."""


Row = dict[str, Any]


Piece = tuple[int, str]
"""First prompt, and sampler ("" for pictures)."""


Told = Callable[[int, int], None]
"""Called with pieces done and pieces in all."""


Task = tuple[Plan, Piece, Path, EvaluateRequest]
"""What a worker process needs to do a piece."""


SMALLER = "Draw fewer --images of a prompt."
"""How a piece needs less memory."""


def run(
    request: EvaluateRequest,
    told: Told = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Score what was asked for; what is there of an earlier call is kept.

    Args:
        request: what to score, and by what.
        told: called with how far it is.
        note: called with what people should know of the scorers.

    Returns:
        The folder with rows.csv, plan.json and provenance.json.

    Raises:
        UserError: bad input, or another evaluation lies in the folder.
    """
    from eval import golden

    plan = planned(request)
    inside = bool(plan.files) or (request.target / "config.json").is_file()
    beside = request.target if inside else Path("evaluations")
    out = request.out or beside / ("evaluation" if inside else request.target.name)
    # Absent weights are found before anything is drawn.
    unchecked = golden.unchecked(_scorers(plan, request.device))
    starts = range(0, len(plan.prompts), PIECE)
    pieces = [(first, sampler) for sampler in plan.samplers for first in starts]
    with _taken(out, plan):
        if unchecked:
            note(golden.note(unchecked))
        rest = [p for p in pieces if not _is_done(out, plan, p, request.save)]
        numbers = count(len(pieces) - len(rest))

        def done() -> None:
            told(next(numbers), len(pieces))

        done()
        tasks = [(plan, piece, out, request) for piece in rest]
        if min(request.jobs, len(rest)) > 1:
            _side_by_side(tasks, request.jobs, done)
        else:
            for task in tasks:
                _do(*task)
                done()
    _finish(out, plan, pieces, request)
    return out


@contextmanager
def _taken(out: Path, plan: Plan) -> Iterator[None]:
    """Write the plan, or refuse a folder that holds another.

    A folder that was made for input that is then refused, before any piece is done, is gone again.
    """
    path = out / "plan.json"
    data = (json.dumps(asdict(plan), indent=1, sort_keys=True) + "\n").encode()
    fresh = [place for place in (out, *out.parents) if not place.exists()]
    if path.exists() and path.read_bytes() != data:
        raise UserError(
            f"{out} holds another evaluation, or one of other weights or pictures. Give another "
            "--out, or remove that folder."
        )
    new = not path.exists()
    write_atomically(path, data)
    try:
        yield
    except UserError:
        if new and not (out / "pieces").exists():
            path.unlink()
            for place in fresh:
                place.rmdir()
        raise


def _is_done(out: Path, plan: Plan, piece: Piece, save: bool) -> bool:
    """Whether the piece's rows are there, and its pictures where they are wanted."""
    return _place(out, piece).exists() and not (
        save and not all((out / name).exists() for name, _ in _named(plan, piece))
    )


def _named(plan: Plan, piece: Piece) -> list[tuple[str, str]]:
    """Where each picture of a piece is kept, and its prompt."""
    first, sampler = piece
    return [
        (f"pictures/{sampler}/{first + n:05d}-{k}.png", prompt)
        for n, prompt in enumerate(plan.prompts[first : first + PIECE])
        for k in range(plan.images)
    ]


def _list_pictures(out: Path, plan: Plan, pieces: Sequence[Piece]) -> None:
    """A metadata.csv for each sampler's pictures: `feedback new --pictures` reads it."""
    for sampler in plan.samplers:
        named = [row for piece in pieces if piece[1] == sampler for row in _named(plan, piece)]
        rows = [{"file_name": Path(name).name, "text": prompt} for name, prompt in named]
        write_atomically(out / "pictures" / sampler / "metadata.csv", csv_bytes(rows))


def _place(out: Path, piece: Piece) -> Path:
    return out / "pieces" / f"{piece[1] or 'pictures'}-{piece[0]:06d}.csv"


def _finish(out: Path, plan: Plan, pieces: Sequence[Piece], request: EvaluateRequest) -> None:
    """Put the pieces together in their order, and say where and by what they were scored."""
    from eval import golden

    if request.save:
        _list_pictures(out, plan, pieces)
    rows = [row for piece in pieces for row in read_csv(_place(out, piece))]
    _require_one_set_of_weights(rows, out)
    write_atomically(out / "rows.csv", csv_bytes(rows))
    used = _scorers(plan, request.device)
    facts = {
        **{name: fact for name, fact in environment().items() if name != "started"},
        "ended": now(),
        "content": plan.content,
        "scorers": {name: golden.fingerprint(scorer) for name, scorer in used.items()},
        "unchecked_scorers": golden.unchecked(used),
        **_plugins(plan),
        "versions": golden.versions(),
    }
    write_atomically(out / "provenance.json", (json.dumps(facts, indent=1) + "\n").encode())


def _plugins(plan: Plan) -> Row:
    """Which packages brought the scorers and the model, if any did."""
    used: list[tuple[registry.Kind, str]] = [("model", plan.model)]
    used += [("scorer", name.partition(":")[0]) for name in plan.scorers]
    return registry.plugins(used)


def _require_one_set_of_weights(rows: Sequence[Row], out: Path) -> None:
    """Refuse pieces that were scored before and after a scorer's weights changed."""
    found = sorted({row["weights"] for row in rows})
    if len(found) > 1:
        raise UserError(
            f"The weights of a scorer changed halfway through {out}: {found[0]}, then {found[1]}. "
            "Remove that folder and run the command again."
        )


def _side_by_side(tasks: Sequence[Task], jobs: int, done: Callable[[], None]) -> None:
    def ended(task: Task, found: End | Died) -> bool:
        end = died(found.code, SMALLER) if isinstance(found, Died) else found
        if end.problem is not None:
            print(end.trace, end="", file=sys.stderr)
            raise end.problem
        done()
        return True

    side_by_side(_attempt, tasks, jobs, ended)


def _attempt(task: Task, tell: Callable[[Any], None]) -> End:
    return attempt(lambda: _do(*task), SMALLER)


def _do(plan: Plan, piece: Piece, out: Path, request: EvaluateRequest) -> None:
    first, sampler = piece
    if plan.files:
        rows = _score_pictures(plan, slice(first, first + PIECE), request.device)
    else:
        rows, pictures = _draw_and_score(plan, first, sampler, request.device)
        if request.save:
            for (name, _), picture in zip(_named(plan, piece), pictures, strict=True):
                write_atomically(out / name, png_bytes(picture))
    write_atomically(_place(out, piece), csv_bytes(rows))


@cache
def _scorer(name: str, weights: str, device: str) -> Any:
    from d3po_bench.machine import device_of
    from eval.golden import checked_scorer

    return checked_scorer(name, device_of(device), weights)


def _scorers(plan: Plan, device: str) -> dict[str, Any]:
    return {name: _scorer(name, plan.weights, device) for name in plan.scorers}


@cache
def _model(plan: Plan, device: str) -> Model:
    import torch

    from d3po_bench.machine import device_of
    from d3po_bench.models.adapters import DiffusersModel, Training
    from d3po_bench.models.sources import load, model_source, threads_of
    from d3po_bench.models.text_encoders import require_short

    source = model_source(plan.model)
    torch.set_num_threads(threads_of(source))
    model = load(source, device_of(device), Training(long_prompts=plan.long_prompts))
    if isinstance(model, DiffusersModel) and plan.long_prompts == "refuse":
        require_short(model.parts, model.TOKENS, plan.prompts)  # all, before any is drawn
    if plan.adapter:
        model.load_saved(Path(plan.adapter))
    return model


def _draw_and_score(plan: Plan, first: int, sampler: str, device: str) -> tuple[list[Row], Tensor]:
    """The rows of a piece, and its pictures [N, 3, h, w] uint8."""
    from d3po_bench.training.tools import EvaluationSet
    from eval.measure import evaluate

    what = EvaluationSet(
        prompts=plan.prompts[first : first + PIECE], images=plan.images, steps=plan.steps,
        guidance=plan.guidance, sampler=plan.sampler, eta=plan.eta, first=first,
        samplers=(sampler,),
    )  # fmt: skip
    rows, pictures = evaluate(_model(plan, device), what, _scorers(plan, device))
    height, width = pictures[sampler].shape[2:]
    facts = {"steps": plan.steps, "guidance": plan.guidance, "size": f"{width}x{height}"}
    return [{**facts, **_stamped(row, plan, device)} for row in rows], pictures[sampler]


def _stamped(row: Row, plan: Plan, device: str) -> Row:
    """The row with the weights of every scorer beside it."""
    from eval import golden

    used = (f"{n}={golden.fingerprint(s)}" for n, s in _scorers(plan, device).items())
    return {**row, "weights": " ".join(used)}


def _score_pictures(plan: Plan, part: slice, device: str) -> list[Row]:
    """One picture at a time: sizes may differ."""
    from eval.measure import cell, scored

    rows = []
    for name, prompt in zip(plan.files[part], plan.prompts[part], strict=True):
        image = _read(Path(plan.model) / name)
        scores = scored(image, [prompt], _scorers(plan, device))
        height, width = image.shape[2:]
        row: Row = {"file": name, "size": f"{width}x{height}", "prompt": prompt}
        row |= {column: cell(float(values[0])) for column, values in scores.items()}
        rows.append(_stamped(row, plan, device))
    return rows


def _read(path: Path) -> Any:
    """A picture [1, 3, h, w] uint8."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1).unsqueeze(0)


def summary(out: Path) -> Iterator[str]:
    """The mean of every column of rows.csv, for each sampler."""
    rows = read_csv(out / "rows.csv")
    told = {"steps", "guidance", "size", "sampler", "prompt", "index", "weights", "file"}
    for sampler in dict.fromkeys(row.get("sampler", "") for row in rows):
        mine = [row for row in rows if row.get("sampler", "") == sampler]
        for column in (name for name in mine[0] if name not in told):
            values = [float(row[column]) for row in mine if row[column] not in ("", "nan")]
            if values:
                mean = sum(values) / len(values)
                yield f"{sampler or 'pictures'}  {column}  {mean:.4f}  ({len(values)} images)"


def lines_of_progress(echo: Callable[[str], None]) -> Told:
    """Tell how far it is and, once a piece is done, how long the rest will take."""
    began: list[tuple[float, int]] = []

    def told(done: int, total: int) -> None:
        began.append((time.monotonic(), done))
        seconds, fresh = time.monotonic() - began[0][0], done - began[0][1]
        left = f", {seconds * (total - done) / fresh:.0f} s left" if fresh else ""
        echo(f"{done} of {total} pieces{left}")

    return told
