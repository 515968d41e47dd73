"""Learn from pictures that people have judged and that no round of ours drew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from d3po_bench import registry
from d3po_bench.config import RunConfig, least_images, method_of
from d3po_bench.diffusion.sampling import needs_chain
from d3po_bench.errors import UserError
from d3po_bench.experience import dataset
from d3po_bench.experience.dataset import Dataset, Group, Table
from d3po_bench.experience.judged import Judged
from d3po_bench.feedback.agreement import Floats, read_label_files
from d3po_bench.feedback.questions import Judged as JudgedAs
from d3po_bench.feedback.rounds import FILE, SAMPLING, Round
from d3po_bench.feedback.store import open_labels
from d3po_bench.feedback.training import (
    ONE_BY_ONE,
    Learnable,
    TrainRequest,
    configured,
    data_of,
)
from d3po_bench.feedback.votes import effective_votes, exported, scores_of

MODEL = "tiny"
"""Where none is asked for."""

NO_VOTES = "Nobody has voted on the round in {}. Ask for votes with `d3po-bench feedback serve`."


@dataclass(frozen=True)
class Existing:
    """Judged pictures from elsewhere, as a method takes them; implements `Learnable`."""

    folder: Path
    dataset: Dataset
    judged: JudgedAs

    @property
    def scores(self) -> Tensor:
        """[P, K]; larger is better."""
        return self.dataset.scores

    @property
    def content(self) -> str:
        """Names what was judged."""
        return self.dataset.content

    @property
    def facts(self) -> dict[str, Any]:
        """The next round may be drawn from what was learned; it is the first that is drawn."""
        return {"round": {"number": 0}, "data": str(self.folder)}

    def decided(self, request: TrainRequest) -> dict[str, Any]:
        """What is fixed before the preset: model, seed, and pictures of a group."""
        return {
            "model": request.model or MODEL,
            "seed": request.seed or 0,
            "images_per_prompt": self.scores.shape[1],
        }

    def defaults(self, method: str) -> dict[str, Any]:
        """Options of a method that differ from a preset's."""
        return _defaults(self.judged, method)

    def experience(self, config: RunConfig) -> Judged:
        """It, as what a run learns from."""
        return Judged(
            drawn=self.dataset, scores=self.scores, seed=config.seed, initial=None,
            prompts_per_round=config.prompts_per_round,
        )  # fmt: skip


def learnable(
    place: Path,
    request: TrainRequest,
    labels: str | None = None,
    label_files: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Learnable:
    """What `feedback train` was given: a round, of our own pictures or others, or a table.

    Args:
        place: the folder of a round, or a file.
        request: whose method decides which rows there are.
        labels: URL of a round's votes; None for those in its folder.
        label_files: folder of the published code's label files, in place of votes.
        say: hears of rows of label files, and of prompts, that are left out.

    Raises:
        UserError: it is none of them, or the method cannot learn from it.
    """
    _require_there(place)
    if place.is_file():
        if labels or label_files:
            raise UserError(f"{place} holds its own judgements. Leave out --labels.")
        table = dataset.read(place, request.pictures, request.question)
        return _taken(place, table.groups, table.judged, table.content, request, table.parquet)
    if request.pictures:
        raise UserError(f"{place} is a folder, which has its own pictures. Leave out --pictures.")
    asked = request.question
    scores = read_label_files(label_files, say) if label_files else scores_of(place, labels, asked)
    if (place / SAMPLING).exists() or not (place / FILE).exists():
        return data_of(place, scores, asked, say)
    round_ = Round.read(place)
    judged = round_.part(asked).question.judged
    groups = _judged(place, round_, scores, judged)
    return _taken(place, groups, judged, round_.content, request)


def judgements(
    place: Path, labels: str | None = None, pictures: Path | None = None,
    question: str | None = None,
) -> Table:  # fmt: skip
    """What people said of pictures, in a round or in a table, and who said it.

    Args:
        place: the folder of a round, or a file.
        labels: URL of a round's votes; None for those in its folder.
        pictures: where the pictures' paths in a table begin; None for the table's own folder.
        question: whose answers; None where one question was asked.

    Raises:
        UserError: it is neither, nobody has voted, or a row is malformed.
    """
    _require_there(place)
    if place.is_file():
        if labels:
            raise UserError(f"{place} holds its own judgements. Leave out --labels.")
        return dataset.read(place, pictures, question)
    if pictures:
        raise UserError(f"{place} is a folder, which has its own pictures. Leave out --pictures.")
    with open_labels(place, labels) as store:
        rows = exported(store, effective_votes(store))
        if not rows:
            raise UserError(NO_VOTES.format(place))
        content = store.round.content
        return dataset.of_rows(place, iter(rows), place, content, question=question)


def _require_there(place: Path) -> None:
    if not place.exists():
        raise UserError(
            f"{place} is not there. Give the folder of a round, or a table of judged pictures."
        )


def _defaults(judged: JudgedAs, method: str) -> dict[str, Any]:
    if method == "diffusion_dpo":
        return {"skip_ties": True}
    return ONE_BY_ONE.get(method, {}) if judged != "pairs" else {}


def _judged(folder: Path, round_: Round, scores: Floats, judged: JudgedAs) -> list[Group]:
    """The pictures of a round's prompts that somebody judged."""
    if judged == "tags":
        scores = 2 * scores + 1  # 0 and -1, as votes are averaged, become liked and disliked
    groups = []
    for group, row in zip(round_.groups, scores.tolist(), strict=False):
        known = [
            (folder / n, score)
            for n, score in zip(group.images, row, strict=True)
            if isfinite(score)
        ]
        if known:
            pictures, values = zip(*known, strict=True)
            groups.append(Group(group.prompt, pictures, values))
    return groups


def _taken(
    place: Path, groups: list[Group], judged: JudgedAs, content: str, request: TrainRequest,
    parquet: Path | None = None,
) -> Existing:  # fmt: skip
    """In the rows that the method takes: pairs, or pictures one by one.

    Raises:
        UserError: it takes neither.
    """
    method = registry.method(request.method)
    if needs_chain(method):
        able = [n for n in registry.names("method") if not needs_chain(registry.method(n))]
        raise UserError(
            f"{request.method} learns from every denoising step of an image, and the pictures in "
            f"{place} came finished. Use --method {', '.join(able[:-1])} or {able[-1]}."
        )
    # Whether a method compares may depend on its options.
    config, _ = configured(request, partial(_defaults, judged), model=request.model or MODEL)
    compares = judged == "pairs" or least_images(method_of(config)) > 1
    rows = dataset.pairs_of(groups, judged) if compares else dataset.singles_of(groups)
    if not rows:
        raise UserError(
            f"No two pictures of a prompt in {place} were judged differently, so {request.method} "
            "has nothing to compare. Use --method kto or preferred_images with liked=above_value."
            if groups
            else NO_VOTES.format(place)
        )
    return Existing(place, Dataset(content, rows, parquet), judged)
