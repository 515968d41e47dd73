"""What a study adds around its items: consent, instructions, practice, and platforms.

A participant's id and everything else in an address come from outside and are checked here.
"""

from __future__ import annotations

import re
from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response

from d3po_bench.digests import short
from d3po_bench.errors import UserError
from d3po_bench.feedback import handout, invitations
from d3po_bench.feedback.handout import Hand
from d3po_bench.feedback.invitations import Rater
from d3po_bench.feedback.notes import note_once, notes_of
from d3po_bench.feedback.page import access
from d3po_bench.feedback.page.access import Site
from d3po_bench.feedback.page.sessions import Session
from d3po_bench.feedback.page.words import choose, said
from d3po_bench.feedback.study import Platform

router = APIRouter()


# ---- before the first item


def gate(request: Request, site: Site, session: Session, rater: Rater) -> Response | None:
    """The page that a rater must pass before the first item; None if they have passed them all."""
    study = site.round.study
    if not (study.consent or study.instructions or study.example):
        return None
    passed = notes_of(site.store, rater.id)
    if study.consent and "consent" not in passed:
        return site.page(request, "consent.html", session, rater=rater)
    if (study.instructions or study.example) and "begun" not in passed:
        return site.page(request, "instructions.html", session, rater=rater, begun=False)
    return None


@router.post("/agree")
def agree(
    request: Request, site: access.ThisSite, rater: access.Asking, session: access.SignedIn,
    form: access.VoteForm,
) -> Response:  # fmt: skip
    """Keep that a rater agrees, and to what; or let them go."""
    if form.one("agree") != "yes":
        return site.sign_out(session, site.page(request, "declined.html"))
    language = choose(request)
    text = f"{language} {short(said(site.round.study.consent, language))}"
    note_once(site.store, rater.id, "consent", text)
    return site.moved("/")


@router.post("/begin")
def begin(site: access.ThisSite, rater: access.Asking, form: access.VoteForm) -> Response:
    """Keep that a rater has seen the instructions."""
    note_once(site.store, rater.id, "begun", "")
    return site.moved("/")


@router.get("/instructions")
def instructions(
    request: Request, site: access.ThisSite, session: access.SignedIn, rater: access.Asking
) -> Response:
    """To read again."""
    access.spend(site.reads, rater)
    return site.page(request, "instructions.html", session, rater=rater, begun=True)


@router.get("/example/{number}/{place}")
def example(site: access.ThisSite, rater: access.Asking, number: str, place: str) -> Response:
    """A picture of an example."""
    access.spend(site.reads, rater)
    found = site.round.study.example
    item = found[access.number(number, 0, len(found) - 1)]
    return site.png(item.pictures[access.number(place, 0, len(item.pictures) - 1)])


# ---- practice


def told(
    request: Request, site: Site, session: Session, rater: Rater, number: str
) -> Response | None:
    """What is right for an item of practice that was answered; None of any other item."""
    try:
        hand = handout.find_hand(site.store, rater.id, access.number(number, 1, handout.MOST_ID))
    except handout.NotHandedError:
        return None
    mine = [v for v in site.tally.votes() if (v.rater, v.item) == (rater.name, hand.item.id)]
    if hand.item.use != "practice" or not mine:
        return None
    known = site.round.study.practice[site.store.practice.index(hand.item.id)]
    question = site.round.asked(hand.item)
    gold = hand.item.gold
    assert gold is not None
    right = all(question.same(len(hand.item.images), mine[-1].answer, gold))
    return site.page(
        request, "told.html", session, rater=rater, hand=hand, question=question, right=right,
        why=known.why, answer=mine[-1].answer,
    )  # fmt: skip


def after(hand: Hand) -> str:
    """Where a rater comes to after an answer."""
    return f"/?told={hand.id}" if hand.item.use == "practice" else "/"


# ---- platforms


def _participant(text: str) -> str:
    """A participant's id; 400 if it is none that can be used."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", text):
        raise HTTPException(
            400, "This address has no participant id that can be used. Open the study from the "
            "platform.",
        )  # fmt: skip
    return text


def _platform(request: Request, site: Site, token: str) -> Platform:
    """The study's platform; 404 where it has none, and as `require_link` with a wrong token."""
    if site.round.study.platform is None:
        raise HTTPException(404, "There is no such page.")
    access.require_link(request, site, token, invitations.hash_of(site.store, "platform"))
    return site.round.study.platform


@router.get("/start/{token}")
def arrive(request: Request, site: access.ThisSite, token: str) -> Response:
    """Where a platform sends its participants. Nothing is kept before they press a button."""
    platform = _platform(request, site, token)
    name = _participant(request.query_params.get(platform.participant, ""))
    session = site.session(request)
    known = site.known_rater(session) if session else None
    if known and known.name == name:
        return site.moved("/")
    return site.page(request, "start.html", token=token, participant=name)


@router.post("/start/{token}")
def start(
    request: Request, site: access.ThisSite, token: str, form: access.SameSiteForm
) -> Response:
    """Let a participant in, or back in while they have no item yet."""
    platform = _platform(request, site, token)
    name = _participant(form.one("participant"))
    try:
        rater, theirs = invitations.enter(site.store, name, platform.most)
    except UserError as problem:
        raise HTTPException(403, str(problem)) from problem
    return site.sign_in(request, "rater", rater, theirs)


Ending = Literal["code", "no code", "none"]


def ending(site: Site, rater: Rater) -> Ending:
    """What the last page says of a code: to invited raters, nothing."""
    if site.round.study.platform and "entered" in notes_of(site.store, rater.id):
        return "code" if handout.has_finished(site.store, rater.id) else "no code"
    return "none"
