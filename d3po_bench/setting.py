"""`--set KEY=VALUE`: the parts, and what follows the = as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from d3po_bench.errors import UserError


def pairs_of(settings: Sequence[str], option: str = "--set") -> dict[str, str]:
    """KEY=VALUE strings, which were given to an option, as a dictionary.

    Raises:
        UserError: one has no =, or a key comes twice.
    """
    found: dict[str, str] = {}
    for key, sign, value in (text.partition("=") for text in settings):
        if not sign:
            raise UserError(f"{option} takes KEY=VALUE, not {key!r}.")
        if key in found:
            raise UserError(f"{option} {key}=... is there twice. Leave one out.")
        found[key] = value
    return found


def value_of(key: str, text: str, kind: Any) -> Any:
    """The value of `text` as `kind`, one of the few types that settings have.

    Raises:
        UserError: it is none.
    """
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    try:
        if choices:
            return {str(c): c for c in choices}[text]
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if get_origin(kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        value = kind(text)
        if (kind is float and not math.isfinite(value)) or (kind is int and abs(value) > 10**12):
            raise ValueError(text)
        return value
    except (KeyError, ValueError, OverflowError):
        words = {bool: "true or false", int: "a whole number", float: "a number such as 0.001"}
        wanted = " or ".join(map(str, choices)) or words.get(kind, str(kind))
        raise UserError(f"{key} must be {wanted}, not {text[:80]!r}.") from None


def require_ranges(owner: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse settings that are too low or too high.

    Args:
        owner: has them as attributes.
        ranges: name -> lowest and highest value.

    Raises:
        UserError: naming the setting, what it must be and what it is.
    """
    for name, (low, high) in ranges.items():
        value = getattr(owner, name)
        if not low <= value <= high:  # nan is neither
            raise UserError(
                f"{name} must be from {low:g} to {high:g}, not {str(value)[:40]}. Change it with "
                f"--set {name}=..."
            )


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can be that of a field of this type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, bool, str) else isinstance(value, dict)


def require_options(method: str, options: Mapping[str, Any], taken: set[str]) -> None:
    """Refuse an option that hides a setting of every run, or that a command line cannot give.

    Args:
        method: its name.
        options: name -> type.
        taken: names that every run has.

    Raises:
        UserError: naming it.
    """
    for name, kind in options.items():
        known = kind in (bool, int, float, str, tuple[str, ...]) or get_origin(kind) is Literal
        if name in taken or not known:
            fault = "as every run has" if name in taken else f"of the type {kind}"
            raise UserError(
                f"The method {method} has an option {name}, {fault}. Rename it in its package, or "
                "make it bool, int, float, str, Literal or tuple[str, ...]."
            )
