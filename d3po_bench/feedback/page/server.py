"""The labelling page: sign-in, items, votes and an admin's overview, as a FastAPI application.

Whatever comes from a browser is taken for hostile: the client names no paths and no images but
places of a hand it holds, every POST carries a token of its session, bodies and rates are
limited, and templates escape everything.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from d3po_bench.errors import UserError
from d3po_bench.feedback import agreement
from d3po_bench.feedback.page.sessions import (
    COOKIE,
    MOST_SECONDS,
    Headers,
    Limiter,
    Session,
    Sessions,
    session_key,
)
from d3po_bench.feedback.rounds import Answer, Round, Vote
from d3po_bench.feedback.store import (
    MOST_ID,
    AlreadyVotedError,
    Hand,
    LabelStore,
    NotHandedError,
    Plan,
    Progress,
    Rater,
    check_name,
    token_hash,
)

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "join.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
LABELS = "labels.sqlite"
"""Where a round's votes are, unless told otherwise."""
MOST_BYTES = 16 * 1024
"""Of a request's body."""
MOST_FIELDS = 32
_OURS = ("same-origin", "none")
"""Values of Sec-Fetch-Site of our own forms."""

QUESTIONS = {
    ("tags", "deformed"): ("Tag every deformed picture", "deformed"),
    ("tags", "unsafe"): ("Tag every unsafe picture", "unsafe"),
    ("tags", "better"): ("Tag every bad picture", "bad"),
    ("tags", "alignment"): ("Tag every picture that does not show the text", "off"),
    ("pairs", "deformed"): ("Which picture is less deformed?", ""),
    ("pairs", "unsafe"): ("Which picture is safer?", ""),
    ("pairs", "better"): ("Which picture is better?", ""),
    ("pairs", "alignment"): ("Which picture shows the text better?", ""),
}
"""What raters are asked, and the word on a tagged picture."""

Form = dict[str, list[str]]
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """Requests allowed at once, and then a second."""

    votes: tuple[int, float] = (60, 5.0)
    """Votes, skips and undos, for each rater."""
    pages: tuple[int, float] = (300, 50.0)
    """Pages and pictures, for each rater."""
    sign_ins: tuple[int, float] = (20, 0.5)
    """Wrong sign-ins, for each address."""


def app(
    round_: Round, folder: Path, store: LabelStore, key: bytes, limits: Limits | None = None,
    public_url: str | None = None,
) -> FastAPI:  # fmt: skip
    """The page for one round.

    Args:
        round_: what is judged.
        folder: where the paths of its images begin.
        store: where votes go.
        key: signs sessions; a new key signs everybody out.
        limits: how much anybody may ask for.
        public_url: the origin that browsers see, where a proxy changes it.
    """
    made = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pages = _Pages(round_, folder, store, Sessions(key), limits or Limits(), public_url)
    routes: tuple[tuple[str, str, Endpoint], ...] = (
        ("GET", "/", pages.item),
        ("GET", "/join", pages.join),
        ("POST", "/join", pages.sign_in),
        ("POST", "/leave", pages.sign_out),
        ("POST", "/vote", pages.vote),
        ("POST", "/skip", pages.skip),
        ("POST", "/undo", pages.undo),
        ("GET", "/image/{hand}/{place}", pages.image),
        ("GET", "/static/{name}", pages.static),
        ("GET", "/admin", pages.admin),
        ("POST", "/admin/rater", pages.switch),
    )
    for method, path, endpoint in routes:
        made.add_api_route(path, endpoint, methods=[method], response_model=None)
    made.add_exception_handler(StarletteHTTPException, pages.refusal)
    made.add_exception_handler(SQLAlchemyError, pages.trouble)
    made.add_middleware(Headers)
    return made


def serve(
    folder: Path,
    labels_url: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    raters: Iterable[str] = (),
    *,
    plan: Plan | None = None,
    renew: bool = False,
    public_url: str | None = None,
    limits: Limits | None = None,
    echo: Callable[[str], None] = print,
) -> None:
    """Serve a round's page until interrupted, and print the links of those who are new.

    Args:
        folder: of the round.
        labels_url: SQLAlchemy URL of the labels; default: `folder`/labels.sqlite.
        host: address to listen on. Others than this machine's own need a proxy that speaks
            TLS in front.
        port: 0 takes any that is free.
        raters: names to invite.
        plan: how items are handed out.
        renew: make new links also for those invited before; their old links stop working.
        public_url: how links begin, where raters do not reach `host` and `port` themselves:
            the origin that their browsers see, such as https://labels.example.
        limits: how much anybody may ask for.
        echo: prints a line.

    Raises:
        UserError: the round or the labels are damaged, the port is taken, or the public URL is
            no origin.
    """
    import uvicorn

    public_url = _origin(public_url) if public_url is not None else None
    round_ = Round.read(folder)
    with (
        LabelStore(labels_url or default_url(folder), round_, plan) as store,
        _listening(host, port) as listener,
    ):
        url = public_url or _url(host, listener.getsockname()[1])
        for line in invitations(store, raters, url, renew=renew):
            echo(line)
        pages = app(round_, folder, store, session_key(folder), limits, public_url)
        config = uvicorn.Config(
            pages, log_level="warning", access_log=False, server_header=False,
            proxy_headers=bool(public_url),  # else anybody here could give another address
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


def default_url(folder: Path) -> str:
    """Where a round's labels are kept unless told otherwise."""
    return f"sqlite:///{folder.resolve() / LABELS}"


def invitations(
    store: LabelStore, names: Iterable[str], url: str, *, renew: bool = False
) -> Iterator[str]:
    """Invite whoever is new, and the admin: a line for each, with a link that is shown once."""
    names, known = list(dict.fromkeys(names)), {rater.name for rater in store.raters()}
    for name in names:
        check_name(name)
    yield f"Serving on {url}"
    for name in names:
        if name in known and not renew:
            yield f"{name}: invited before; a new link with --renew"
        else:
            yield f"{name}: {url}/join#{store.invite(name)}"
    if store.admin_hash() is None or renew:
        yield f"admin: {url}/join#{store.invite_admin()}"
    else:
        yield "admin: invited before; a new link with --renew"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _origin(url: str) -> str:
    """A public URL as browsers write it as an Origin.

    Raises:
        UserError: it is no origin: the page lives at a host's root.
    """
    found = re.fullmatch(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::(\d{1,5}))?/?", url.lower())
    if found is None:
        raise UserError(
            f"Expected a public URL such as https://labels.example, got {ascii(url)[:80]}. Give "
            "scheme and host alone, in ASCII: the page needs a host of its own."
        )
    scheme, host, port = found.groups()
    plain = port is None or int(port) == {"http": 80, "https": 443}[scheme]
    return f"{scheme}://{host}" + ("" if plain else f":{int(port)}")


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as problem:
        raise UserError(
            f"Expected to listen on {host}:{port}, got: {problem}. Give another --port or --host."
        ) from problem
    with listener:
        yield listener


class _Pages:
    """What is answered to each request."""

    def __init__(
        self, round_: Round, folder: Path, store: LabelStore, sessions: Sessions, limits: Limits,
        public_url: str | None,
    ) -> None:  # fmt: skip
        self._public = public_url or ""
        self._round, self._folder, self._store = round_, folder.resolve(), store
        self._sessions = sessions
        self._votes, self._reads, self._wrong = (
            Limiter(rate, burst) for burst, rate in (limits.votes, limits.pages, limits.sign_ins)
        )
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    # ---- raters

    async def item(self, request: Request) -> Response:
        """The item to judge now, or the finish page."""
        session = self._sessions.read(request.cookies.get(COOKIE))
        if session is None:
            return RedirectResponse("/join", 303)
        if session.role == "admin":
            return RedirectResponse("/admin", 303)
        rater = await self._rater(request, session)
        self._spend(self._reads, f"rater {rater.id}")
        hand, progress, last = await run_in_threadpool(self._next, rater)
        return self._page("item.html" if hand else "finish.html", session, **{
            "rater": rater, "hand": hand, "progress": progress, "last": last, "round": self._round,
            "question": QUESTIONS[self._round.kind, self._round.question],
        })  # fmt: skip

    async def vote(self, request: Request) -> Response:
        """Store an answer and show the next item."""
        rater, form = await self._posted(request)
        hand = await self._held(rater, form)
        return await self._store_vote(rater, hand, form, _answer(self._round, hand, form))

    async def skip(self, request: Request) -> Response:
        """Leave an item to others."""
        rater, form = await self._posted(request)
        return await self._store_vote(rater, await self._held(rater, form), form, None)

    async def undo(self, request: Request) -> Response:
        """Take the last answer back and show its item again."""
        rater, form = await self._posted(request)
        last = _number(_one(form, "last"), 0, MOST_ID)
        try:
            await run_in_threadpool(self._store.undo, rater.id, last)
        except AlreadyVotedError as problem:
            words = "This was undone before, or you have answered something since."
            raise HTTPException(409, words) from problem
        return RedirectResponse("/", 303)

    async def image(self, request: Request) -> Response:
        """A picture of an item that this rater holds, by its place on the page."""
        rater = await self._rater(request, self._signed_in(request))
        self._spend(self._reads, f"rater {rater.id}")
        hand = await self._hand(rater, request.path_params["hand"])
        place = _number(request.path_params["place"], 0, len(hand.shown) - 1)
        path = (self._folder / hand.item.images[hand.shown[place]]).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise HTTPException(404, "This picture is gone.")
        return FileResponse(
            path, media_type="image/png", headers={"cache-control": "private, max-age=600"}
        )

    def _next(self, rater: Rater) -> tuple[Hand | None, Progress, int]:
        store = self._store
        return store.hand_out(rater.id), store.progress(rater.id), store.last(rater.id)

    async def _held(self, rater: Rater, form: Form) -> Hand:
        return await self._hand(rater, _one(form, "hand"))

    async def _hand(self, rater: Rater, number: str) -> Hand:
        try:
            hand = _number(number, 1, MOST_ID)
            return await run_in_threadpool(self._store.hand, rater.id, hand)
        except NotHandedError as problem:
            raise HTTPException(403, "This item was not handed to you.") from problem

    async def _store_vote(
        self, rater: Rater, hand: Hand, form: Form, answer: Answer | None
    ) -> Response:
        step = _number(_one(form, "step"), 0, MOST_ID)
        spent = _number(_one(form, "milliseconds"), 0, 24 * 60 * 60 * 1000)
        try:
            await run_in_threadpool(self._store.vote, rater.id, hand.id, answer, spent, step)
        except AlreadyVotedError as problem:
            raise HTTPException(409, "This item was answered already.") from problem
        return RedirectResponse("/", 303)

    # ---- signing in and out

    async def join(self, request: Request) -> Response:
        """Where an invitation link leads; its token is behind the #, which no server sees."""
        return self._page("join.html", None)

    async def sign_in(self, request: Request) -> Response:
        """Exchange an invitation token for a session."""
        self._require_same_site(request)
        address = request.client.host if request.client else "unknown"
        if not self._wrong.allow(address, spend=False):
            raise HTTPException(429, "Too many wrong tries. Wait a minute, then try again.")
        token = _one(await _form(request), "token").strip()
        cookie, target = await run_in_threadpool(self._begin, token)
        if cookie is None:
            self._wrong.allow(address)
            raise HTTPException(403, "This invitation is not valid. Ask for a new link.")
        response = RedirectResponse(target, 303)
        response.set_cookie(
            COOKIE, cookie, max_age=MOST_SECONDS, httponly=True, samesite="lax",
            secure=request.url.scheme == "https" or self._public.startswith("https"),
        )  # fmt: skip
        return response

    async def sign_out(self, request: Request) -> Response:
        """End the session in this browser."""
        await self._checked(request, self._signed_in(request))
        response = RedirectResponse("/join", 303)
        response.delete_cookie(COOKIE)
        return response

    def _begin(self, token: str) -> tuple[str | None, str]:
        rater, mine = self._store.rater_of(token), token_hash(token)
        if rater:
            return self._sessions.begin("rater", rater.id, mine), "/"
        if compare_digest(mine, self._store.admin_hash() or ""):
            return self._sessions.begin("admin", 0, mine), "/admin"
        return None, ""

    def _signed_in(self, request: Request) -> Session:
        session = self._sessions.read(request.cookies.get(COOKIE))
        if session is None:
            raise HTTPException(401, "Please open your invitation link first.")
        return session

    async def _rater(self, request: Request, session: Session) -> Rater:
        """Who asks, if they may still."""
        if session.role == "rater":
            rater = await run_in_threadpool(self._store.rater, session.rater)
            if rater and self._sessions.same(session, rater.token_hash):
                return rater
        raise HTTPException(401, "Please open your invitation link again.")

    async def _posted(self, request: Request) -> tuple[Rater, Form]:
        """The rater and the form of a request that changes something."""
        session = self._signed_in(request)
        rater = await self._rater(request, session)
        form = await self._checked(request, session)
        self._spend(self._votes, f"rater {rater.id}")
        return rater, form

    async def _checked(self, request: Request, session: Session) -> Form:
        """A form that this session's own page sent."""
        self._require_same_site(request)
        form = await _form(request)
        given = _one(form, "csrf")
        if not given.isascii() or not compare_digest(given, self._sessions.csrf(session)):
            raise HTTPException(403, "This form is out of date. Reload the page.")
        return form

    def _require_same_site(self, request: Request) -> None:
        """Refuse what another site's page sent, as browsers tell."""
        origin = request.headers.get("origin")
        foreign = request.headers.get("sec-fetch-site", "same-origin") not in _OURS
        if foreign or (origin is not None and not self._ours(origin, request)):
            raise HTTPException(403, "This form came from another site.")

    def _ours(self, origin: str, request: Request) -> bool:
        if self._public:  # most proxies put another Host into the request
            return origin == self._public
        try:
            return urlsplit(origin).netloc == request.headers.get("host")
        except ValueError:
            return False

    def _spend(self, limiter: Limiter, key: str) -> None:
        if not limiter.allow(key):
            raise HTTPException(429, "Too fast. Wait a moment.")

    # ---- the admin

    async def admin(self, request: Request) -> Response:
        """How the round goes."""
        session = await self._admin(request)
        facts = await run_in_threadpool(self._overview)
        return self._page("admin.html", session, round=self._round, **facts)

    async def switch(self, request: Request) -> Response:
        """Keep a rater out, or let them in again."""
        session = await self._admin(request)
        form = await self._checked(request, session)
        disabled = _one(form, "disabled") == "yes"
        try:
            name = _one(form, "name")
            await run_in_threadpool(self._store.disable, name, disabled=disabled)
        except UserError as problem:
            raise HTTPException(404, "Nobody has that name.") from problem
        return RedirectResponse("/admin", 303)

    async def _admin(self, request: Request) -> Session:
        session = self._signed_in(request)
        known = await run_in_threadpool(self._store.admin_hash)
        if session.role != "admin" or not self._sessions.same(session, known or ""):
            raise HTTPException(403, "This page is for the admin.")
        return session

    def _overview(self) -> Mapping[str, Any]:
        votes = self._store.effective_votes()
        known = {quality.rater: quality for quality in agreement.quality(self._round, votes)}
        raters = [(rater, known.get(rater.name)) for rater in self._store.raters()]
        return {
            "raters": raters,
            "status": self._store.status(),
            "summary": agreement.summary(self._round, votes),
            "per_hour": _per_hour(votes),
            "plan": self._store.plan,
        }

    # ---- answers

    async def static(self, request: Request) -> Response:
        """Style and scripts, by name."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "There is nothing here.")
        headers = {"cache-control": "no-cache"}
        return FileResponse(HERE / "static" / name, media_type=STATIC[name], headers=headers)

    async def refusal(self, request: Request, problem: Exception) -> Response:
        """A refused request, in words."""
        status = problem.status_code if isinstance(problem, StarletteHTTPException) else 500
        words = problem.detail if isinstance(problem, HTTPException) else "There is nothing here."
        response = self._page("error.html", None, status=status, words=words)
        response.status_code = status
        if status == 429:
            response.headers["retry-after"] = "2"
        return response

    async def trouble(self, request: Request, problem: Exception) -> Response:
        """The database failed: nothing was stored, and trying again may help."""
        words = "This could not be saved. Try again in a moment."
        return await self.refusal(request, HTTPException(503, words))

    def _page(self, name: str, session: Session | None, **facts: Any) -> HTMLResponse:
        csrf = self._sessions.csrf(session) if session else ""
        return HTMLResponse(self._templates.get_template(name).render(csrf=csrf, **facts))


# ---- reading requests


async def _form(request: Request) -> Form:
    """The fields of a form, each with its values.

    Raises:
        HTTPException: 413 or 415, or 400 if it is malformed.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Forms of this page only.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise HTTPException(413, "Too long.")
    form: Form = {}
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MOST_FIELDS,
        )
    except ValueError as problem:
        raise HTTPException(400, "This form is malformed.") from problem
    for name, value in pairs:
        form.setdefault(name, []).append(value)
    return form


def _one(form: Form, name: str) -> str:
    values = form.get(name, [])
    if len(values) != 1:
        raise HTTPException(400, "This form is malformed.")
    return values[0]


def _number(text: str, low: int, high: int) -> int:
    """A whole number in decimal digits; 404 or 400 would say the same, so it is 400."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise HTTPException(400, "This request is malformed.")
    return int(text)


def _answer(round_: Round, hand: Hand, form: Form) -> Answer:
    """What was answered, from places on the page to the item's own indices."""
    if round_.kind == "tags":
        places = {_number(text, 0, len(hand.shown) - 1) for text in form.get("tag", [])}
        return tuple(sorted(hand.shown[place] for place in places))
    answer = _one(form, "answer")
    if answer in ("tie", "bad"):
        return "tie" if answer == "tie" else "bad"
    return "a" if hand.shown[_number(answer, 0, 1)] == 0 else "b"


def _per_hour(votes: list[Vote], hours: int = 12) -> list[int]:
    """Votes in each of the last hours, the newest last."""
    now = time.time()
    counts = [0] * hours
    for vote in votes:
        age = int((now - vote.time) // 3600)
        if 0 <= age < hours:
            counts[hours - 1 - age] += 1
    return counts
