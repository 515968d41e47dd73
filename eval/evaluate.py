"""`d3po-bench evaluate`: a run, a LoRA, a model or a folder of pictures, scored image by image.

Prompts and noise are fixed, so that two evaluations can be paired. The work is cut into pieces of
a few prompts; every piece is a file once it is done, so that a killed evaluation goes on, and any
number of processes ends with the same bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_bench import registry
from d3po_bench.errors import RunError, UserError
from d3po_bench.prompts import read_pictures, read_prompts
from d3po_bench.reading import read_config
from d3po_bench.store import csv_bytes, environment, now, png_bytes, read_csv, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = "captions-held-out"
"""The list of prompts that no run may have learnt from."""

FETCHED = "prompts-image-reward"
"""The prompts that Stable Diffusion is asked for, among the weights."""

PIECE = 8
"""Prompts in a piece."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the numbers of an evaluation."""

    model: str
    """Name or folder of the base model, or the folder of the pictures."""
    adapter: str
    """Folder of a LoRA or a trained UNet; empty for the base model itself."""
    prompts: tuple[str, ...]
    content: str = ""
    """What names the files of the model and the adapter, or the pictures."""
    files: tuple[str, ...] = ()
    """The picture of each prompt, where there are pictures to score instead of a model."""
    images: int = 1
    steps: int = 20
    guidance: float = 5.0
    scorers: tuple[str, ...] = ()
    weights: str = "official"
    """Which weights scorers have that do not say so themselves."""
    samplers: tuple[str, ...] = ("eta1", "eta0")


Piece = tuple[int, str]
"""First prompt, and sampler ("" for pictures)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    target: Path
    scorers: tuple[str, ...]
    model: str | None
    prompts: str | None
    count: int | None
    images: int
    steps: int | None
    guidance: float | None
    device: str
    jobs: int
    out: Path | None
    save: bool = False
    """Keep the pictures that were drawn, too."""


Told = Callable[[int, int], None]
"""Called with pieces done and pieces in all."""


def run(
    request: Request,
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
    out = request.out or _default_out(request.target)
    # Absent weights are found before anything is drawn.
    unchecked = golden.unchecked(_scorers(plan, request.device))
    pieces = list(_pieces(plan))
    with _taken(out, plan):
        if unchecked:
            note(golden.note(unchecked))
        rest = [p for p in pieces if not _is_done(out, plan, p, request.save)]
        told(len(pieces) - len(rest), len(pieces))
        done = _in_turn if min(request.jobs, len(rest)) <= 1 else _side_by_side
        for count in done(plan, rest, out, request):
            told(len(pieces) - len(rest) + count, len(pieces))
    _finish(out, plan, pieces, request)
    return out


# ---- what to evaluate


def planned(request: Request) -> Plan:
    """What a request means, after looking at what its target is.

    Raises:
        UserError: it is nothing that can be evaluated.
    """
    target = request.target
    if (target / "metadata.csv").is_file():
        return _pictures(request)
    if (target / "config.json").is_file() and (target / "lora").is_dir():
        return _of_run(request)
    if (target / "config.json").is_file() and (target / "metrics.jsonl").is_file():
        raise UserError(
            f"Expected a finished run in {target}, got one without lora/. Run its command again: "
            "it goes on from the last checkpoint."
        )
    if (target / "pytorch_lora_weights.safetensors").is_file() or _is_trained_unet(target):
        return _of_model(request, request.model or "tiny", str(target), {})
    _require_no_other_model(request, str(target))
    return _of_model(request, str(target), "", {})


def _require_no_other_model(request: Request, model: str) -> None:
    """Refuse a --model that would be ignored.

    Raises:
        UserError: naming both.
    """
    if request.model not in (None, model):
        raise UserError(
            f"Expected --model only beside a LoRA or pictures, got {request.model} for "
            f"{request.target}, whose model is {model}. Leave --model out."
        )


def _is_trained_unet(target: Path) -> bool:
    return (target / "unet").is_dir() and not (target / "model_index.json").is_file()


def _of_run(request: Request) -> Plan:
    config = read_config(request.target)
    _require_no_other_model(request, config["model"])
    plan = _of_model(request, config["model"], str(request.target / "lora"), config)
    if (request.prompts or _default_prompts(plan.model, config)) == HELD_OUT:
        _require_unseen(plan, config, request.target)
    return plan


def _require_unseen(plan: Plan, config: Mapping[str, Any], run: Path) -> None:
    """Refuse to call prompts held-out that the run has learnt from.

    Raises:
        UserError: naming one.
    """
    learnt = read_prompts(config.get("prompts") or registry.objective(config["objective"]).prompts)
    seen = sorted(set(plan.prompts) & set(learnt))
    if seen:
        raise UserError(
            f"Expected held-out prompts that the run in {run} did not learn from, got "
            f"{seen[0]!r} and {len(seen) - 1} more that it did. Give others with --prompts."
        )


def _of_model(request: Request, model: str, adapter: str, config: Mapping[str, Any]) -> Plan:
    from d3po_bench.models.stable_diffusion import content, fingerprint
    from d3po_bench.train import model_source

    source = model_source(model)
    prompts = read_prompts(request.prompts or _default_prompts(model, config))
    learnt = f" + {content(Path(adapter))[:12]}" if adapter else ""
    return Plan(
        model=model,
        adapter=adapter,
        content=fingerprint(source) + learnt,
        prompts=tuple(_chosen(prompts, request.count)),
        images=request.images,
        steps=request.steps or config.get("sampling_steps", 20),
        guidance=config.get("guidance", 5.0) if request.guidance is None else request.guidance,
        scorers=_checked(request.scorers),
        weights=source.scorers,
    )


def _default_prompts(model: str, config: Mapping[str, Any]) -> str:
    """Held-out captions for the embedded model, else what a run was trained on.

    Stable Diffusion has the paper's alignment prompts, which are fetched by checksum.
    """
    if model == "tiny":
        return HELD_OUT
    if config:
        return str(config["prompts"] or registry.objective(config["objective"]).prompts)
    if model == "sd15":
        from eval import downloads

        return str(downloads.find(FETCHED)[0])
    raise UserError(
        "Expected --prompts with a list or a file, got none, and only a run or the embedded "
        "model has prompts of its own. Give a file with one prompt a line."
    )


def _chosen(prompts: list[str], count: int | None) -> list[str]:
    from eval.evaluator import spread

    return spread(prompts, count) if count else prompts


def _checked(scorers: Sequence[str]) -> tuple[str, ...]:
    for name in scorers:
        registry.require_scorer(name)
    return tuple(dict.fromkeys(scorers))


def _pictures(request: Request) -> Plan:
    """A folder of pictures with metadata.csv."""
    if request.save:
        raise UserError(
            f"Expected a model to draw pictures for --save, got pictures in {request.target}. "
            "Leave --save out."
        )
    files, prompts = zip(*read_pictures(request.target), strict=True)
    return Plan(
        model=str(request.target), adapter="", prompts=prompts, files=files,
        content=_digest(request.target, files), scorers=_checked(request.scorers), samplers=("",),
        weights="tiny" if request.model == "tiny" else "official",
    )  # fmt: skip


def _digest(folder: Path, files: Sequence[str]) -> str:
    """Twelve hex digits that name the bytes of pictures.

    Raises:
        OSError: one cannot be read.
    """
    from d3po_bench.digests import sha256_once
    from d3po_bench.machine import digest

    return digest(" ".join(sha256_once(folder / name) for name in files))


# ---- the folder


def _default_out(target: Path) -> Path:
    inside = (target / "config.json").is_file() or (target / "metadata.csv").is_file()
    return target / "evaluation" if inside else Path("evaluations") / target.name


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
            f"Expected {out} to be empty or to hold this evaluation, got the plan.json of another, "
            "or of other weights or pictures. Give another --out, or remove that folder."
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


def _pieces(plan: Plan) -> Iterator[Piece]:
    for sampler in plan.samplers:
        for first in range(0, len(plan.prompts), PIECE):
            yield first, sampler


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


def _finish(out: Path, plan: Plan, pieces: Sequence[Piece], request: Request) -> None:
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
            f"Expected all pieces in {out} to be scored with the same weights, got {found[0]} and "
            f"{found[1]}. Remove that folder and run the command again."
        )


# ---- the work


def _in_turn(plan: Plan, pieces: list[Piece], out: Path, request: Request) -> Iterator[int]:
    for count, piece in enumerate(pieces):
        _do(plan, piece, out, request)
        yield count + 1


def _side_by_side(plan: Plan, pieces: list[Piece], out: Path, request: Request) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(request.jobs, context) as pool:
        futures = [pool.submit(_do, plan, piece, out, request) for piece in pieces]
        for count, future in enumerate(as_completed(futures)):
            try:
                future.result()
            except BrokenProcessPool as problem:
                raise RunError(
                    "Expected worker processes that finish, got one that was killed (out of "
                    "memory?). Run the same command again: what is scored is kept. If memory is "
                    "short, add --jobs 1."
                ) from problem
            yield count + 1


def _do(plan: Plan, piece: Piece, out: Path, request: Request) -> None:
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
    from d3po_bench.train import device_of

    return registry.scorer(name, device_of(device), weights)


def _scorers(plan: Plan, device: str) -> dict[str, Any]:
    return {name: _scorer(name, plan.weights, device) for name in plan.scorers}


@cache
def _model(plan: Plan, device: str) -> Any:
    import torch

    from d3po_bench.models.stable_diffusion import Training, load
    from d3po_bench.train import device_of, model_source

    if plan.model == "tiny":
        torch.set_num_threads(1)
    model = load(model_source(plan.model), device_of(device), Training())
    if plan.adapter:
        model.load_saved(Path(plan.adapter))
    return model


def _draw_and_score(plan: Plan, first: int, sampler: str, device: str) -> tuple[list[Row], Tensor]:
    """The rows of a piece, and its pictures [N, 3, h, w] uint8."""
    from eval.evaluator import EvaluationSet, evaluate

    what = EvaluationSet(
        prompts=plan.prompts[first : first + PIECE], images=plan.images, steps=plan.steps,
        guidance=plan.guidance, first=first, samplers=(sampler,),
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
    from eval.evaluator import cell, scored

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
    from PIL import Image

    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as problem:
        raise UserError(
            f"Expected a picture in {path}, got {problem}. Save it again, or take its line out of "
            "metadata.csv."
        ) from problem
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


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
