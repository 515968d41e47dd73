"""A round from its images to its votes, as the commands of `d3po-bench feedback` ask for it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.config import FEEDBACK, Execution, make
from d3po_bench.errors import UserError
from d3po_bench.feedback import agreement, pictures, raters, sampling, training
from d3po_bench.feedback.labels import LabelStore, Plan, require_labels
from d3po_bench.feedback.rounds import Kind, Pool, Question, Round, Vote
from d3po_bench.feedback.sampling import FIXED, Before, Sampling
from d3po_bench.models.sources import model_source
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, write_atomically


@dataclass(frozen=True, kw_only=True)
class New:
    """What `feedback new` was asked for."""

    judged: tuple[Kind, Question]
    prompts: str | None
    count: int | None = None
    images: int | None = None
    before: Path | None = None
    pictures: Sequence[Path] = ()
    model: str = "tiny"
    preset: str | None = None
    seed: int = 0
    settings: Mapping[str, str]
    device: str = "auto"


def new(folder: Path, request: New, report: Callable[[float], None] = lambda share: None) -> Round:
    """Make a round.

    Raises:
        UserError: bad input.
    """
    if request.pictures:
        return pictures.take(folder, request.pictures, request.judged)
    if request.prompts is None:
        raise UserError(
            "Expected --prompts with a list or a file, or --pictures, got neither. Give one, such "
            "as --prompts animals."
        )
    before = Before.read(request.before) if request.before else None
    settings, execution = _settings(request, before)
    kind = request.judged[0]
    images = request.images or (7 if kind == "tags" else 2)
    if kind == "pairs" and images != 2:
        raise UserError(f"Expected 2 images for pairs, got {images}. Leave --images out.")
    number = before.sampling.number + 1 if before else 0
    seed = before.sampling.seed if before else request.seed
    known = read_prompts(request.prompts)
    plan = Sampling(
        settings=settings, seed=seed, number=number, images=images,
        adapter=training.adapter_of(before.weights) if before else "",
        prompts=tuple(sampling.chosen_prompts(known, request.count, seed, number)),
        block=max(1, execution.sample_batch // images),
    )  # fmt: skip
    weights = before.weights if before else None
    return sampling.draw(folder, plan, request.judged, weights, execution, report)


def _settings(request: New, before: Before | None) -> tuple[dict[str, Any], Execution]:
    """The fields that a round decides, and how it is drawn."""
    model = before.sampling.settings["model"] if before else request.model
    preset = request.preset or model_source(model).preset
    config, execution = make("d3po", FEEDBACK, preset, request.settings, model=model)
    execution = replace(execution, device=request.device)
    changed = next((key for key in request.settings if key in FIXED), None)
    if before is None:
        return {name: getattr(config, name) for name in FIXED}, execution
    if changed is not None:
        raise UserError(
            f"Expected the settings of the rounds before, got --set {changed}=... with --from. "
            "Leave it out."
        )
    return dict(before.sampling.settings), execution


# ---- votes


@contextlib.contextmanager
def votes_of(
    folder: Path, labels: str | None, plan: Plan | None = None, *, new: bool = False
) -> Iterator[LabelStore]:
    """The labels of a round.

    Args:
        folder: of the round.
        labels: URL of the labels; None for those in the folder.
        plan: how items are handed out.
        new: make them if need be; else `labels` must be there, and a folder without has no votes.

    Raises:
        UserError: no such round, no such labels, or labels of another round.
    """
    from d3po_bench.feedback.server import LABELS, default_url

    if labels and not new:
        require_labels(labels)
    made = new or (folder / LABELS).exists()
    url = labels or (default_url(folder) if made else "sqlite://")
    with LabelStore(url, Round.read(folder), plan) as store:
        yield store


def checked(folder: Path) -> Round:
    """A round whose pictures are all as they were made.

    Raises:
        UserError: naming the first that is not.
    """
    round_ = Round.read(folder)
    if (folder / sampling.FILES).exists():
        sampling.require_files(folder, within="images")
    return round_


def status(folder: Path, labels: str | None, plan: Plan) -> Iterator[str]:
    """How far a round is, and how far its votes can be trusted.

    Raises:
        UserError: the round or its labels are damaged.
    """
    checked(folder)
    with votes_of(folder, labels, plan) as store:
        progress, votes = store.status(), store.effective_votes()
        facts = agreement.summary(store.round, votes)
        yield f"{progress.done} of {progress.done + progress.left} items complete"
        for name, value in facts.items():
            yield f"{name.replace('_', ' ')}: {_number(value)}"
        for q in agreement.quality(store.round, votes):
            yield (
                f"{q.rater}: {q.votes} votes, {q.seconds:.1f} s each, gold right "
                f"{_number(q.gold.value)}, same again {_number(q.consistent.value)}, with others "
                f"{_number(q.with_others)}"
            )


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often a source of a comparison is the first choice."""

    source: str
    """Folder of pictures, as `feedback new` was given it."""
    share: float
    """0 to 1; those of all sources add to 1."""
    low: float
    high: float
    """Ends of its 95 % interval over prompts."""
    raters: Pool


def choices(folder: Path, labels: str | None) -> list[Share]:
    """How often each source of a comparison is the first choice.

    Raises:
        UserError: the round compares nothing, or nobody has compared all pictures of a prompt.
    """
    sources = pictures.sources_of(folder)
    with votes_of(folder, labels) as store:
        votes = store.effective_votes()
        found = pictures.first_choices(store.round, votes, len(sources))
    if not found:
        raise UserError(
            f"Expected a rater who compared all pictures of a prompt in {folder}, got none. Let "
            "them finish: d3po-bench feedback serve."
        )
    pool = raters.pool_of(vote.rater for vote in votes)
    table = np.array(list(found.values()))
    return [_share(source, column, pool) for source, column in zip(sources, table.T, strict=True)]


def _share(source: str, column: agreement.Floats, pool: Pool) -> Share:
    low, high = bootstrap(column)
    return Share(source=source, share=float(column.mean()), low=low, high=high, raters=pool)


def write_choices(path: Path, found: Sequence[Share]) -> None:
    """Write shares as CSV, one a row, rounded to 6 digits; `d3po-bench table1` reads them.

    Sources are said from the file's folder, so that it may be published or moved with them.
    """
    rows = [
        {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(share).items()}
        | {"source": os.path.relpath(share.source, path.parent)}
        for share in found
    ]
    write_atomically(path, csv_bytes(rows))


def bootstrap(values: agreement.Floats, resamples: int = 9999) -> tuple[float, float]:
    """Percentile 95 % interval of the mean of [P] values, from a fixed seed."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def export(folder: Path, labels: str | None, out: Path) -> int:
    """Write a round's votes, one a row, as CSV or JSON by the name of `out`; returns their number.

    Raises:
        UserError: the round or its labels are damaged, or `out` cannot be written.
    """
    round_ = checked(folder)
    with votes_of(folder, labels) as store:
        rows = list(_rows(round_, store.effective_votes()))
    if out.suffix == ".json":
        data = (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    else:
        data = csv_bytes([_flat(row) for row in rows])
    write_atomically(out, data)
    return len(rows)


def _rows(round_: Round, votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    prompts = {item.id: item.prompt for item in round_.items}
    for vote in votes:
        yield {"prompt": prompts[vote.item], **asdict(vote)}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Lists as numbers with spaces between them."""
    return {
        name: " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for name, value in row.items()
    }


def data(
    folder: Path, labels: str | None, label_files: Path | None,
    say: Callable[[str], None] = lambda line: None,
) -> training.Data:  # fmt: skip
    """What a round's votes, or label files of the published code, give to learn from.

    Raises:
        UserError: they are of another round, or there are none.
    """
    if label_files is not None:
        return training.data_of(folder, agreement.read_label_files(label_files, say))
    with votes_of(folder, labels) as store:
        return training.data_of(folder, agreement.scores(store.round, store.effective_votes()))


def simulate(folder: Path, labels: str | None, pool: Sequence[raters.Annotator], seed: int) -> int:
    """Let a pool of simulated raters judge every item; returns the number of votes."""
    plan = Plan(votes_per_item=len(pool), gold_every=0, repeat_every=0)
    checked(folder)
    with votes_of(folder, labels, plan, new=True) as store:
        return raters.vote(store, folder, pool, seed)
