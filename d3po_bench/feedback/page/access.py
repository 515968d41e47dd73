"""Who asks for what: sessions, forms and rates, checked before a request is answered.

Whatever comes from a browser is taken for hostile: the client names no paths and no images but
places of a hand it holds, every POST carries a token of its session, bodies and rates are
limited, and templates escape everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import ClientDisconnect

from d3po_bench.digests import sha256_of
from d3po_bench.feedback.invitations import (
    Rater,
    find_rater,
    has_left,
    hash_of,
    leave,
    token_hash,
)
from d3po_bench.feedback.page import sessions, words
from d3po_bench.feedback.page.sessions import Limiter, Limits, Role, Session
from d3po_bench.feedback.rounds import FILES, Item, Round
from d3po_bench.feedback.store import LabelStore
from d3po_bench.feedback.votes import Tally

MOST_BYTES = 16 * 1024
"""Of a request's body."""
MOST_FIELDS = 32


def digests_of(round_: Round, folder: Path) -> dict[str, str]:
    """SHA-256 of each picture: as recorded when the round was made, or else as it is now."""
    names = {name for item in (*round_.groups, *round_.items) for name in item.images}
    names |= {name for item in round_.study.example for name in item.pictures}
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


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = (words.said, words.asked, words.word_on_tag, words.in_words, words.marks)
    made.globals |= {function.__name__: function for function in shown}
    return made


def _kept(request: Request) -> str:
    """What the address asks for besides a language, for the links that change the language."""
    kept = [(k, v) for k, v in request.query_params.multi_items() if k != "lang"]
    return urlencode(kept)[:500] if request.method == "GET" else ""


class Site:
    """A round's page: what every request needs."""

    def __init__(
        self, round_: Round, folder: Path, store: LabelStore, key: bytes, limits: Limits,
        public_url: str | None, root: str = "",
    ) -> None:  # fmt: skip
        self.round, self.folder, self.store = round_, folder.resolve(), store
        self.sessions = sessions.Sessions(key)
        self.votes, self.reads, self.sign_ins = (
            Limiter(*allowed) for allowed in (limits.votes, limits.pages, limits.sign_ins)
        )
        self.public_url, self.root = public_url or "", root
        self.tally = Tally(store)
        self._complaints: set[str] = set()
        self._pictures = digests_of(round_, self.folder)

    def page(
        self, request: Request, name: str, session: Session | None = None, status: int = 200,
        **facts: Any,
    ) -> Response:  # fmt: skip
        """A template in the browser's language, whose forms are those of the session."""
        language = words.choose(request)
        text = _templates().get_template(name).render(
            csrf=self.sessions.csrf(session) if session else "", status=status, root=self.root,
            language=language, w=words.ALL[language], languages=words.LANGUAGES,
            study=self.round.study, names=words.ALL, keep=_kept(request), **facts,
        )  # fmt: skip
        response = HTMLResponse(text, status)
        if request.query_params.get("lang") == language:
            response.set_cookie(
                words.COOKIE, language, max_age=31_536_000, path=self.root or "/", httponly=True,
                samesite="lax", secure=self.secure(request),
            )  # fmt: skip
        return response

    def complain(self, problem: Exception) -> None:
        """Say on the terminal what failed, once: raters' pages try again and again."""
        reason = str(getattr(problem, "orig", None) or problem)  # without the values of the query
        if reason not in self._complaints:
            self._complaints.add(reason)
            logging.getLogger("uvicorn.error").error(reason)

    def moved(self, path: str) -> RedirectResponse:
        """To another of these pages."""
        return RedirectResponse(self.root + path, 303)

    def sign_in(self, request: Request, role: Role, rater: int, token: str) -> Response:
        """To the first page of somebody who shows a token, with the cookie of a new session."""
        response = self.moved("/admin" if role == "admin" else "/")
        response.set_cookie(
            self.sessions.cookie, self.sessions.begin(role, rater, token_hash(token)),
            max_age=sessions.MOST_SECONDS, path=self.root or "/", httponly=True, samesite="lax",
            secure=self.secure(request),
        )  # fmt: skip
        return response

    def sign_out(self, session: Session, response: Response) -> Response:
        """End a session, here and for whoever has a copy of its cookie."""
        leave(self.store, session.nonce, sessions.MOST_SECONDS)
        response.delete_cookie(self.sessions.cookie, path=self.root or "/")
        return response

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

    def png(self, name: str) -> Response:
        """A picture of the round as an answer."""
        headers = {"cache-control": "private, max-age=600"}
        return Response(self.picture(name), media_type="image/png", headers=headers)

    def require_pictures(self, item: Item) -> None:
        """Refuse to show or to judge an item whose pictures are others now: 503."""
        for name in item.images:
            self.picture(name)

    def known_rater(self, session: Session) -> Rater | None:
        """Who asks; None if they no longer may, or it is the admin."""
        rater = find_rater(self.store, id_=session.rater) if session.role == "rater" else None
        return rater if rater and self.sessions.same(session, rater.token_hash) else None

    def rater(self, session: Session) -> Rater:
        """Who asks; 401 if they no longer may."""
        rater = self.known_rater(session)
        if rater is None:
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
    known = hash_of(site.store)
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
def join(request: Request, site: ThisSite) -> Response:
    """Where an invitation link leads; its token is behind the #, which no server sees."""
    return site.page(request, "join.html")


@router.post("/join")
def sign_in(request: Request, site: ThisSite, form: SameSiteForm) -> Response:
    """Exchange an invitation token for a session."""
    token = form.one("token").strip()
    rater = find_rater(site.store, token=token)
    if rater is None:
        require_link(request, site, token, hash_of(site.store))
        return site.sign_in(request, "admin", 0, token)
    return site.sign_in(request, "rater", rater.id, token)


def require_link(request: Request, site: Site, token: str, known: str | None) -> None:
    """Refuse a token that is not the one whose hash is known; 403, and 429 after many."""
    if compare_digest(token_hash(token), known or ""):
        return
    # Many raters may share an address: however often others failed there, a valid link works.
    if not site.sign_ins.allow(request.client.host if request.client else "unknown"):
        raise HTTPException(429, "Too many failed attempts. Wait a minute, then try again.")
    raise HTTPException(403, "This invitation is not valid. Ask for a new link.")


@router.post("/leave")
def sign_out(site: ThisSite, session: SignedIn, form: OwnForm) -> Response:
    """End the session, here and for whoever has a copy of its cookie."""
    return site.sign_out(session, site.moved("/join"))
