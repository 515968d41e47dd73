"""Serve a round's labelling page: the application, where it listens, and who is invited."""

from __future__ import annotations

import re
import socket
import unicodedata
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException, Request, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException as StarletteHTTPException

from d3po_bench.errors import UserError
from d3po_bench.feedback.invitations import (
    Fact,
    check_name,
    hash_of,
    invite,
    invite_as,
    pool_of,
    raters,
)
from d3po_bench.feedback.page import access, admin, routes, studies
from d3po_bench.feedback.page.sessions import HEADERS, HTTPS_ALONE, Limits, session_key
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.store import HandoutSettings, LabelStore, default_url, require_lasting

if TYPE_CHECKING:
    import uvicorn


FAILED = "This could not be saved. Try again in a moment."


def app(
    round_: Round, folder: Path, store: LabelStore, key: bytes, limits: Limits | None = None,
    public_url: str | None = None, root: str = "",
) -> FastAPI:  # fmt: skip
    """The page for one round.

    Args:
        round_: what is judged.
        folder: where the paths of its images begin.
        store: where votes go.
        key: signs sessions; a new key signs everybody out.
        limits: how much anybody may ask for.
        public_url: the origin that browsers see, where a proxy changes it.
        root: the path below it where a proxy shows these pages.
    """
    # A redirect to another path would name the host that the request claims.
    made = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    site = access.Site(round_, folder, store, key, limits or Limits(), public_url, root)
    made.state.site = site
    for part in (access, routes, studies, admin):
        made.include_router(part.router)

    @made.exception_handler(StarletteHTTPException)
    async def refused(request: Request, problem: StarletteHTTPException) -> Response:
        ours = isinstance(problem, HTTPException)  # others say "Not Found" of a path
        words = problem.detail if ours else "There is no such page."
        response = site.page(request, "error.html", status=problem.status_code, words=words)
        if problem.status_code == 429:
            response.headers["retry-after"] = "2"
        return response

    @made.exception_handler(UserError)  # rows that another program wrote, say
    @made.exception_handler(SQLAlchemyError)
    async def failed(request: Request, problem: Exception) -> Response:
        site.complain(problem)
        return site.page(request, "error.html", status=503, words=FAILED)

    @made.middleware("http")
    async def guarded(
        request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        request.scope["root_path"] = root  # whether or not the proxy leaves it in the path
        response = await answer(request)
        for name, value in (HEADERS | (HTTPS_ALONE if site.secure(request) else {})).items():
            response.headers.setdefault(name, value)
        return response

    return made


def serve(
    folder: Path, labels_url: str | None = None, host: str = "127.0.0.1", port: int = 8000,
    names: Iterable[str] = (), *, settings: HandoutSettings | None = None, renew: bool = False,
    public_url: str | None = None, limits: Limits | None = None,
    echo: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve a round's page until interrupted, and print the links of those who are new.

    Args:
        folder: of the round.
        labels_url: SQLAlchemy URL of the labels; default: `folder`/labels.sqlite.
        host: address to listen on. Others than this machine's own need a proxy that speaks
            TLS in front.
        port: 0 takes any that is free.
        names: of the raters to invite.
        settings: how items are handed out.
        renew: make new links also for those invited before; their old links stop working.
        public_url: how links begin, where raters do not reach `host` and `port` themselves:
            the address that their browsers see, such as https://labels.example or
            https://lab.example/labels.
        limits: how much anybody may ask for.
        echo: prints a line.

    Raises:
        UserError: the round or the labels are damaged, the port is taken, or the public URL is
            none.
    """
    import uvicorn

    public, root = place_of(public_url) if public_url is not None else (None, "")
    if labels_url:
        require_lasting(labels_url)
    round_ = Round.read(folder)
    with (
        LabelStore(labels_url or default_url(folder), round_, settings) as store,
        _listening(host, port) as listener,
    ):
        shown = f"[{host}]" if ":" in host else host
        url = public or f"http://{shown}:{listener.getsockname()[1]}"
        for line in invitations(store, names, url + root, renew=renew):
            echo(line)
        pages = app(round_, folder, store, session_key(folder), limits, public, root)
        uvicorn.Server(configured(pages, bool(public))).run(sockets=[listener])


def configured(pages: FastAPI, proxied: bool) -> uvicorn.Config:
    """How a site's pages are served.

    Args:
        pages: what `app` made.
        proxied: whether a proxy says who asks; else anybody here could give another address.
    """
    import uvicorn

    from d3po_bench.feedback.page.connections import Connection, limits

    return uvicorn.Config(
        pages, http=Connection, log_level="error", access_log=False, server_header=False,
        proxy_headers=proxied, backlog=limits()[1], h11_max_incomplete_event_size=16 * 1024,
    )  # fmt: skip


def invitations(
    store: LabelStore, names: Iterable[str], url: str, *, renew: bool = False
) -> Iterator[str]:
    """Invite whoever is new, and the admin: a line for each, with a link that is shown once."""
    # Written in another way, a name would be that of a second rater.
    names = list(dict.fromkeys(unicodedata.normalize("NFC", name.strip()) for name in names))
    known = {rater.name for rater in raters(store)}
    for name in names:
        check_name(name)
        if pool_of([name]) == "simulated":
            raise UserError(
                f"{name!a} is a name of simulated raters, whose votes are not called people's. "
                "Give another."
            )
    yield f"Serving on {url}"
    for name in names:
        if name in known and not renew:
            yield f"{name}: invited before; --renew makes a new link"
        else:
            yield f"{name}: {url}/join#{invite(store, name)}"
    roles: list[tuple[Fact, str]] = [("admin", "/join#{}")]
    if platform := store.round.study.platform:
        field = platform.participant
        roles.append(("platform", f"/start/{{}}?{field}={{{{{{{{%{field}%}}}}}}}}"))
    for role, path in roles:
        if hash_of(store, role) is None or renew:
            yield f"{role}: {url}{path.format(invite_as(store, role))}"
        else:
            yield f"{role}: invited before; --renew makes a new link"


def place_of(url: str) -> tuple[str, str]:
    """A public URL as browsers write it as an Origin, and the path of the page there.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(
        r"(?i:(https?)://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::(\d{1,5}))?)((?:/[A-Za-z0-9._~-]+)*)/?",
        url,
    )
    if found is None or {"", ".", ".."} & {*found[4].split("/")[1:]}:
        raise UserError(
            f"{ascii(url)[:80]} is not a public URL such as https://labels.example. Give scheme "
            "and host, in ASCII, and below that the path at which a proxy shows the page."
        )
    scheme, host, port = (part and part.lower() for part in found.groups()[:3])
    plain = port is None or int(port) == {"http": 80, "https": 443}[scheme]
    return f"{scheme}://{host}" + ("" if plain else f":{int(port)}"), found[4]


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as problem:
        raise UserError(
            f"Cannot listen on {host}:{port}: {problem}. Give another --port or --host."
        ) from problem
