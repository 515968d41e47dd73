"""Before/after sheets of sample pictures."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from d3po_bench.errors import UserError
from d3po_bench.pictures import open_picture
from d3po_bench.runs.run import SAMPLES, samples_of
from d3po_bench.training.tools import SHOWN, spread
from eval.analysis.runs import Group, Run
from eval.analysis.scores import shown_score
from eval.figures.style import INK, short_name

if TYPE_CHECKING:
    from PIL import Image, ImageFont


CELL = (96, 160)
"""Smallest and largest side of a picture on a sheet, in pixels."""


COLUMNS = 10
"""Most prompts on a sheet."""


GAP, TITLE, LINE = 6, 52, 26
"""Pixels between pictures, for the title, and for a line of a prompt."""


LAYOUT = "d3po-bench sheet"
"""Name of the text in a sheet's file that says, as JSON, where which picture is."""


@dataclass(frozen=True)
class Strip:
    """A row of a sheet: what it shows, and its pictures by file name."""

    label: str
    pictures: dict[str, Image.Image]


class Labels(dict[str, str]):
    """What pictures of a run show, by file name; of files that are not the run's, their words."""

    def __init__(self, run: Run) -> None:
        """Of its evaluated prompts, those whose pictures are kept."""
        prompts = [row["prompt"] for row in run.files.table]
        super().__init__(samples_of(spread(prompts, SHOWN)))

    def __missing__(self, name: str) -> str:
        return name.replace("-", " ")


def samples_sheet(runs: Sequence[Run]) -> bytes | None:
    """The sample images of the lowest seed that has any, as PNG; None where no run has.

    A column for each prompt; rows for the base model, a round in the middle and the last one,
    each with the mean held-out score of the sampler that drew the images.

    Raises:
        UserError: an image is damaged, or not of the run.
    """
    for run in sorted(runs, key=lambda run: run.seed):
        if rounds := sampled_rounds(run):
            shown = sorted({rounds[0], rounds[(len(rounds) - 1) // 2], rounds[-1]})
            model, objective, method = run.group
            title = f"{method} on {objective}, {short_name(model)}, seed {run.seed}"
            strips = [_strip(run, round_) for round_ in shown]
            return _sheet(title, strips, Labels(run), {"seed": run.seed, "rounds": shown})
    return None


def sampled_rounds(run: Run) -> list[int]:
    """The rounds after which a run kept pictures, sorted.

    Raises:
        UserError: an image is missing or not of the run.
    """
    rounds = sorted({_round_of(path) for path in run.folder.glob("samples/round-*/*.png")})
    known = run.files.facts.get("content", {})
    if rounds and any(name.startswith(SAMPLES) for name in known):
        run.files.require_content(SAMPLES)
    return rounds


def folder_of(run: Run, round_: int) -> Path:
    """Where a run's pictures of a round are, one file for each prompt."""
    return run.folder / SAMPLES / f"round-{round_:05d}"


def sheet_name(group: Group) -> str:
    """What a sheet is called in the folder of figures."""
    # As in run folders: a model may be a folder or a hub id.
    model, objective, method = (part.strip("/").replace("/", "--") for part in group)
    return f"samples-{model}-{objective}-{method}.png"


def _round_of(picture: Path) -> int:
    digits = picture.parent.name.removeprefix("round-")
    if not digits.isdecimal():
        raise UserError(
            f"{picture.parent} is not a folder of samples, which is called round-NUMBER. Remove it."
        )
    return int(digits)


def _strip(run: Run, round_: int) -> Strip:
    first = "LoRA to begin with" if run.files.config.lora else "base model"
    label = _when(round_, run.spent.get(round_, {}), first)
    # The samples are drawn with the deployment sampler, so its mean is the one beside them.
    means = run.scores["score"]
    if ("eta0", round_) in means.index:
        label += f"\nmean {_digits(means['eta0', round_])} {shown_score(run.files).unit}".rstrip()
    paths = sorted(folder_of(run, round_).glob("*.png"))[:COLUMNS]
    return Strip(label, {path.stem: _picture(path) for path in paths})


def _digits(mean: float) -> str:
    """Three digits, zeros kept so that rows line up."""
    return f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:#.3g}"


def _when(round_: int, spent: Mapping[str, float], first: str = "base model") -> str:
    """What training began with, or how much it had been trained on by then."""
    if round_ == 0:
        return first
    if "pairs" not in spent:
        return f"after round {round_}"
    # A method that learns from single images counts as many units as images.
    unit = "images" if spent["pairs"] == spent["images"] else "pairs"
    return f"after {spent['pairs']:,.0f} {unit}"


def _picture(path: Path) -> Image.Image:
    """An image at the size it has on the sheet: small ones with every pixel kept visible."""
    from PIL import Image

    image = open_picture(path)
    if max(image.size) < CELL[0]:
        factor = -(-CELL[0] // max(image.size))
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((CELL[1], CELL[1]), Image.Resampling.LANCZOS)
    return image


def _sheet(
    title: str, strips: Sequence[Strip], labels: Mapping[str, str], facts: Mapping[str, Any]
) -> bytes:
    """The strips under each other, with a title, prompts on top and labels at the left; as PNG."""
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    names = list(dict.fromkeys(name for strip in strips for name in strip.pictures))[:COLUMNS]
    side = max(max(p.size) for strip in strips for p in strip.pictures.values())
    bold, plain, small = (
        _font("DejaVuSans-Bold", 28),
        _font("DejaVuSans", 22),
        _font("DejaVuSans", 20),
    )
    prompts = [_wrapped(labels[name], small, side + GAP) for name in names]
    beside = [line for strip in strips for line in strip.label.split("\n")]
    left = 5 * GAP + int(max(map(plain.getlength, beside)))
    top = TITLE + GAP + LINE * max(prompt.count("\n") + 1 for prompt in prompts)
    width = max(left + len(names) * (side + GAP), int(bold.getlength(title)) + 4 * GAP)
    sheet = Image.new("RGB", (width + GAP, top + len(strips) * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * GAP, 2 * GAP), title, "black", bold)
    for j, strip in enumerate(strips):
        y = top + j * (side + GAP)
        draw.multiline_text((2 * GAP, y + side / 2), strip.label, INK, plain, "lm", spacing=8)
        for i, name in enumerate(names):
            if name in strip.pictures:
                sheet.paste(strip.pictures[name], (left + i * (side + GAP), y))
    for i, prompt in enumerate(prompts):
        place = (left + i * (side + GAP) + side / 2, top - GAP)
        draw.multiline_text(place, prompt, INK, small, "md", align="center")
    layout = {**facts, "prompts": names, "left": left, "top": top, "side": side, "gap": GAP}
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(LAYOUT, json.dumps(layout))
    sheet.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _wrapped(prompt: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A prompt in at most two lines of so many pixels."""
    lines: list[str] = []
    letter = font.getlength(ascii_lowercase) / len(ascii_lowercase)
    for letters in range(max(4, int(width / letter)), 0, -1):
        lines = textwrap.wrap(prompt, letters, max_lines=2, placeholder="…")
        if max(map(font.getlength, lines), default=0) <= width:
            break
    return "\n".join(lines)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """The typeface of the curves, which comes with matplotlib; size in pixels."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)
