"""Draw a scene: 64 px pictures from the drawings that ship. See scenes.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from d3po_bench.models.embedded import render as version1
from d3po_bench.models.embedded.v2.drawings import DRAWINGS, SIDE, drawing
from d3po_bench.models.embedded.v2.scenes import TABLES, Rng, Scene, Thing, scene

SIZE = version1.CANVAS
"""Width and height of a picture, pixels."""

_FINE = 2 * SIZE
"""Animals and cards are drawn at twice the size and averaged down: smooth edges."""


def _ground(what: Scene, rng: Rng) -> Image.Image:
    if what.ground in TABLES:
        tone = np.asarray(TABLES[what.ground]) + rng.normal(0, 4, 3)
        pixels = np.broadcast_to(tone.astype(np.float32), (SIZE, SIZE, 3))
    else:
        pixels = version1.background(what.pattern, what.ground, rng)
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    return image.resize((_FINE, _FINE), Image.Resampling.NEAREST).convert("RGBA")


def _lay_card(image: Image.Image, thing: Thing, rng: Rng) -> None:
    tone = np.asarray(version1.COLOURS[thing.card or ""]) + rng.normal(0, 5, 3)
    half, x, y = thing.card_side / 2 * _FINE, thing.x * _FINE, thing.y * _FINE
    ImageDraw.Draw(image).rounded_rectangle(
        (x - half, y - half, x + half, y + half), radius=_FINE / 22,
        fill=tuple(int(v) for v in tone.clip(0, 255)),
    )  # fmt: skip


def _stamp(thing: Thing, name: str, rng: Rng) -> tuple[Image.Image, tuple[int, int]]:
    """The animal's drawing as it is to be laid, and where."""
    stamp = drawing(name)
    if rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(1, round(thing.side * _FINE))
    turn, half = np.deg2rad(rng.uniform(-8, 8)), side / 2
    scale, cos, sin = SIDE / side, np.cos(turn), np.sin(turn)
    back = (
        scale * cos, scale * sin, SIDE / 2 - scale * half * (cos + sin),
        -scale * sin, scale * cos, SIDE / 2 - scale * half * (cos - sin),
    )  # fmt: skip
    smooth = stamp.reduce(2) if scale > 1.5 else stamp
    if smooth is not stamp:
        back = tuple(v / 2 for v in back)
    laid = smooth.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    return laid, (round(thing.x * _FINE - half), round(thing.y * _FINE - half))


def draw(what: Scene, rng: Rng) -> NDArray[np.uint8]:
    """The picture [SIZE, SIZE, 4] uint8: colours, and where animals are (0 to 255).

    All animals of one kind share a drawing, so that a caption's "three foxes" looks like three.
    """
    image, mask = _ground(what, rng), Image.new("L", (_FINE, _FINE))
    for thing in what.things:
        if thing.card:
            _lay_card(image, thing, rng)
    chosen: dict[str, str] = {}
    for thing in what.things:
        names = DRAWINGS[thing.animal].split()
        odds = [0.5, *[0.5 / (len(names) - 1)] * (len(names) - 1)]
        name = chosen.setdefault(thing.animal, str(rng.choice(names, p=odds)))
        stamp, place = _stamp(thing, name, rng)
        layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
        layer.paste(stamp, place)
        image.alpha_composite(layer)
        mask.paste(255, place, stamp.getchannel("A"))
    image.putalpha(mask)
    fine = np.asarray(image).reshape(SIZE, 2, SIZE, 2, 4)
    return np.asarray(fine.mean((1, 3)).round(), np.uint8)


def sample(seed: int, index: int, kind: str | None = None) -> tuple[NDArray[np.uint8], Scene]:
    """Picture `index` of data set `seed`, as `draw` gives it, and its scene."""
    rng = np.random.default_rng([2, seed, index])
    what = scene(rng, kind)
    return draw(what, rng), what
