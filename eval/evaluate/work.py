"""`d3po-bench evaluate`: a run, a LoRA, a model or a folder of pictures, scored image by image.

Prompts and noise are fixed, so that two evaluations can be paired. The work is cut into pieces of
a few prompts; every piece is a file once it is done, so that a killed evaluation resumes, and any
number of processes ends with the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_bench import registry
from d3po_bench.digests import changed, short
from d3po_bench.errors import UserError
from d3po_bench.launch.job import End, attempt, died
from d3po_bench.launch.local import Died, side_by_side
from d3po_bench.pictures import open_picture
from d3po_bench.runs.files import csv_bytes, png_bytes, read_csv, write_atomically
from d3po_bench.runs.provenance import environment, now, packages
from d3po_bench.runs.run import read_object
from d3po_bench.runs.sessions import differing
from eval.evaluate.plan import EvaluateRequest, Plan, planned
from eval.evaluate.summary import silence

if TYPE_CHECKING:
    from torch import Tensor

    from d3po_bench.types import Model


PLAN = "plan.json"

PIECE = 8
"""Prompts in a piece."""


Row = dict[str, Any]


Piece = tuple[int, str]
"""First prompt, and sampler ("" for pictures)."""


Told = Callable[[int, int], None]
"""Called with images done and images in all."""


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
    with _taken(out, _described(plan, request.device)):
        if unchecked:
            note(golden.note(unchecked))
        rest, total = [p for p in pieces if not _is_done(out, plan, p, request)], images(plan)
        left = sum(_images(plan, piece) for piece in rest)

        def done(task: Task | None = None) -> None:
            nonlocal left
            left -= _images(plan, task[1]) if task else 0
            told(total - left, total)

        done()
        tasks = [(plan, piece, out, request) for piece in rest]
        if min(request.jobs, len(rest)) > 1:
            _side_by_side(tasks, request.jobs, done)
        else:
            for task in tasks:
                _do(*task)
                done(task)
    _finish(out, plan, pieces, request)
    silence(out, note)
    return out


def images(plan: Plan) -> int:
    """How many are scored."""
    return len(plan.prompts) * plan.images * len(plan.samplers)


def _images(plan: Plan, piece: Piece) -> int:
    return len(plan.prompts[piece[0] : piece[0] + PIECE]) * plan.images


def require_same(out: Path, plan: Row) -> None:
    """Refuse a folder that holds another evaluation.

    Args:
        out: where it would go; nothing is written.
        plan: what decides its numbers, or a part of that.

    Raises:
        UserError: saying what differs.
    """
    if (out / PLAN).exists():
        known = read_object(out / PLAN)
        here = json.loads(json.dumps(plan))
        other = differing({name: known.get(name) for name in here}, here)
        if other:
            raise UserError(
                f"{out} holds another evaluation: {', '.join(other)} differs. Give another --out, "
                "or remove that folder."
            )


def _described(plan: Plan, device: str) -> Row:
    """What decides the numbers of an evaluation: its plan, scorers and package versions."""
    from eval import golden

    used = {name: golden.fingerprint(s) for name, s in _scorers(plan, device).items()}
    return {**asdict(plan), "scorer_weights": used, "packages": packages()}


def _name(plan: Plan, device: str) -> str:
    """Names all that decides the numbers of a piece."""
    return short(json.dumps(_described(plan, device), sort_keys=True))


@contextmanager
def _taken(out: Path, plan: Row) -> Iterator[None]:
    """Write the plan, or refuse a folder that holds another.

    A folder that was made for input that is then refused, before any piece is done, is gone again.
    """
    path = out / PLAN
    fresh = [place for place in (out, *out.parents) if not place.exists()]
    require_same(out, plan)
    new = not path.exists()
    write_atomically(path, (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode())
    try:
        yield
    except UserError:
        if new and not (out / "pieces").exists():
            path.unlink()
            for place in fresh:
                place.rmdir()
        raise


def _is_done(out: Path, plan: Plan, piece: Piece, request: EvaluateRequest) -> bool:
    """Whether the piece's rows are there as they were written, and pictures where wanted."""
    try:
        record = read_object(_place(out, piece).with_suffix(".json"))
    except UserError:
        return False
    files = record.get("files")
    if record.get("plan") != _name(plan, request.device) or not isinstance(files, dict):
        return False
    pictures = _named(plan, piece) if request.save else []
    names = [str(_place(Path(), piece)), *(name for name, _ in pictures)]
    return files.keys() >= {*names} and not changed(out, {name: files[name] for name in names})


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
    used += [("scorer", name) for name in plan.scorers]
    return registry.plugins(used)


def _side_by_side(tasks: Sequence[Task], jobs: int, done: Callable[[Task], None]) -> None:
    def ended(task: Task, found: End | Died) -> bool:
        end = died(found.code, SMALLER) if isinstance(found, Died) else found
        if end.problem is not None:
            print(end.trace, end="", file=sys.stderr)
            raise end.problem
        done(task)
        return True

    side_by_side(_attempt, tasks, jobs, ended)


def _attempt(task: Task, tell: Callable[[Any], None]) -> End:
    return attempt(lambda: _do(*task), SMALLER)


def _do(plan: Plan, piece: Piece, out: Path, request: EvaluateRequest) -> None:
    """Write the piece's files, then their digests: without those it is not done."""
    first, sampler = piece
    files: dict[str, bytes] = {}
    if plan.files:
        rows = _score_pictures(plan, slice(first, first + PIECE), request.device)
    else:
        rows, pictures = _draw_and_score(plan, first, sampler, request.device, request.jobs)
        if request.save:
            named = zip(_named(plan, piece), pictures, strict=True)
            files = {name: png_bytes(picture) for (name, _), picture in named}
    files[str(_place(Path(), piece))] = csv_bytes(rows)
    for name, data in files.items():
        write_atomically(out / name, data)
    digests = {name: sha256(data).hexdigest() for name, data in files.items()}
    record = {"plan": _name(plan, request.device), "files": digests}
    write_atomically(_place(out, piece).with_suffix(".json"), json.dumps(record).encode())


@cache
def _scorer(name: str, weights: str, device: str) -> Any:
    from d3po_bench.machine import device_of
    from eval.golden import checked_scorer

    return checked_scorer(name, device_of(device), weights)


def _scorers(plan: Plan, device: str) -> dict[str, Any]:
    texts = {registry.name_of("scorer", text): text for text in plan.scorers}
    found = {name: _scorer(text, plan.weights, device) for name, text in texts.items()}
    if plan.files:
        _require_alone(found)
    return found


def _require_alone(scorers: Mapping[str, Any]) -> None:
    """Refuse scorers that compare pictures: those of a folder are scored one by one.

    Raises:
        UserError: naming them.
    """
    if found := [name for name, scorer in scorers.items() if getattr(scorer, "compares", False)]:
        raise UserError(
            f"{', '.join(found)} would say nothing: pictures of a folder are scored one at a "
            "time, and it compares those of a prompt. Leave it out of --scorers."
        )


@cache
def _model(plan: Plan, device: str) -> Model:
    import torch

    from d3po_bench.machine import device_of
    from d3po_bench.models.adapters import DiffusersModel, Training
    from d3po_bench.models.sources import load, model_source, threads_of
    from d3po_bench.models.text_encoders import require_short

    source = model_source(plan.model)
    torch.set_num_threads(threads_of(source))
    training = Training(dtype=plan.dtype, full=plan.full, long_prompts=plan.long_prompts)
    model = load(source, device_of(device), training)
    if isinstance(model, DiffusersModel) and plan.long_prompts == "refuse":
        require_short(model.parts, model.TOKENS, plan.prompts)  # all, before any is drawn
    if plan.adapter:
        model.load_saved(Path(plan.adapter))
    return model


@cache
def _batches(plan: Plan, device: str, jobs: int) -> tuple[int, int]:
    """How much is drawn at a time: on a card what fits its share of the memory, as for a run."""
    import torch

    from d3po_bench.config import FEEDBACK, Execution, RunConfig
    from d3po_bench.training.sizes import settled
    from d3po_bench.training.trainer import compute_as

    model = _model(plan, device)
    config = RunConfig(
        method="ddpo", objective=FEEDBACK, model=plan.model, guidance=plan.guidance,
        sampling_steps=plan.steps, prompts_per_round=PIECE, images_per_prompt=plan.images,
        dtype=plan.dtype, full=plan.full, long_prompts=plan.long_prompts,
    )  # fmt: skip
    shared = jobs > 1 and model.device.type == "cuda"
    total = torch.cuda.mem_get_info(model.device)[1] / 1e9 if shared else 0
    execution = settled(Execution(memory=total / jobs), config, model, {}, lambda note: None)
    compute_as(model, config, execution)
    return execution.sample_batch, execution.decode_batch


def _draw_and_score(
    plan: Plan, first: int, sampler: str, device: str, jobs: int
) -> tuple[list[Row], Tensor]:
    """The rows of a piece, and its pictures [N, 3, h, w] uint8."""
    from d3po_bench.training.tools import EvaluationSet
    from eval.measure import evaluate

    batch, decode_batch = _batches(plan, device, jobs)
    what = EvaluationSet(
        prompts=plan.prompts[first : first + PIECE], images=plan.images, steps=plan.steps,
        guidance=plan.guidance, sampler=plan.sampler, eta=plan.eta, first=first,
        timestep_spacing=plan.timestep_spacing, samplers=(sampler,), batch=batch,
        decode_batch=decode_batch, untrained=not plan.adapter,
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
