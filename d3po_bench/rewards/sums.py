"""Objectives that are sums: `aesthetic:0.7+clip:0.3`, objectives with their weights."""

from __future__ import annotations

import math
import re

from d3po_bench import own
from d3po_bench.digests import short
from d3po_bench.errors import UserError
from d3po_bench.rewards import http

_PART = re.compile(
    r"(?P<what>.+?):(?P<weight>-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)(?P<end>\+|$)", re.DOTALL
)

LONGEST = 100
"""Characters of a name that is also a folder's."""


def parts_of(text: str) -> dict[str, float]:
    """Objective -> weight; {} for what is no sum.

    Raises:
        UserError: a part is there twice, or has no weight that can be used.
    """
    found = list(_PART.finditer(text))
    if len(found) < 2 or "".join(part[0] for part in found) != text or found[-1]["end"]:
        return {}
    parts: dict[str, float] = {}
    for part in found:
        what, weight = own.normal(part["what"]), float(part["weight"])
        if what in parts:
            raise UserError(f"{what} is twice in {text}. Add its weights up.")
        if weight == 0 or not math.isfinite(weight):
            raise UserError(f"{what} has the weight {weight:g} in {text}. Give it another.")
        if http.is_address(what) and what.count("/") < 3:
            raise UserError(
                f"{what}:{weight:g} may be an address with a port. In a sum, write the path, too: "
                f"{what}:{weight:g}/:1."
            )
        parts[what] = weight
    return parts


def normal(text: str) -> str:
    """The same objective in one spelling."""
    parts = parts_of(text)
    return "+".join(f"{w}:{weight:.12g}" for w, weight in parts.items()) or own.normal(text)


def name_of(names: dict[str, float]) -> str:
    """What a sum is called in run folders.

    Args:
        names: of its parts, with their weights.
    """
    whole = "-".join(f"{name}-{weight:.12g}" for name, weight in names.items())
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 13]}-{short(whole)}"
