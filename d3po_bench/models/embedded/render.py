"""Captioned pictures for the embedded model: the paper's 45 animals on procedural backgrounds.

Animals are glyphs of the Debian font `fonts-noto-color-emoji` (SIL Open Font License 1.1),
drawn at random place, scale, tilt and flip on one of seven kinds of background, from flat to
busy. Captions name the animal and, in part of the data, the background, so that prompt-image
alignment can be measured. Every picture is a function of (seed, index) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from d3po_bench.errors import UserError

SIZE = 32
"""Width and height of a picture, pixels."""

CANVAS = 2 * SIZE
"""Pictures are drawn at twice their size and averaged down: smooth edges."""

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

GLYPHS = {
    "cat": "🐱🐈", "dog": "🐶🐕", "horse": "🐴🐎", "monkey": "🐵🐒", "rabbit": "🐰🐇",
    "zebra": "🦓", "spider": "🕷", "bird": "🐦", "sheep": "🐑", "deer": "🦌",
    "cow": "🐮🐄", "goat": "🐐", "lion": "🦁", "tiger": "🐯🐅", "bear": "🐻",
    "raccoon": "🦝", "fox": "🦊", "wolf": "🐺", "lizard": "🦎", "beetle": "🐞🪲",
    "kangaroo": "🦘", "fish": "🐟🐠", "butterfly": "🦋", "shark": "🦈", "whale": "🐳🐋",
    "dolphin": "🐬", "squirrel": "🐿", "mouse": "🐭🐁", "rat": "🐀", "snake": "🐍",
    "turtle": "🐢", "frog": "🐸", "chicken": "🐔🐓", "duck": "🦆", "goose": "🪿",
    "bee": "🐝", "pig": "🐷🐖", "turkey": "🦃", "fly": "🪰", "llama": "🦙",
    "camel": "🐫🐪", "gorilla": "🦍", "bat": "🦇", "ant": "🐜", "hedgehog": "🦔",
}  # fmt: skip
"""Animal -> its glyphs; the first is drawn four times in five."""

COLOURS = {
    "red": (214, 48, 49), "orange": (240, 147, 43), "yellow": (249, 215, 72),
    "green": (85, 170, 85), "blue": (62, 120, 214), "purple": (136, 84, 190),
    "pink": (244, 143, 177), "brown": (141, 99, 66), "gray": (150, 155, 160),
    "white": (246, 246, 244), "black": (34, 36, 40), "teal": (48, 165, 160),
}  # fmt: skip

PATTERNS = ("plain", "gradient", "striped", "checked", "dotted", "cloudy", "grainy")
_PATTERN_ODDS = (0.28, 0.18, 0.11, 0.11, 0.11, 0.11, 0.10)

Floats = NDArray[np.float32]


@cache
def _glyph(char: str) -> Image.Image:
    """One glyph, cut to its ink and centred on a transparent square."""
    if not FONT.exists():
        raise UserError(
            f"There is no emoji font at {FONT}. Install it: apt-get install fonts-noto-color-emoji."
        )
    font = ImageFont.truetype(str(FONT), 109)  # the only size this bitmap font holds
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), char, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise UserError(f"{FONT} has no glyph for {char!r}; version 2.042 or newer is needed.")
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


def _grid() -> tuple[Floats, Floats]:
    """Column and row of every pixel."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    return x, y


def _gradient(rng: np.random.Generator) -> Floats:
    x, y = _grid()
    angle = rng.uniform(0, 2 * np.pi)
    u = np.cos(angle) * x + np.sin(angle) * y
    return np.asarray((u - u.min()) / (u.max() - u.min()), np.float32)


# Periodic patterns sit on the autoencoder's grid (4 pixels, 8 of the canvas): it can then hold
# them exactly, and its capacity goes to the animals.


def _striped(rng: np.random.Generator) -> Floats:
    x, y = _grid()
    u = (x, y, x + y, x - y)[int(rng.integers(4))]
    return _soft(np.sin(u * np.pi / 8) * 1.5)


def _checked(rng: np.random.Generator) -> Floats:
    x, y = _grid()
    return _soft(np.sin(x * np.pi / 8) * np.sin(y * np.pi / 8) * 3)


def _dotted(rng: np.random.Generator) -> Floats:
    x, y = _grid()
    return _soft((np.cos(x * np.pi / 8) + np.cos(y * np.pi / 8) - 0.7) * 1.5)


def _cloudy(rng: np.random.Generator) -> Floats:
    coarse = rng.random((4, 4)).astype(np.float32)
    image = Image.fromarray(coarse).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    return _unit(np.asarray(image, np.float32) * 1.4 - 0.2)


def _grainy(rng: np.random.Generator) -> Floats:
    """One tile of grain, the same in every picture, repeated: busy, but learnable."""
    tile = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    grain = np.kron(np.tile(tile, (4, 4)), np.ones((2, 2), np.float32))
    return _unit(grain * 1.6 - 0.3)


def _soft(wave: NDArray[np.floating]) -> Floats:
    """A wave as a mask with edges two pixels or so wide, which an autoencoder can hold."""
    return _unit(wave * 1.5 + 0.5)


def _unit(mask: NDArray[np.floating]) -> Floats:
    return np.asarray(mask.clip(0, 1), np.float32)


_MASKS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "gradient": _gradient, "striped": _striped, "checked": _checked,
    "dotted": _dotted, "cloudy": _cloudy, "grainy": _grainy,
}  # fmt: skip


def background(pattern: str, colour: str, rng: np.random.Generator) -> Floats:
    """A background [CANVAS, CANVAS, 3] in 0..255 whose main colour is `colour`."""
    base = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 6, 3).astype(np.float32)
    if pattern == "plain":
        return np.broadcast_to(base, (CANVAS, CANVAS, 3)).clip(0, 255)
    toward = np.float32(255 if base.mean() < 128 else 0)
    other = base + (toward - base) * np.float32(rng.uniform(0.35, 0.5))
    mask = _MASKS[pattern](rng)[..., None]
    return np.asarray((base * (1 - mask) + other * mask).clip(0, 255), np.float32)


def draw(animal: str, pattern: str, colour: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture, [SIZE, SIZE, 4] uint8: colours, and where the animal is (0 to 255)."""
    chars = GLYPHS[animal]
    glyph = _glyph(chars[0] if len(chars) == 1 or rng.random() < 0.8 else chars[1])
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = round(CANVAS * rng.uniform(0.8, 0.97))
    glyph = glyph.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=False)
    glyph = glyph.resize((side, side), Image.Resampling.LANCZOS)
    ground = background(pattern, colour, rng).round().astype(np.uint8)
    image = Image.fromarray(ground).convert("RGBA")
    free = CANVAS - side
    place = (int(rng.integers(0, free + 1)), int(rng.integers(0, free + 1)))
    mask = Image.new("L", (CANVAS, CANVAS))
    mask.paste(glyph.getchannel("A"), place)
    image.alpha_composite(glyph, place)
    image.putalpha(mask)
    fine = np.asarray(image).reshape(SIZE, 2, SIZE, 2, 4)
    return np.asarray(fine.mean((1, 3)).round(), np.uint8)


def caption(animal: str, pattern: str, colour: str) -> str:
    """The full caption: animal, colour and pattern."""
    article = "an" if animal[0] in "aeiou" else "a"
    ground = f"{colour} background" if pattern == "plain" else f"{colour} {pattern} background"
    return f"{article} {animal} on {'an' if colour == 'orange' else 'a'} {ground}"


def sample(seed: int, index: int) -> tuple[NDArray[np.uint8], str, int]:
    """Picture `index` of data set `seed`: image as `draw` gives, caption, animal's number."""
    rng = np.random.default_rng([seed, index])
    names = list(GLYPHS)
    label = int(rng.integers(len(names)))
    pattern = str(rng.choice(PATTERNS, p=_PATTERN_ODDS))
    colour = str(rng.choice(list(COLOURS)))
    image = draw(names[label], pattern, colour, rng)
    style = rng.random()
    if style < 0.4:
        text = names[label]
    elif style < 0.5:
        text = f"a {names[label]}"
    else:
        text = caption(names[label], pattern, colour)
    return image, text, label
