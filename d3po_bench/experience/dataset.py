"""Preference data that exist already, as experience: tables of pictures that people have judged.

A table is read whole before anything is learned; pictures are opened when a round needs them, so
that the number of rows costs little memory.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from d3po_bench.digests import sha256_of
from d3po_bench.errors import UserError, install
from d3po_bench.experience.layouts import LAYOUTS, Judged, Layout, Mark, of_question
from d3po_bench.pictures import open_picture
from d3po_bench.prompts.tables import SUFFIXES, rows_of
from d3po_bench.types import Model

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class EncodesPictures(Protocol):
    """A model that can learn from pictures that it did not draw."""

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents [N, ...] of pictures [N, 3, h, w] uint8 of the size that `decode` gives."""


@dataclass(frozen=True)
class InParquet:
    """A picture whose bytes are in a row of a Parquet file."""

    row: int
    column: str


Picture = Path | InParquet


@dataclass(frozen=True)
class Group:
    """Pictures of a prompt that were judged side by side."""

    prompt: str
    pictures: tuple[Picture, ...]
    scores: tuple[float, ...]
    """Of each picture the mean of what all said."""
    said: tuple[tuple[float, ...], ...] = ()
    """By each rater the scores of all pictures; NaN of one that was not judged."""


@dataclass(frozen=True)
class Dataset:
    """P prompts with K pictures each; implements `judged.Stored`."""

    content: str
    """Names what was judged."""
    groups: Sequence[Group]
    """Of K pictures each."""
    parquet: Path | None = None

    @property
    def image_prompts(self) -> Sequence[str]:
        """The prompt of each group."""
        return [group.prompt for group in self.groups]

    @property
    def scores(self) -> Tensor:
        """[P, K]."""
        return torch.tensor([group.scores for group in self.groups])

    def stored(self, rows: Tensor, model: Model) -> dict[str, Tensor]:
        """`latents` of some groups, final ones alone, and `means` of no step.

        Raises:
            UserError: a picture is damaged, or the model's family cannot encode pictures.
        """
        if not isinstance(model, EncodesPictures):
            raise UserError(
                f"{type(model).__name__} has no encode_pictures, so it cannot learn from pictures "
                "that it did not draw. Add that to its family, or use another --model."
            )
        shape = model.latent_shape
        height, width = model.decode(torch.zeros(1, *shape, device=model.device)).shape[2:]
        groups = [self.groups[i] for i in rows.tolist()]
        pixels = [
            _pixels(picture, self.parquet, width, height) for g in groups for picture in g.pictures
        ]
        latents = model.encode_pictures(torch.stack(pixels)).cpu()
        whole = latents.view(len(groups), -1, 1, *shape)
        return {"latents": whole, "means": whole[:, :, :0]}


class _Named(io.BytesIO):
    """Bytes that an error calls by their place."""

    name = ""

    def __str__(self) -> str:
        return self.name


def whole(picture: Picture, parquet: Path | None) -> Image.Image:
    """The picture, in its own size.

    Raises:
        UserError: it is damaged, or of a format that is not opened.
    """
    file: Path | _Named
    if isinstance(picture, InParquet):
        file = _Named(_bytes_in(parquet or Path(), picture))
        file.name = f"{picture.column} in row {picture.row + 1} of {parquet}"
    else:
        file = picture
    return open_picture(file)


def _pixels(picture: Picture, parquet: Path | None, width: int, height: int) -> Tensor:
    """The picture's middle in the model's size, [3, h, w] uint8."""
    import numpy as np
    from PIL import Image, ImageOps

    found = ImageOps.fit(whole(picture, parquet), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(found)).permute(2, 0, 1)


# ---- groups of the size that a method takes


def pairs_of(groups: Iterable[Group], judged: Judged) -> list[Group]:
    """Every two pictures of a group; of tags only one that is liked beside one that is not."""
    return [
        Group(g.prompt, (g.pictures[i], g.pictures[j]), (g.scores[i], g.scores[j]))
        for g in groups
        for i, j in combinations(range(len(g.pictures)), 2)
        if judged != "tags" or g.scores[i] * g.scores[j] < 0
    ]


def singles_of(groups: Iterable[Group]) -> list[Group]:
    """Every picture by itself."""
    return [
        Group(g.prompt, (picture,), (score,))
        for g in groups
        for picture, score in zip(g.pictures, g.scores, strict=True)
    ]


# ---- reading


@dataclass(frozen=True)
class Table:
    """What a file of preference data says."""

    layout: str
    judged: Judged
    groups: list[Group]
    content: str
    parquet: Path | None


def read(path: Path, folder: Path | None = None, question: str | None = None) -> Table:
    """Read a table whole; its pictures are looked for, but not opened.

    Args:
        path: .csv, .tsv, .json, .jsonl or .parquet, in one of `LAYOUTS`.
        folder: where its pictures' paths begin; None for the table's own folder.
        question: of this page's export, whose answers to take; None where it has one question.

    Raises:
        UserError: no layout fits, a row is malformed, or a picture is missing, naming the row.
    """
    kind, folder = path.suffix.lower(), folder or path.parent
    if kind not in (*SUFFIXES, ".parquet"):
        known = ", ".join((*SUFFIXES, ".parquet"))
        raise UserError(f"{path} is no table of preference data ({known}). Give another file.")
    try:
        rows = _parquet(path) if kind == ".parquet" else iter(_with_prompts(rows_of(path), folder))
        parquet = path if kind == ".parquet" else None
        return of_rows(path, rows, folder, sha256_of(path)[:12], parquet, question)
    except OSError as problem:
        raise UserError(f"Cannot read {path}: {problem.strerror or problem}.") from problem


def of_rows(
    path: Path, rows: Iterator[Any], folder: Path, content: str, parquet: Path | None = None,
    question: str | None = None,
) -> Table:  # fmt: skip
    """What rows say.

    Args:
        path: where they are from, for people.
        rows: in one of `LAYOUTS`.
        folder: where their pictures' paths begin.
        content: names what was judged.
        parquet: the file that holds their pictures, if one does.
        question: as in `read`.

    Raises:
        UserError: no layout fits, a row is malformed, or a picture is missing, naming the row.
    """
    rows = of_question(path, rows, question)
    first = next(rows, None)
    layout = _layout(path, first)
    groups = _grouped(_marks(path, folder, layout, _again(first, rows)))
    if not groups:
        raise UserError(f"{path} has no row that says anything of a picture. Give another file.")
    judged = layout.judged(first)  # type: ignore[arg-type]  # a layout fits it
    return Table(layout.name, judged, groups, content, parquet)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _with_prompts(rows: list[Any], folder: Path) -> list[Any]:
    """Rows as dictionaries: label files of the published code are lists of numbers alone.

    Their prompts are in prompt.json beside the folder images/, where each picture has a number.
    """
    if not rows or not isinstance(rows[0], list):
        return rows
    prompts = rows_of(folder / "prompt.json") if (folder / "prompt.json").exists() else []
    if len(prompts) < len(rows):
        raise UserError(
            f"Label files of the D3PO authors' code need prompt.json with {len(rows)} prompts "
            f"beside images/, and {folder} has {len(prompts) or 'none'}. Give that folder with "
            "--pictures."
        )
    places = [n * len(rows[0]) for n in range(len(rows))]
    both = zip(rows, prompts, places, strict=False)
    return [{"labels": labels, "prompt": prompt, "first": n} for labels, prompt, n in both]


def _layout(path: Path, first: Any) -> Layout:
    columns = {*first} if isinstance(first, dict) else set()
    for layout in LAYOUTS:
        if layout.columns <= columns:
            return layout
    there = f"columns {', '.join(map(str, columns))[:120]}" if columns else "no columns"
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise UserError(
        f"{path} has {there}, which is none of the layouts {known}. docs/human-feedback.md has the "
        "columns of each: rename those of the file."
    )


def _marks(
    path: Path, folder: Path, layout: Layout, rows: Iterator[Any]
) -> Iterator[tuple[int, Mark]]:
    """What each row says, with the row's number, from 0."""
    inside = folder.resolve()
    for number, row in enumerate(rows):
        try:
            for mark in layout.marks(row):
                place = _place(mark.picture, number, inside)
                yield number, mark._replace(picture=place)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            said = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise UserError(
                f"Row {number + 1} of {path} cannot be read as {layout.name}'s: {said}. Correct "
                "or remove it."
            ) from problem


def _place(picture: Any, number: int, folder: Path) -> Picture:
    """Where a picture is.

    Raises:
        ValueError: it is nowhere.
    """
    if isinstance(picture, InParquet):
        return InParquet(number, picture.column)
    if not isinstance(picture, str) or not picture.strip():
        raise ValueError(f"{ascii(picture)[:40]} names no picture")
    if "://" in picture:
        raise ValueError(f"{picture[:80]!a} is an address: save the picture and name its file")
    place = folder / picture
    if "\0" in picture or ".." in place.parts or not place.is_relative_to(folder):
        place = folder
    if not place.is_file():
        raise ValueError(
            f"{picture[:80]!a} is not a picture inside {folder} (--pictures gives another folder)"
        )
    return place


def _grouped(marks: Iterable[tuple[int, Mark]]) -> list[Group]:
    """Groups in the order of their first rows."""
    found: dict[str | int, tuple[str, dict[Picture, list[Mark]]]] = {}
    for number, mark in marks:
        _, pictures = found.setdefault(mark.key or number, (mark.prompt, {}))
        pictures.setdefault(mark.picture, []).append(mark)
    return [_group(prompt, pictures) for prompt, pictures in found.values()]


def _group(prompt: str, pictures: Mapping[Picture, list[Mark]]) -> Group:
    of_each = pictures.values()
    raters = dict.fromkeys(mark.rater for marks in of_each for mark in marks)
    said = [
        tuple(_mean(mark.score for mark in marks if mark.rater == rater) for marks in of_each)
        for rater in raters
    ]
    scores = tuple(_mean(mark.score for mark in marks) for marks in of_each)
    return Group(prompt, tuple(pictures), scores, tuple(said))


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


# ---- Parquet


def _arrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as problem:
        raise UserError(
            f"Parquet files need the extra `parquet`. Install it: {install('parquet')}."
        ) from problem
    return pyarrow.parquet


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a Parquet file, with an `InParquet` in place of a picture's bytes.

    These stay where they are: only which of them are there is asked.
    """
    table = _open(path)
    kinds = {field.name: str(field.type) for field in table.schema_arrow}
    binary = [n for n, k in kinds.items() if k.startswith(("binary", "large_binary", "struct<byt"))]
    plain = [name for name in kinds if name not in binary]
    number = 0
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group, columns=plain).to_pylist()
        there = {name: _present(table, group, name, len(rows)) for name in binary}
        for place, row in enumerate(rows):
            pictures = {n: InParquet(number, n) if has[place] else None for n, has in there.items()}
            yield {**row, **pictures}
            number += 1


def _present(table: Any, group: int, name: str, rows: int) -> Sequence[bool]:
    """Which rows of a group have bytes in a column; the file's own count of nulls saves reading."""
    facts = table.metadata.row_group(group)
    leaves = [facts.column(n) for n in range(facts.num_columns)]
    leaf = next(c for c in leaves if c.path_in_schema in (name, f"{name}.bytes"))
    if leaf.statistics and leaf.statistics.null_count == 0:
        return [True] * rows
    values = table.read_row_group(group, columns=[leaf.path_in_schema]).column(0).to_pylist()
    return [bool(v["bytes"] if isinstance(v, dict) else v) for v in values]


def _bytes_in(path: Path, picture: InParquet) -> bytes:
    """The bytes of one picture, of whose column one row group is read."""
    table, first = _open(path), 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if picture.row < first + rows:
            column = table.read_row_group(group, columns=[picture.column]).column(0)
            value = column[picture.row - first].as_py()
            found: bytes = value["bytes"] if isinstance(value, dict) else value
            return found
        first += rows
    raise UserError(f"{path} has changed since it was read. Run the command again.")


def _open(path: Path) -> Any:
    arrow = _arrow()
    try:
        return arrow.ParquetFile(path)
    except Exception as problem:  # ArrowInvalid and OSError, by the fault
        raise UserError(
            f"{path} cannot be read as Parquet: {problem}. Give another file."
        ) from problem
