"""What raters and the admin are answered: items, votes, pictures, and the overview."""

from __future__ import annotations

import time
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from d3po_bench.errors import UserError
from d3po_bench.feedback import agreement, handout, invitations, votes
from d3po_bench.feedback.handout import MOST_ID, Hand
from d3po_bench.feedback.invitations import Rater
from d3po_bench.feedback.page import access
from d3po_bench.feedback.rounds import Vote
from d3po_bench.feedback.schema import Answer, check_answer

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
def item(request: Request, site: access.ThisSite) -> Response:
    """The item to judge now, or the finish page."""
    session = site.session(request)
    if session is None:
        return RedirectResponse("/join", 303)
    if session.role == "admin":
        return RedirectResponse("/admin", 303)
    rater = site.rater(session)
    access.spend(site.reads, rater)
    hand = handout.hand_out(site.store, rater.id)
    if hand:
        site.require_pictures(hand.item)
    return site.page(
        "item.html" if hand else "finish.html", session, rater=rater, hand=hand, round=site.round,
        progress=handout.progress(site.store, rater.id), last=votes.last_vote(site.store, rater.id),
        question=QUESTIONS[site.round.kind, site.round.question],
    )  # fmt: skip


@router.post("/vote")
def vote(site: access.ThisSite, rater: access.Asking, form: access.VoteForm) -> Response:
    """Store an answer and show the next item."""
    hand = _hand(site, rater, form.one("hand"))
    site.require_pictures(hand.item)
    return _stored(site, rater, hand, form, _answer(site, hand, form))


@router.post("/skip")
def skip(site: access.ThisSite, rater: access.Asking, form: access.VoteForm) -> Response:
    """Leave an item to others."""
    return _stored(site, rater, _hand(site, rater, form.one("hand")), form, None)


@router.post("/undo")
def undo(site: access.ThisSite, rater: access.Asking, form: access.VoteForm) -> Response:
    """Take the last answer back and show its item again."""
    try:
        votes.undo_vote(site.store, rater.id, form.number("last", 0, MOST_ID))
    except votes.AlreadyVotedError as problem:
        words = "This was undone before, or you have answered something since."
        raise HTTPException(409, words) from problem
    return RedirectResponse("/", 303)


@router.get("/image/{hand}/{place}")
def image(site: access.ThisSite, rater: access.Asking, hand: str, place: str) -> Response:
    """A picture of an item that this rater holds, by its place on the page."""
    access.spend(site.reads, rater)
    held = _hand(site, rater, hand)
    index = held.shown[access.number(place, 0, len(held.shown) - 1)]
    headers = {"cache-control": "private, max-age=600"}
    data = site.picture(held.item.images[index])
    return Response(data, media_type="image/png", headers=headers)


def _hand(site: access.Site, rater: Rater, text: str) -> Hand:
    try:
        return handout.find_hand(site.store, rater.id, access.number(text, 1, MOST_ID))
    except handout.NotHandedError as problem:
        raise HTTPException(403, "This item was not handed to you.") from problem


def _answer(site: access.Site, hand: Hand, form: access.Form) -> Answer:
    """What was answered, from places on the page to the item's own indices."""
    if site.round.kind == "tags":
        places = {access.number(text, 0, len(hand.shown) - 1) for text in form.get("tag", [])}
        return tuple(sorted(hand.shown[place] for place in places))
    answer = form.one("answer")
    if answer in ("tie", "bad"):
        return check_answer("pairs", 2, answer)
    return "a" if hand.shown[form.number("answer", 0, 1)] == 0 else "b"


def _stored(
    site: access.Site, rater: Rater, hand: Hand, form: access.Form, answer: Answer | None
) -> Response:
    step = form.number("step", 0, MOST_ID)
    spent = form.number("milliseconds", 0, votes.MOST_MILLISECONDS)
    try:
        votes.cast_vote(site.store, rater.id, hand.id, answer, spent, step)
    except votes.AlreadyVotedError as problem:
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
def overview(site: access.ThisSite, session: access.Admin) -> Response:
    """How the round goes."""
    given = site.tally.votes()
    known = {quality.rater: quality for quality in agreement.quality(site.round, given)}
    return site.page(
        "admin.html", session, summary=agreement.summary(site.round, given),
        raters=[(rater, known.get(rater.name)) for rater in invitations.raters(site.store)],
        progress=votes.round_progress(site.store, given), per_hour=_per_hour(given),
        votes_per_item=site.store.settings.votes_per_item,
    )  # fmt: skip


@router.post("/admin/rater")
def switch(site: access.ThisSite, session: access.Admin, form: access.OwnForm) -> Response:
    """Block a rater, or let them in again."""
    try:
        invitations.disable(site.store, form.one("name"), disabled=form.one("disabled") == "yes")
    except UserError as problem:
        raise HTTPException(404, "Nobody has that name.") from problem
    return RedirectResponse("/admin", 303)


def _per_hour(given: list[Vote], hours: int = 12) -> list[int]:
    """Votes in each of the last hours, the newest last."""
    now = time.time()
    counts = [0] * hours
    for vote in given:
        age = int((now - vote.time) // 3600)
        if 0 <= age < hours:
            counts[hours - 1 - age] += 1
    return counts
