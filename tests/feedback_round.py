"""Rounds of small generated pictures, for the tests and commands of human feedback."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from d3po_bench.feedback.questions import Answer, Kind
from d3po_bench.feedback.rounds import Item, Round
from d3po_bench.feedback.study import one_question


def picture(number: int, size: int = 32) -> bytes:
    """A PNG of a disc on a ground, different for each number."""
    hue = number * 47 % 256
    image = Image.new("HSV", (size, size), (hue, 60, 235))
    draw = ImageDraw.Draw(image)
    edge, left = size // 3, (number * 13) % (size // 2)
    draw.ellipse(
        (left, edge // 2, left + edge, edge // 2 + edge), fill=((hue + 128) % 256, 180, 200)
    )
    draw.rectangle((0, size * 3 // 4, size, size), fill=((hue + 30) % 256, 110, 160))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def claiming(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def new_source(folder: Path, number: int, first: int = 0, size: int = 32) -> Path:
    """A folder of pictures with their texts, as `feedback new --pictures` takes it."""
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for n in range(number):
        (folder / f"{n}.png").write_bytes(picture(first + n, size))
        lines.append(f"{n}.png,number {n}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def new_study(folder: Path, **changes: str) -> Path:
    """The study of docs/studies.md as a file with its pictures beside it.

    Args:
        folder: to write into.
        changes: lines of the file by their beginning, such as `answers="answers = 6"`.
    """
    guide = Path(__file__).parents[1] / "docs" / "studies.md"
    text = guide.read_text(encoding="utf-8").partition("<!-- example: study.toml -->\n```toml\n")[2]
    text = text.partition("```")[0]
    for start, line in changes.items():
        text = re.sub(rf"^{start} = .*$", line, text, flags=re.MULTILINE)
    names = sorted({*re.findall(r"known/[\w-]+\.png", text)})
    (folder / "known").mkdir(parents=True)
    for n, name in enumerate(names):
        whole = picture(n // 2)
        (folder / name).write_bytes(broken(whole) if "broken" in name else whole)
    file = folder / "study.toml"
    file.write_text(text, encoding="utf-8")
    return file


def broken(png: bytes) -> bytes:
    """The picture with its pixels in another order."""
    image = Image.open(io.BytesIO(png))
    pixels = np.asarray(image).reshape(-1, 3)
    mixed = np.random.default_rng(0).permutation(pixels).reshape(image.height, image.width, 3)
    buffer = io.BytesIO()
    Image.fromarray(mixed).save(buffer, "PNG")
    return buffer.getvalue()


def new_round(
    folder: Path, kind: Kind = "tags", number: int = 6, *, images: int | None = None,
    gold: Mapping[int, Answer] | None = None, blurred: bool = False, size: int = 32,
    question: str | None = None, prompt: str = "prompt number {}",
) -> Round:  # fmt: skip
    """Write a round of `number` items, and return it. `prompt` gets the item's number."""
    count = images or (7 if kind == "tags" else 2)
    (folder / "images").mkdir(parents=True)
    items = []
    for n in range(number):
        names = [f"images/{n:04d}-{k}.png" for k in range(count)]
        for k, name in enumerate(names):
            (folder / name).write_bytes(picture(n * count + k, size))
        items.append(Item(f"{n:04d}", prompt.format(n), tuple(names), (gold or {}).get(n)))
    made = Round(one_question(kind, question, blurred=blurred), tuple(items))
    made.write(folder)
    return Round.read(folder)
