"""Pictures before and after training, as a page holds them: inside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3po_bench.pictures import open_picture, opened
from d3po_bench.runs.files import readable
from eval.analysis.runs import Group, Run
from eval.figures.sheets import (
    CELL,
    COLUMNS,
    LAYOUT,
    Labels,
    folder_of,
    sampled_rounds,
    sheet_name,
)

if TYPE_CHECKING:
    from PIL import Image

SIDE = 128
"""Largest side of a picture on the page, in pixels; smaller ones keep their own."""

SHEETS = ("plots", "figures")
"""Folders, beside runs, in which `plot` may have left its sheets."""


@dataclass(frozen=True)
class Pair:
    """A prompt's picture by the model before training and after it, from the same noise."""

    prompt: str
    before: str
    after: str
    pixels: bool
    """Whether it is so small that its pixels shall stay visible."""


@dataclass(frozen=True)
class Pairs:
    """Of one run."""

    seed: int
    last: int
    """The round after which the later pictures were drawn."""
    sheet: str
    """The file that they were cut from; "" where the run has kept its own pictures."""
    pictures: Sequence[Pair]


def pairs_of(group: Group, runs: Sequence[Run], folders: Sequence[Path]) -> Pairs | None:
    """Pictures of the lowest seed that kept any, or else from a sheet of `plot`; None without.

    Args:
        group: of the runs.
        runs: by seed.
        folders: in which a folder of figures may be.

    Raises:
        UserError: a picture is damaged, or not of the run.
    """
    for run in runs:
        rounds = [n for n in sampled_rounds(run) if n in run.spent]
        if len(rounds) > 1:
            return Pairs(run.seed, rounds[-1], "", list(_kept(run, rounds)))
    labels = Labels(runs[0])  # of all seeds: they are evaluated on the same prompts
    places = (folder / name / sheet_name(group) for folder in folders for name in SHEETS)
    return next((found for p in places if p.is_file() and (found := _cut(p, labels))), None)


def _kept(run: Run, rounds: Sequence[int]) -> Iterator[Pair]:
    first, last = folder_of(run, rounds[0]), folder_of(run, rounds[-1])
    labels = Labels(run)
    names = [path.name for path in sorted(first.glob("*.png")) if (last / path.name).is_file()]
    for name in names[:COLUMNS]:
        pictures = [open_picture(folder / name) for folder in (first, last)]
        yield _pair(labels[name.removesuffix(".png")], *pictures)


def _cut(path: Path, labels: Mapping[str, str]) -> Pairs | None:
    """The first and last row of a sheet; None where it does not say where its pictures are."""
    with opened(path) as picture:
        written = picture.info.get(LAYOUT)
    if written is None:
        return None
    sheet = open_picture(path)
    with readable(path):
        found = json.loads(written)
        left, top, side, gap = (int(found[key]) for key in ("left", "top", "side", "gap"))
        rounds = [int(n) for n in found["rounds"]]
        prompts = [labels[str(name)] for name in found["prompts"]][:COLUMNS]
        rows = (top, top + (len(rounds) - 1) * (side + gap))
        columns = range(left, left + len(prompts) * (side + gap), side + gap)
        pictures = [_pair(prompt, *(_cell(sheet, x, y, side) for y in rows))
                    for prompt, x in zip(prompts, columns, strict=True)]  # fmt: skip
        return Pairs(int(found["seed"]), max(rounds), path.name, pictures)


def _cell(sheet: Image.Image, x: int, y: int, side: int) -> Image.Image:
    if min(x, y) < 0 or side < 1 or x + side > sheet.width or y + side > sheet.height:
        raise ValueError("its text names a picture outside of it")
    return sheet.crop((x, y, x + side, y + side))


def _pair(prompt: str, before: Image.Image, after: Image.Image) -> Pair:
    pixels = max(before.size) <= CELL[0]
    return Pair(prompt, _embedded(before, pixels), _embedded(after, pixels), pixels)


def _embedded(image: Image.Image, pixels: bool) -> str:
    """A picture as an address that holds it."""
    buffer = io.BytesIO()
    if pixels:  # harder work at it takes fifty times as long and saves a tenth
        image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    else:
        image.thumbnail((SIDE, SIDE))
        image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
