"""Tables, numbers and figures of documents, written between markers from what was measured.

<!-- made: NAME -->
a table, which is replaced
<!-- /made -->

a sentence with <!--n NAME-->+0.198<!--/n--> in it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from d3po_bench.errors import UserError
from d3po_bench.runs.files import write_atomically

BLOCK = re.compile(r"^<!-- made: (.*?) -->\n(.*?)^<!-- /made -->$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"<!--n (.*?)-->(.*?)<!--/n-->", re.DOTALL)
MARKER = re.compile(r"<!-- /?made\b.*|<!--/?n\b.*")

TABLE = re.compile(r"^\|.*\n\|[-:| ]+\|\n(?:\|.*\n?)*", re.MULTILINE)
INTERVAL = re.compile(r"\d to [+-]?[\d.]+\)")
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(r"(?<![\w.])[+-]\d*\.\d{2,}|\d\.\d+ kB\b")
"""What hardly any number looks like that was not measured: a sign and two decimals, or kB."""

MOST_APART = 32
"""Of 255, between a pixel of a figure that is there and of the same figure drawn again."""
MOST_OTHERS = 1e-3
"""Share of pixels that differ at all between the two."""

Maker = Callable[[str], str]
"""Name -> the text that stands between its markers."""


def made(text: str, block: Maker, number: Maker) -> tuple[str, list[str]]:
    """A document with everything between markers made again, and what changed in it.

    Raises:
        UserError: a marker has no end or no beginning, or a maker does not know its name.
    """
    changed: list[str] = []

    def again(kind: str, maker: Maker, shape: str) -> Callable[[re.Match[str]], str]:
        def replaced(found: re.Match[str]) -> str:
            name, before = found.groups()
            after = maker(name)
            if shape.format(name, after) != found[0]:
                was = f" says {before}, not {after}" if kind == "number" else " has changed"
                changed.append(f"{kind} {name}{was}")
            return shape.format(name, after)

        return replaced

    text = BLOCK.sub(again("table", block, "<!-- made: {} -->\n{}\n<!-- /made -->"), text)
    text = NUMBER.sub(again("number", number, "<!--n {}-->{}<!--/n-->"), text)
    if stray := MARKER.search(_unmarked(text)):
        raise UserError(f"{stray[0][:60]} has no other end. Add it, or remove that marker.")
    return text, changed


def _unmarked(text: str) -> str:
    """A document without what stands between markers."""
    return NUMBER.sub("", BLOCK.sub("", text))


def loose(text: str) -> Iterator[str]:
    """Tables of numbers, and numbers that look measured, that stand outside markers."""
    text = _unmarked(text) + "\n"
    for table in TABLE.findall(text):
        head, rule = table.splitlines()[:2]
        if "-:" in rule or INTERVAL.search(table):
            yield f"a table of numbers outside markers: {head}"
    prose = CODE.sub("", TABLE.sub("", text))
    for line in prose.splitlines():
        for found in MEASURED.findall(line):
            yield f"a measured number outside markers: {found.strip()}"


def write(path: Path, drawn: Path, *, check: bool) -> bool:
    """Replace a file by one that was made again, unless it is the same.

    Args:
        path: what is there, or not yet.
        drawn: what was made again.
        check: only say whether it would be replaced.

    Returns:
        Whether the two differ: in their bytes, or a PNG in its looks.
    """
    if path.is_file() and same(drawn, path):
        return False
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawn.read_bytes())
    return True


def same(again: Path, figure: Path) -> bool:
    """Whether a file that was made again has the bytes of another, or a PNG its looks."""
    if figure.suffix == ".png":
        return _alike(again, figure)
    return again.read_bytes() == figure.read_bytes()


def _alike(one: Path, other: Path) -> bool:
    """Whether pixels differ no more, and no more of them, than by another rounding of edges."""
    import numpy as np
    from PIL import Image

    try:
        with (
            Image.open(one, formats=("PNG",)) as first,
            Image.open(other, formats=("PNG",)) as second,
        ):
            a, b = (np.asarray(image.convert("RGBA"), dtype=np.int16) for image in (first, second))
    except (OSError, ValueError, Image.DecompressionBombError):  # a damaged one
        return False
    if a.shape != b.shape:
        return False
    apart = np.abs(a - b).max(2)
    return int(apart.max()) <= MOST_APART and float((apart > 0).mean()) <= MOST_OTHERS
