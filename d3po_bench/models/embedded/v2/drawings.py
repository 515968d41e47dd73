"""The drawings of the 45 animals that version 2's pictures are made of, and where they come from.

    python -m d3po_bench.models.embedded.v2.drawings build/art

draws them from three sets of vector pictures into one file, drawings.png, which ships: nothing
else is needed to render. The sets are npm packages of Iconify, which `npm pack` fetches:

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
        @iconify-json/fluent-emoji-flat@1.2.6

LICENSES.md says under which licence each set is, and where that was read.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from d3po_bench.errors import UserError, said_in_one_line

SHEET = Path(__file__).parent / "drawings.png"
SIDE = 112
"""Width and height of a drawing in the sheet, pixels."""

COLUMNS = 12

SETS = {"n": "noto-1.2.9", "t": "twemoji-1.2.5", "f": "fluent-emoji-flat-1.2.6"}

DRAWINGS = {
    "cat": "n:cat-face f:cat-face n:cat", "dog": "n:dog-face f:dog-face t:dog",
    "horse": "n:horse-face n:horse t:horse", "monkey": "n:monkey-face f:monkey-face n:monkey",
    "rabbit": "n:rabbit-face t:rabbit-face t:rabbit", "zebra": "n:zebra t:zebra",
    "spider": "n:spider t:spider", "bird": "n:bird t:bird", "sheep": "n:ewe f:ewe",
    "deer": "n:deer t:deer", "cow": "n:cow-face f:cow-face n:cow", "goat": "n:goat t:goat",
    "lion": "n:lion t:lion f:lion", "tiger": "n:tiger-face t:tiger-face n:tiger",
    "bear": "n:bear f:bear", "raccoon": "t:raccoon f:raccoon n:raccoon",
    "fox": "n:fox t:fox f:fox", "wolf": "n:wolf t:wolf", "lizard": "n:lizard f:lizard",
    "beetle": "n:lady-beetle t:lady-beetle t:beetle", "kangaroo": "n:kangaroo t:kangaroo",
    "fish": "n:tropical-fish t:tropical-fish f:fish",
    "butterfly": "n:butterfly t:butterfly f:butterfly", "shark": "n:shark t:shark f:shark",
    "whale": "n:spouting-whale t:spouting-whale f:spouting-whale",
    "dolphin": "n:dolphin t:dolphin f:dolphin", "squirrel": "n:chipmunk t:chipmunk",
    "mouse": "n:mouse-face t:mouse-face f:mouse-face", "rat": "n:rat t:rat",
    "snake": "n:snake t:snake f:snake", "turtle": "n:turtle t:turtle f:turtle",
    "frog": "n:frog t:frog f:frog", "chicken": "n:chicken f:chicken n:rooster",
    "duck": "n:duck f:duck", "goose": "n:goose t:goose", "bee": "n:honeybee t:honeybee",
    "pig": "n:pig-face t:pig-face n:pig", "turkey": "n:turkey t:turkey", "fly": "n:fly t:fly",
    "llama": "n:llama t:llama", "camel": "n:two-hump-camel t:two-hump-camel n:camel",
    "gorilla": "n:gorilla t:gorilla", "bat": "n:bat t:bat", "ant": "n:ant t:ant",
    "hedgehog": "n:hedgehog f:hedgehog",
}  # fmt: skip
"""Animal -> set and name of each of its drawings. Left out: what could be taken for another of
the animals (a ram for a goat, a mouse's body for a rat, a blue fish for a dolphin)."""

_PLACES = {name: i for i, name in enumerate(n for v in DRAWINGS.values() for n in v.split())}


@cache
def _sheet() -> Image.Image:
    return Image.open(SHEET, formats=("PNG",)).convert("RGBA")


@cache
def drawing(name: str) -> Image.Image:
    """The drawing `name` of DRAWINGS on a transparent square, SIDE wide, cut to its ink."""
    row, column = divmod(_PLACES[name], COLUMNS)
    left, top = column * SIDE, row * SIDE
    return _sheet().crop((left, top, left + SIDE, top + SIDE))


def _icons(package: Path) -> dict[str, Any]:
    """Contents of icons.json in an npm package of Iconify."""
    if not package.exists():
        raise UserError(f"There is no {package}. Fetch it with npm pack: see this file's top.")
    with tarfile.open(package) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None, package
        return dict(json.load(member))


def _rasterised(icons: dict[str, Any], name: str) -> Image.Image:
    """Icon `name` drawn large, cut to its ink, and shrunk to SIDE on its longer side."""
    import resvg_py

    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=512, height=512)
    large = Image.open(io.BytesIO(bytes(drawn)), formats=("PNG",)).convert("RGBA")
    ink = large.crop(large.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Draw drawings.png from the npm packages in FOLDER (needs resvg_py).

    Example: python -m d3po_bench.models.embedded.v2.drawings build/art
    """
    icons = {s: _icons(folder / f"iconify-json-{name}.tgz") for s, name in SETS.items()}
    rows = -(-len(_PLACES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE), (0, 0, 0, 0))
    for name, place in _PLACES.items():
        which, icon = name.split(":")
        row, column = divmod(place, COLUMNS)
        sheet.paste(_rasterised(icons[which], icon), (column * SIDE, row * SIDE))
    pixels = np.asarray(sheet).copy()
    pixels[pixels[..., 3] == 0] = 0
    Image.fromarray(pixels).quantize(256, Image.Quantize.FASTOCTREE).save(SHEET, optimize=True)
    click.echo(f"{SHEET.name}: {len(_PLACES)} drawings, {SHEET.stat().st_size:,} bytes")


if __name__ == "__main__":
    with said_in_one_line():
        main()
