"""Prompt lists: plain text, one prompt a line."""

from __future__ import annotations

from pathlib import Path
from unicodedata import category

from d3po_bench.errors import UserError

HOME = Path(__file__).parent


def names() -> list[str]:
    """The lists that ship with the package."""
    return sorted(path.stem for path in HOME.glob("*.txt"))


def read_prompts(source: str) -> list[str]:
    """The prompts of a shipped list or of a file, without blank lines.

    Raises:
        UserError: no such list or file, or it is empty, not UTF-8 text, or a line of it holds
            control characters.
    """
    path = HOME / f"{source}.txt" if source in names() else Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark
    except UnicodeDecodeError as problem:
        raise UserError(
            f"Expected UTF-8 text in {path}, got byte {problem.object[problem.start]:#04x} at "
            f"position {problem.start}. Save the file as UTF-8."
        ) from problem
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(
            f"Expected a prompt list ({', '.join(names())}) or a file with one prompt a line, got "
            f"{source[:200]!r}: {reason}. Correct the name."
        ) from problem
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    for prompt in prompts:
        strange = next((c for c in prompt if category(c) == "Cc" and c != "\t"), None)
        if strange is not None:
            raise UserError(
                f"Expected prompts without control characters in {path}, got {strange!a} in "
                f"{ascii(prompt)[:60]}. Remove it."
            )
    if not prompts:
        raise UserError(
            f"Expected at least one prompt in {path}, got none. Write one prompt on each line."
        )
    return prompts
