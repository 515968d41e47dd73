"""What a method of somebody else's must have."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

_OF_A_METHOD = ("rows", "loss", "images_per_prompt", "shared_noise", "reference")


def fault_of(method: Any) -> str:
    """What keeps something from being a method; "" where it is one."""
    if not (isinstance(method, type) and is_dataclass(method)):
        return f"is {ascii(method)[:80]}, not a dataclass"
    if missing := [name for name in _OF_A_METHOD if not hasattr(method, name)]:
        return f"has no {missing[0]}"
    for name in ("images_per_prompt", "least_images"):
        number = getattr(method, name, 1)
        if type(number) is not int and not isinstance(number, property):  # it follows an option
            return f"has {name} = {ascii(number)[:40]}, not a whole number"
    for option in fields(method):
        if option.default is MISSING and option.default_factory is MISSING:
            return f"has an option {option.name} without a default"
    return ""
