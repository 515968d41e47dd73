"""What raters and the admin are answered: items, votes, pictures, and the overview."""

from __future__ import annotations

import time
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from d3po_bench.errors import UserError
from d3po_bench.feedback import agreement
from d3po_bench.feedback.handout import (
    MOST_ID,
    Hand,
    NotHandedError,
    find_hand,
    hand_out,
    progress,
)
from d3po_bench.feedback.invitations import Rater, disable, raters
from d3po_bench.feedback.page.access import (
    Admin,
    Asking,
    Form,
    OwnForm,
    Site,
    ThisSite,
    VoteForm,
    number,
    one,
    spend,
)
from d3po_bench.feedback.rounds import Vote
from d3po_bench.feedback.schema import Answer, check_answer
from d3po_bench.feedback.votes import (
    MOST_MILLISECONDS,
    AlreadyVotedError,
    cast_vote,
    effective_votes,
    last_vote,
    round_progress,
    undo_vote,
)

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "join.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
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

router = APIRouter()


@router.get("/")
def item(request: Request, site: ThisSite) -> Response:
    """The item to judge now, or the finish page."""
    session = site.session(request)
    if session is None:
        return RedirectResponse("/join", 303)
    if session.role == "admin":
        return RedirectResponse("/admin", 303)
    rater = site.rater(session)
    spend(site.reads, rater)
    hand = hand_out(site.store, rater.id)
    return site.page(
        "item.html" if hand else "finish.html", session, rater=rater, hand=hand, round=site.round,
        progress=progress(site.store, rater.id), last=last_vote(site.store, rater.id),
        question=QUESTIONS[site.round.kind, site.round.question],
    )  # fmt: skip


@router.post("/vote")
def vote(site: ThisSite, rater: Asking, form: VoteForm) -> Response:
    """Store an answer and show the next item."""
    hand = _hand(site, rater, one(form, "hand"))
    return _stored(site, rater, hand, form, _answer(site, hand, form))


@router.post("/skip")
def skip(site: ThisSite, rater: Asking, form: VoteForm) -> Response:
    """Leave an item to others."""
    return _stored(site, rater, _hand(site, rater, one(form, "hand")), form, None)


@router.post("/undo")
def undo(site: ThisSite, rater: Asking, form: VoteForm) -> Response:
    """Take the last answer back and show its item again."""
    try:
        undo_vote(site.store, rater.id, number(one(form, "last"), 0, MOST_ID))
    except AlreadyVotedError as problem:
        words = "This was undone before, or you have answered something since."
        raise HTTPException(409, words) from problem
    return RedirectResponse("/", 303)


@router.get("/image/{hand}/{place}")
def image(site: ThisSite, rater: Asking, hand: str, place: str) -> Response:
    """A picture of an item that this rater holds, by its place on the page."""
    spend(site.reads, rater)
    held = _hand(site, rater, hand)
    index = held.shown[number(place, 0, len(held.shown) - 1)]
    path = (site.folder / held.item.images[index]).resolve()
    if not path.is_relative_to(site.folder) or not path.is_file():
        raise HTTPException(404, "This picture is gone.")
    headers = {"cache-control": "private, max-age=600"}
    return FileResponse(path, media_type="image/png", headers=headers)


def _hand(site: Site, rater: Rater, text: str) -> Hand:
    try:
        return find_hand(site.store, rater.id, number(text, 1, MOST_ID))
    except NotHandedError as problem:
        raise HTTPException(403, "This item was not handed to you.") from problem


def _answer(site: Site, hand: Hand, form: Form) -> Answer:
    """What was answered, from places on the page to the item's own indices."""
    if site.round.kind == "tags":
        places = {number(text, 0, len(hand.shown) - 1) for text in form.get("tag", [])}
        return tuple(sorted(hand.shown[place] for place in places))
    answer = one(form, "answer")
    if answer in ("tie", "bad"):
        return check_answer("pairs", 2, answer)
    return "a" if hand.shown[number(answer, 0, 1)] == 0 else "b"


def _stored(site: Site, rater: Rater, hand: Hand, form: Form, answer: Answer | None) -> Response:
    step = number(one(form, "step"), 0, MOST_ID)
    spent = number(one(form, "milliseconds"), 0, MOST_MILLISECONDS)
    try:
        cast_vote(site.store, rater.id, hand.id, answer, spent, step)
    except AlreadyVotedError as problem:
        raise HTTPException(409, "This item was answered already.") from problem
    return RedirectResponse("/", 303)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """Style and scripts, by name."""
    if name not in STATIC:
        raise HTTPException(404, "There is no such page.")
    headers = {"cache-control": "no-cache"}
    return FileResponse(HERE / "static" / name, media_type=STATIC[name], headers=headers)


# ---- the admin


@router.get("/admin")
def overview(site: ThisSite, session: Admin) -> Response:
    """How the round goes."""
    votes = effective_votes(site.store)
    known = {quality.rater: quality for quality in agreement.quality(site.round, votes)}
    return site.page(
        "admin.html", session, summary=agreement.summary(site.round, votes),
        raters=[(rater, known.get(rater.name)) for rater in raters(site.store)],
        progress=round_progress(site.store, votes), per_hour=_per_hour(votes),
        votes_per_item=site.store.settings.votes_per_item,
    )  # fmt: skip


@router.post("/admin/rater")
def switch(site: ThisSite, session: Admin, form: OwnForm) -> Response:
    """Keep a rater out, or let them in again."""
    try:
        disable(site.store, one(form, "name"), disabled=one(form, "disabled") == "yes")
    except UserError as problem:
        raise HTTPException(404, "Nobody has that name.") from problem
    return RedirectResponse("/admin", 303)


def _per_hour(votes: list[Vote], hours: int = 12) -> list[int]:
    """Votes in each of the last hours, the newest last."""
    now = time.time()
    counts = [0] * hours
    for vote in votes:
        age = int((now - vote.time) // 3600)
        if 0 <= age < hours:
            counts[hours - 1 - age] += 1
    return counts
