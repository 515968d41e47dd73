"""Methods with some settings of their own, under a name of their own.

A method's file says them in a line `VARIANTS = {NAME: {SETTING: VALUE}}`, of which only literals
are read: names are listed without loading any method. A setting is an option of the method or a
field of RunConfig, and stands above what a preset has for the method.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any


@cache
def variants_in(source: str) -> dict[str, dict[str, Any]]:
    """Name -> settings of each variant that the text of a method's file names."""
    for node in ast.parse(source).body if "\nVARIANTS" in source else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            found: dict[str, dict[str, Any]] = ast.literal_eval(node.value)
            return found
    return {}


def said(method: str, settings: dict[str, Any]) -> str:
    """A variant in a line."""
    changes = [f"{k}={str(v).lower() if type(v) is bool else v}" for k, v in settings.items()]
    return f"{method} with {', '.join(changes)}"
