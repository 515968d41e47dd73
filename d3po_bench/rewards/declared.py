"""What a reward of one's own says of itself: its unit, its direction and its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d3po_bench import own
from d3po_bench.digests import short
from d3po_bench.errors import UserError
from d3po_bench.rewards import http

PROMPTS = "animals"
"""Of a reward that does not name others."""


@dataclass(frozen=True)
class Reward:
    """A reward that is known by a file, a module or an address, before it is made."""

    text: str
    make: Callable[[Any], Any]
    """Gives what scores, on a device."""
    unit: str
    direction: object
    """1 or -1 where it is an objective."""
    prompts: str
    digest: str

    @property
    def sign(self) -> Literal[-1, 1]:
        """1 where larger is better, -1 where smaller is.

        Raises:
            UserError: it does not say.
        """
        known: dict[object, Literal[-1, 1]] = {1: 1, -1: -1}
        if type(self.direction) is not int or self.direction not in known:
            given = "no" if self.direction is None else f"{ascii(self.direction)[:40]} as its"
            raise UserError(
                f"{self.text} has {given} direction. Write, beside the reward, direction = 1 if "
                "larger is better, or direction = -1."
            )
        return known[self.direction]


def declared(text: str) -> Reward:
    """The reward behind a text.

    Raises:
        UserError: it is not there, does not load, is no reward, or its server does not answer.
    """
    if http.is_address(text):
        return _served(text, text, {}, "")
    loaded = own.load(text, "reward")
    if isinstance(loaded.found, str) and http.is_address(loaded.found):
        return _served(text, loaded.found, loaded.beside, loaded.digest)
    if not callable(loaded.found):
        raise UserError(
            f"{text} is {ascii(loaded.found)[:60]}. A reward is a function of (images, prompts), "
            "or a class with such a __call__: docs/own-reward.md shows one."
        )
    said = {name: getattr(loaded.found, name, loaded.beside.get(name)) for name in SAID}
    return _checked(text, said, lambda device: _made(loaded, device), loaded.digest)


SAID = ("unit", "direction", "prompts")


def _served(text: str, address: str, beside: Mapping[str, Any], digest: str) -> Reward:
    server = http.server(address)
    said = {"unit": server.unit, "direction": server.direction, "prompts": None}
    said |= {name: beside[name] for name in SAID if name in beside}
    return _checked(text, said, lambda device: server, short(digest + server.digest))


def _checked(text: str, said: Mapping[str, Any], make: Callable[[Any], Any], digest: str) -> Reward:
    unit, prompts = said["unit"], said["prompts"] or PROMPTS
    if not isinstance(unit, str) or not unit.strip() or not unit.isprintable():
        raise UserError(
            f'{text} does not say its unit. Write, beside the reward, unit = "points", or '
            "whatever its numbers count."
        )
    if not isinstance(prompts, str):
        raise UserError(
            f"{text} has the prompts {ascii(prompts)[:40]}. Name a list or a file, such as "
            'prompts = "animals", or leave that line out.'
        )
    return Reward(text, make, unit, said["direction"], prompts, digest)


def _made(loaded: own.Own, device: Any) -> Any:
    """The function, or an object of the class."""
    made: Callable[..., Any] = loaded.found
    if not inspect.isclass(loaded.found):
        return made
    with own.told(loaded.text):
        takes = "device" in inspect.signature(made).parameters
        return made(device=device) if takes else made()
