"""Text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator


def section(title: str, lines: dict[str, str]) -> Iterator[str]:
    """A title, and its lines in two columns."""
    yield f"{title}:"
    width = max(len(name) for name in lines)
    for name, text in lines.items():
        yield f"  {name:<{width}}  {text}".rstrip()
