"""Who asks for what: sessions, forms and rates, checked before a request is answered.

Whatever comes from a browser is taken for hostile: the client names no paths and no images but
places of a hand it holds, every POST carries a token of its session, bodies and rates are
limited, and templates escape everything.
"""

from __future__ import annotations

import hashlib
import json
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import ClientDisconnect

from d3po_bench.digests import sha256_of
from d3po_bench.feedback.invitations import (
    Rater,
    admin_hash,
    find_rater,
    has_left,
    leave,
    token_hash,
)
from d3po_bench.feedback.page import sessions
from d3po_bench.feedback.page.sessions import Limiter, Limits, Session
from d3po_bench.feedback.rounds import FILES, Item, Round
from d3po_bench.feedback.store import LabelStore
from d3po_bench.feedback.votes import Tally

MOST_BYTES = 16 * 1024
"""Of a request's body."""
MOST_FIELDS = 32


def digests_of(round_: Round, folder: Path) -> dict[str, str]:
    """SHA-256 of each picture: as recorded when the round was made, or else as it is now."""
    names = [name for item in round_.items for name in item.images]
    recorded = json.loads((folder / FILES).read_bytes()) if (folder / FILES).exists() else {}
    return {name: recorded.get(name) or sha256_of(folder / name) for name in names}


class Form(dict[str, list[str]]):
    """The fields of a form, each with its values."""

    def one(self, name: str) -> str:
        """The only value of a field; 400 if there is none, or more than one."""
        values = self.get(name, [])
        if len(values) != 1:
            raise HTTPException(400, "This form is malformed.")
        return values[0]

    def number(self, name: str, low: int, high: int) -> int:
        """The only value of a field, as `number`."""
        return number(self.one(name), low, high)


def number(text: str, low: int, high: int) -> int:
    """A whole number in decimal digits; 400 if it is anything else, or out of range."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise HTTPException(400, "This request is malformed.")
    return int(text)


class Site:
    """A round's page: what every request needs."""

    def __init__(
        self, round_: Round, folder: Path, store: LabelStore, key: bytes, limits: Limits,
        public_url: str | None,
    ) -> None:  # fmt: skip
        self.round, self.folder, self.store = round_, folder.resolve(), store
        self.sessions = sessions.Sessions(key)
        self.votes, self.reads, self.sign_ins = (
            Limiter(*allowed) for allowed in (limits.votes, limits.pages, limits.sign_ins)
        )
        self.public_url = public_url or ""
        self.tally = Tally(store)
        self._pictures = digests_of(round_, self.folder)
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip

    def page(
        self, name: str, session: Session | None = None, status: int = 200, **facts: Any
    ) -> Response:
        """A template, whose forms are those of the session."""
        csrf = self.sessions.csrf(session) if session else ""
        text = self._templates.get_template(name).render(csrf=csrf, status=status, **facts)
        return HTMLResponse(text, status)

    def session(self, request: Request) -> Session | None:
        """Who is signed in, as the cookie says."""
        session = self.sessions.read(request.cookies.get(self.sessions.cookie))
        return None if session is None or has_left(self.store, session.nonce) else session

    def secure(self, request: Request) -> bool:
        """Whether browsers come by https."""
        return (self.public_url or request.url.scheme).startswith("https")

    def picture(self, name: str) -> bytes:
        """A picture of the round, as it was when the round was made; 503 if it is another now."""
        path = (self.folder / name).resolve()
        try:
            data = path.read_bytes() if path.is_relative_to(self.folder) else b""
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() != self._pictures[name]:
            raise HTTPException(503, "A picture was changed or is gone. Tell whoever invited you.")
        return data

    def require_pictures(self, item: Item) -> None:
        """Refuse to show or to judge an item whose pictures are others now: 503."""
        for name in item.images:
            self.picture(name)

    def rater(self, session: Session) -> Rater:
        """Who asks; 401 if they no longer may."""
        rater = find_rater(self.store, id_=session.rater) if session.role == "rater" else None
        if rater is None or not self.sessions.same(session, rater.token_hash):
            raise HTTPException(401, "Please open your invitation link again.")
        return rater


def spend(limiter: Limiter, rater: Rater) -> None:
    """Count a request of this rater; 429 if there were too many."""
    if not limiter.allow(f"rater {rater.id}"):
        raise HTTPException(429, "Too fast. Wait a moment.")


# ---- what a request depends on, in the order of a handler's arguments


async def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


ThisSite = Annotated[Site, Depends(_site)]


def _signed_in(request: Request, site: ThisSite) -> Session:
    session = site.session(request)
    if session is None:
        raise HTTPException(401, "Please open your invitation link first.")
    return session


SignedIn = Annotated[Session, Depends(_signed_in)]


def _asking(site: ThisSite, session: SignedIn) -> Rater:
    return site.rater(session)


Asking = Annotated[Rater, Depends(_asking)]
"""A rater who is signed in."""


def _admin(site: ThisSite, session: SignedIn) -> Session:
    known = admin_hash(site.store)
    if session.role != "admin" or not site.sessions.same(session, known or ""):
        raise HTTPException(403, "This page is for the admin.")
    return session


Admin = Annotated[Session, Depends(_admin)]
"""The admin's session."""


async def _same_site_form(request: Request, site: ThisSite) -> Form:
    """A small form that is not from another site's page, as browsers tell."""
    told, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    ours = told in (None, "same-origin", "none")
    # most proxies put another Host into the request
    own = site.public_url or f"{request.url.scheme}://{request.headers.get('host')}"
    ours = ours and origin in (None, own)
    if not ours:
        raise HTTPException(403, "This form came from another site.")
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Only this page's own forms are taken.")
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise HTTPException(413, "This form is too long.")
    except ClientDisconnect as problem:  # nobody is left to read this
        raise HTTPException(400, "This form is not whole.") from problem
    form = Form()
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict",
            max_num_fields=MOST_FIELDS,
        )  # fmt: skip
    except ValueError as problem:
        raise HTTPException(400, "This form is malformed.") from problem
    for name, value in pairs:
        form.setdefault(name, []).append(value)
    return form


SameSiteForm = Annotated[Form, Depends(_same_site_form)]


async def _own_form(site: ThisSite, session: SignedIn, form: SameSiteForm) -> Form:
    given = form.one("csrf")
    if not given.isascii() or not compare_digest(given, site.sessions.csrf(session)):
        raise HTTPException(403, "This form is out of date. Reload the page.")
    return form


OwnForm = Annotated[Form, Depends(_own_form)]
"""A form that this session's own page sent."""


async def _vote_form(site: ThisSite, rater: Asking, form: OwnForm) -> Form:
    spend(site.votes, rater)
    return form


VoteForm = Annotated[Form, Depends(_vote_form)]
"""A rater's own form, counted: votes are limited."""


# ---- signing in and out

router = APIRouter()


@router.get("/join")
def join(site: ThisSite) -> Response:
    """Where an invitation link leads; its token is behind the #, which no server sees."""
    return site.page("join.html")


@router.post("/join")
def sign_in(request: Request, site: ThisSite, form: SameSiteForm) -> Response:
    """Exchange an invitation token for a session."""
    address = request.client.host if request.client else "unknown"
    token = form.one("token").strip()
    rater, mine = find_rater(site.store, token=token), token_hash(token)
    if rater is None and not compare_digest(mine, admin_hash(site.store) or ""):
        # Many raters may share an address: however often others failed there, a valid link works.
        if not site.sign_ins.allow(address):
            raise HTTPException(429, "Too many failed attempts. Wait a minute, then try again.")
        raise HTTPException(403, "This invitation is not valid. Ask for a new link.")
    if rater:
        target, cookie = "/", site.sessions.begin("rater", rater.id, mine)
    else:
        target, cookie = "/admin", site.sessions.begin("admin", 0, mine)
    response = RedirectResponse(target, 303)
    response.set_cookie(
        site.sessions.cookie, cookie, max_age=sessions.MOST_SECONDS, httponly=True,
        samesite="lax", secure=site.secure(request),
    )  # fmt: skip
    return response


@router.post("/leave")
def sign_out(site: ThisSite, session: SignedIn, form: OwnForm) -> Response:
    """End the session, here and for whoever has a copy of its cookie."""
    leave(site.store, session.nonce, sessions.MOST_SECONDS)
    response = RedirectResponse("/join", 303)
    response.delete_cookie(site.sessions.cookie)
    return response
