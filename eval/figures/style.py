"""Colours, markers and words that figures share."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.figure import Figure
    from matplotlib.text import Text


# Okabe and Ito's colours, told apart with every kind of colour vision; a marker beside each.
LOOKS = {
    "d3po": ("#0072B2", "o"),
    "ddpo": ("#D55E00", "s"),
    "dpok": ("#009E73", "^"),
    "reward_weighted": ("#CC79A7", "D"),
    "preferred_images": ("#E69F00", "v"),
}


FURTHER_LOOKS = (("#56B4E9", "P"), ("#333333", "X"), ("#8C6D31", "*"), ("#7B4FA3", "<"))


MUTED, INK = "#666666", "#333333"


STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.7,
    "legend.handletextpad": 0.6,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "d3po-bench",
}


DPI = 150


Looks: TypeAlias = dict[str, tuple[str, str]]
"""Method -> colour and marker."""


def looks_of(methods: Iterable[str]) -> Looks:
    """The look of each method: ours have fixed ones, others follow by name."""
    given = set(methods)
    others = sorted(given - LOOKS.keys())
    looks = {name: look for name, look in LOOKS.items() if name in given}
    return looks | {n: FURTHER_LOOKS[i % len(FURTHER_LOOKS)] for i, n in enumerate(others)}


def own_style() -> AbstractContextManager[None]:
    """Our settings over matplotlib's own defaults: a reader's matplotlibrc changes no figure."""
    from matplotlib import style

    return style.context(["default", STYLE])


BREAKS = (r"(?<=\s)(?![^(]*\))", r"(?<=[-/])(?=[^\W\d])", r"(?<=[-/_])")
"""Where lines may end, the best places first: at a space outside of brackets, before a name that
is part of another, as in incompress-1-clip-0.5, after a sign."""


def fit(text: Text, inches: float) -> str:
    """Break a text of a figure into lines, until none is wider; says what it then reads."""
    words, figure = text.get_text(), cast("Figure", text.get_figure(root=True))
    for letters in range(len(words), 0, -1):
        text.set_text(wrapped(words, letters))
        if text.get_window_extent().width <= inches * figure.dpi:
            break
    return text.get_text()


def wrapped(words: str, letters: int) -> str:
    """Lines of at most so many letters."""
    lines = [""]
    for piece in _pieces(words, letters):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > letters:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _pieces(words: str, letters: int, breaks: Sequence[str] = BREAKS) -> list[str]:
    """What lines are made of: as large as fits."""
    if len(words.rstrip()) <= letters:
        return [words]
    if not breaks:
        return [words[i : i + letters] for i in range(0, len(words), letters)]
    parts = filter(None, re.split(breaks[0], words))
    return [piece for part in parts for piece in _pieces(part, letters, breaks[1:])]


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as PNG or SVG, without the date and version that would make files differ."""
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def short_name(model: str) -> str:
    """A model's name, or the last part of its folder or hub id."""
    return Path(model).name or model
