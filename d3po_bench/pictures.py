"""Pictures from elsewhere: a file, and a folder of them with the text of each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from d3po_bench.errors import UserError
from d3po_bench.prompts import require_text
from d3po_bench.prompts.tables import rows_of, texts_of

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
"""All that is opened: of Pillow's other formats some start programs."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

LOOKED_AT = 20
"""Pictures of a folder that are asked which program drew them."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Of 8 bits. Pillow turns deeper ones into white."""

TABLES = ("metadata.csv", "metadata.jsonl")
"""What Hugging Face's image folders have beside the pictures: file_name, and text."""

PROMPTS = "prompt.json"
"""What the D3PO authors' code writes instead: a list of prompts, beside images/00000.png, ..."""

TEXTS = ("text", "prompt", "caption")
"""The first of these that a table has is its pictures' text."""

KEPT_BY = {"parameters": "AUTOMATIC1111", "prompt": "ComfyUI"}
"""Name of the text in a PNG file that says how it was drawn -> the program that writes it."""


def open_picture(path: Path | BinaryIO) -> Image.Image:
    """A picture as RGB, whole in memory, turned as programs that show it turn it.

    Raises:
        UserError: it is damaged, enormous, of another format, of more than 8 bits a channel, or
            looks different by how it is shown: an animation, or transparent.
    """
    from PIL import ImageOps

    with opened(path) as picture:
        if picture.mode not in MODES:
            raise ValueError(f"it has more than 8 bits a channel ({picture.mode})")
        # Cameras write a preview as a second picture, which makes their JPEG an MPO.
        if picture.format in FORMATS and getattr(picture, "is_animated", False):
            raise ValueError("it is an animation of several pictures")
        if picture.has_transparency_data and _lets_through(picture):
            raise ValueError("it is transparent in places, where any colour may be hidden")
        return ImageOps.exif_transpose(picture).convert("RGB")


def _lets_through(picture: Image.Image) -> bool:
    return picture.convert("RGBA").getchannel("A").getextrema() != (255, 255)


@contextmanager
def opened(path: Path | BinaryIO) -> Iterator[Image.Image]:
    """A picture whose pixels are not read yet.

    Raises:
        UserError: it cannot be opened, or what is done with it fails.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except (
        OSError, ValueError, SyntaxError, EOFError,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as problem:  # fmt: skip
        raise UserError(
            f"{path} is not a picture that can be read: {problem}. Save it again as "
            f"{' or '.join(FORMATS)}, or leave it out."
        ) from problem


def table_of(folder: Path) -> Path | None:
    """The file that says what the pictures of a folder show; None where there is none.

    Raises:
        UserError: there are two.
    """
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {' and '.join(TABLES)}. Remove one of them.")
    if not found and (folder / PROMPTS).is_file() and (folder / "images").is_dir():
        return folder / PROMPTS
    return found[0] if found else None


def without_table(folder: Path) -> str:
    """What a folder of pictures lacks, in a sentence; "" where there are no pictures."""
    pictures = [p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.suffix.lower() in SUFFIXES]
    if not pictures:
        return ""
    kept = set[str]()
    for path in pictures[:LOOKED_AT]:
        with suppress(UserError), opened(path) as picture:
            kept |= {by for key, by in KEPT_BY.items() if key in picture.info}
    programs = f" ({' and '.join(sorted(kept))} kept how they were drawn in the files)"
    return (
        f"{folder} is a folder of {len(pictures)} pictures{programs if kept else ''} without a "
        "metadata.csv or metadata.jsonl that says what they show. Write one there: file_name and "
        "text of each picture."
    )


def read_pictures(folder: Path) -> list[tuple[str, str]]:
    """File names and texts of a folder of pictures, from the rows of its table.

    The layout of Hugging Face's image folders: metadata.csv or metadata.jsonl with file_name and
    text (or prompt, or caption); or that of the D3PO authors' code, see `_numbered`.

    Raises:
        UserError: there is no table, it is malformed, or a row names no picture inside the
            folder or no text.
    """
    path = table_of(folder)
    if path is None:
        raise UserError(
            without_table(folder)
            or f"{folder} has no metadata.csv and no pictures. Give a folder that has both."
        )
    rows = _numbered(path) if path.name == PROMPTS else rows_of(path)
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    column = next((name for name in TEXTS if name in first), TEXTS[0])
    pictures: dict[tuple[str, str], None] = {}
    for number, row in enumerate(rows, 1):
        name, text = (row.get(c) if isinstance(row, dict) else None for c in ("file_name", column))
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{path} needs a file_name and a text for each picture, and row {number} is "
                f"{ascii(row)[:80]}. Complete it."
            )
        _require_inside(folder, name, path)
        require_text(text, path)
        if (name, text) in pictures:
            raise UserError(
                f"{path} has {ascii(name)[:80]} twice with the same text, which would count twice. "
                f"Remove row {number}."
            )
        pictures[name, text] = None
    if not pictures:
        raise UserError(f"{path} names no picture. Write a row for each.")
    return list(pictures)


def _numbered(path: Path) -> list[dict[str, str]]:
    """The rows that a table of pictures by number would have.

    As many of each prompt, one prompt after the other: images/00000.png, images/00001.png, ...

    Raises:
        UserError: the prompts cannot be read, or have unequal numbers of pictures.
    """
    prompts, count = texts_of(path, ""), len([*(path.parent / "images").glob("*.png")])
    if not prompts or count % len(prompts):
        raise UserError(
            f"{path} has {len(prompts)} prompts for the {count} pictures in images/, which is not "
            "as many for each. Add what is missing, or write a metadata.csv."
        )
    each = count // len(prompts)
    return [{"file_name": f"images/{n:05d}.png", "text": prompts[n // each]} for n in range(count)]


def _require_inside(folder: Path, name: str, table: Path) -> None:
    place = (folder / name).resolve() if "\0" not in name else folder
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise UserError(
            f"{table} names {name!a}, which is not a picture inside {folder}. Correct that row."
        )
