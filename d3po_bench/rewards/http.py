"""Rewards behind an address: pictures go there as JSON, and numbers come back.

    POST ADDRESS   {"images": [PNG in base64, ...], "prompts": [text, ...]}
    200            [1.5, ...] or {"scores": [1.5, ...], "unit": "points", "direction": 1}

Whatever else comes back is an error, never a score.
"""

from __future__ import annotations

import json
import os
import re
import sys
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from d3po_bench.digests import short
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs.files import png_bytes

if TYPE_CHECKING:
    from torch import Tensor

TOKEN = "D3PO_BENCH_REWARD_TOKEN"
"""Environment variable with what is sent as `Authorization: Bearer`."""

BATCH = 32
"""Pictures of a request."""

CONNECT, ANSWER = 5.0, 300.0
"""Seconds that a server may take to take a request, and to answer it."""

RETRIES = 6
"""Of a request that found no server, or one that is busy; about a minute in all."""

PAUSE = 1.0
"""Seconds, doubled with every retry, that lie before the next."""

BUSY = (429, 502, 503, 504)
"""Statuses after which the same request may succeed."""


def is_address(text: str) -> bool:
    """Whether a text is an address of the web."""
    return text.lower().startswith(("http://", "https://"))


def name_of(address: str) -> str:
    """What the reward there is called: host, port and path."""
    _require_plain(address)
    parts = urlsplit(address)
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{parts.netloc}{parts.path}").strip("-.")
    return re.sub(r"\.py$", "-py", name)  # or it would look like a file


def _require_plain(address: str) -> None:
    """Refuse an address with a secret in it: run folders name it.

    Raises:
        UserError: it has a user, a query or no host.
    """
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises where it is none
        host = parts.hostname
    except ValueError:
        host = None
    if not host or not address.isprintable() or " " in address:
        raise UserError("The address of the reward server is none. Write http://HOST:PORT/PATH.")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"The address of the reward server at {host} has a user, a query or a fragment, which "
            f"run folders would keep. Leave it out; a token goes into the environment as {TOKEN}."
        )


@cache
def server(address: str) -> Server:
    """The server at an address; asked once in a command, or a call from Python, what it is.

    Raises:
        UserError: it does not answer, or with something else than a score.
    """
    return Server(address)


class Server:
    """A scorer that asks a server."""

    def __init__(self, address: str) -> None:
        """Score a grey picture, which shows what the server is.

        Raises:
            UserError: it does not answer, or with something else than a score.
        """
        import torch

        _require_plain(address)
        self.address = address
        grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
        try:
            reply = self._asked(grey, ["a cat"], retries=1)
        except RunError as problem:
            raise UserError(str(problem)) from problem
        facts = reply if isinstance(reply, dict) else {}
        self.unit, self.direction = facts.get("unit", "points"), facts.get("direction", 1)
        self.digest = short(json.dumps([address, self.unit, facts.get("version")]))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8.

        Raises:
            RunError: the server does not answer, or with something else than these.
        """
        import torch

        found: list[float] = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            found += _scores(self._asked(images[part], prompts[part], RETRIES))
        return torch.tensor(found)

    def _asked(self, images: Tensor, prompts: Sequence[str], retries: int) -> Any:
        """What the server answers, once that holds a number for each picture.

        Raises:
            RunError: the server does not answer, or with something else.
        """
        body = {
            "images": [b64encode(png_bytes(image.cpu())).decode() for image in images],
            "prompts": list(prompts),
        }
        reply = self._posted(body, retries)
        scores = _scores(reply)
        if not isinstance(scores, list) or not all(map(_is_number, scores)):
            raise self._wrong(f"{json.dumps(reply)[:60]} instead of a list of numbers")
        if len(scores) != len(images):
            raise self._wrong(f"{len(scores)} numbers for {len(images)} pictures")
        return reply

    def _posted(self, body: dict[str, list[str]], retries: int) -> Any:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        again = Retry(
            retries, read=1, backoff_factor=PAUSE, status_forcelist=BUSY, allowed_methods=None,
            raise_on_status=False, retry_after_max=60,
        )  # fmt: skip
        token = os.environ.get(TOKEN)
        with requests.Session() as session:
            session.mount(self.address, HTTPAdapter(max_retries=again))
            try:
                reply = session.post(
                    self.address, json=body, timeout=(CONNECT, ANSWER), allow_redirects=False,
                    headers={"Authorization": f"Bearer {token}"} if token else None,
                )  # fmt: skip
            except requests.RequestException as problem:
                raise RunError(
                    f"The reward server at {self.address} does not answer "
                    f"({type(problem).__name__}). Start it, and give the same command again."
                ) from problem
        if reply.status_code != 200:
            raise self._wrong(f"status {reply.status_code}")
        try:
            return reply.json()
        except (ValueError, RecursionError) as problem:
            raise self._wrong(f"{reply.text[:60]!a}, which is not JSON") from problem

    def _wrong(self, what: str) -> RunError:
        return RunError(
            f"The reward server at {self.address} answers with {what}. Correct that server: "
            "docs/own-reward.md shows one."
        )


def _scores(reply: Any) -> Any:
    return reply.get("scores") if isinstance(reply, dict) else reply


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not
