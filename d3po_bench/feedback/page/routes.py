"""What raters are answered: items, votes and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse

from d3po_bench.feedback import handout, votes
from d3po_bench.feedback.handout import MOST_ID, Hand
from d3po_bench.feedback.invitations import Rater
from d3po_bench.feedback.page import access, studies
from d3po_bench.feedback.page.sessions import Session
from d3po_bench.feedback.questions import Answer
from d3po_bench.feedback.report import Concern, concerns
from d3po_bench.feedback.study import MOST_COMMENT
from d3po_bench.prompts import control_in

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "join.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
router = APIRouter()


@router.get("/")
def item(request: Request, site: access.ThisSite) -> Response:
    """The item to judge now, what comes before the first, or the finish page."""
    session = site.session(request)
    if session is None:
        return site.moved("/join")
    if session.role == "admin":
        return site.moved("/admin")
    rater = site.rater(session)
    access.spend(site.reads, rater)
    number = request.query_params.get("told")
    told = studies.told(request, site, session, rater, number) if number else None
    return (
        told or studies.gate(request, site, session, rater) or _next(request, site, session, rater)
    )


def _next(request: Request, site: access.Site, session: Session, rater: Rater) -> Response:
    hand = handout.hand_out(site.store, rater.id)
    facts: dict[str, Any] = {
        "rater": rater, "progress": handout.progress(site.store, rater.id),
        "last": votes.last_vote(site.store, rater.id),
    }  # fmt: skip
    if hand is None:
        ending = studies.ending(site, rater)
        return site.page(request, "finish.html", session, ending=ending, **facts)
    site.require_pictures(hand.item)
    return site.page(
        request, "item.html", session, hand=hand, question=site.round.asked(hand.item),
        concerns=_concerns(site, rater), most_comment=MOST_COMMENT, **facts,
    )  # fmt: skip


def _concerns(site: access.Site, rater: Rater) -> list[Concern]:
    """What a rater is warned of."""
    if site.round.study.checks is None:
        return []
    mine = [vote for vote in site.tally.votes() if vote.rater == rater.name]
    return concerns(site.round, site.round.real(mine))


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
    return site.moved("/")


@router.get("/image/{hand}/{place}")
def image(site: access.ThisSite, rater: access.Asking, hand: str, place: str) -> Response:
    """A picture of an item that this rater holds, by its place on the page."""
    access.spend(site.reads, rater)
    held = _hand(site, rater, hand)
    index = held.shown[access.number(place, 0, len(held.shown) - 1)]
    return site.png(held.item.images[index])


def _hand(site: access.Site, rater: Rater, text: str) -> Hand:
    try:
        return handout.find_hand(site.store, rater.id, access.number(text, 1, MOST_ID))
    except handout.NotHandedError as problem:
        raise HTTPException(403, "This item was not handed to you.") from problem


def _answer(site: access.Site, hand: Hand, form: access.Form) -> Answer:
    """What was answered, from places on the page to the item's own indices."""
    question, places = site.round.asked(hand.item), len(hand.shown)
    if question.kind == "tags":
        tagged = {access.number(text, 0, places - 1) for text in form.get("tag", [])}
        return question.check(places, [hand.shown[place] for place in tagged])
    if question.kind == "ranking":
        ranks = [access.number(text, 1, places) for text in form.get("rank", [])]
        if sorted(ranks) != list(range(1, places + 1)):
            raise HTTPException(400, "Give every picture a place of its own.")
        return question.check(places, [hand.shown[ranks.index(n + 1)] for n in range(places)])
    answer = form.one("answer")
    if question.kind == "scale":
        given = access.number(answer, 0, 10)
        if given not in question.steps:
            raise HTTPException(400, "This form is malformed.")
        return given
    if answer in ("tie", "bad"):
        return question.check(2, answer)
    return "a" if hand.shown[form.number("answer", 0, 1)] == 0 else "b"


def _comment(site: access.Site, hand: Hand, form: access.Form) -> str:
    """What the rater wrote, in any script; 400 if nobody asked for it, or it cannot be kept."""
    text = form.one("comment") if "comment" in form else ""
    text = text.replace("\r\n", "\n").strip()
    if text and not site.round.asked(hand.item).comment:
        raise HTTPException(400, "This form is malformed.")
    if len(text) > MOST_COMMENT or control_in(text) is not None:
        words = "This comment is too long, or holds control characters. Change it."
        raise HTTPException(400, words)
    return text


def _stored(
    site: access.Site, rater: Rater, hand: Hand, form: access.Form, answer: Answer | None
) -> Response:
    step = form.number("step", 0, MOST_ID)
    spent = form.number("milliseconds", 0, votes.MOST_MILLISECONDS)
    comment = _comment(site, hand, form)
    try:
        votes.cast_vote(site.store, rater.id, hand.id, answer, spent, step, comment)
    except votes.AlreadyVotedError as problem:
        raise HTTPException(409, "This item was answered already.") from problem
    return site.moved(studies.after(hand))


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """Style and scripts, by name."""
    if name not in STATIC:
        raise HTTPException(404, "There is no such page.")
    headers = {"cache-control": "no-cache"}
    return FileResponse(HERE / "static" / name, media_type=STATIC[name], headers=headers)
