"""What the admin sees: how the round goes, its items with what was said of them, and the export."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response

from d3po_bench.errors import UserError
from d3po_bench.feedback import agreement, handout, invitations, report, votes
from d3po_bench.feedback.page import access
from d3po_bench.feedback.page.access import Site
from d3po_bench.feedback.rounds import Item, Part, Vote
from d3po_bench.feedback.store import LabelStore

PAGE = 20
"""Items on a page."""
ORDERS = ("disagreement", "votes", "comments", "name")

router = APIRouter()


@router.get("/admin")
def overview(request: Request, site: access.ThisSite, session: access.Admin) -> Response:
    """How the round goes."""
    given = site.tally.votes()
    mine = report.by_rater(given)
    known = {quality.rater: quality for quality in agreement.quality(site.round, given)}
    counted = bool(site.round.study.answers or site.round.study.platform)
    rows = [
        (
            rater, known.get(rater.name),
            agreement.on_gold(site.round, mine.get(rater.name, []), practice=True),
            report.flags(site.round, mine.get(rater.name, [])),
            counted and handout.has_finished(site.store, rater.id),
        )
        for rater in invitations.raters(site.store)
    ]  # fmt: skip
    return site.page(
        request, "admin.html", session, raters=rows, per_hour=_per_hour(given),
        parts=[(p.question.name, agreement.summary(p, p.of(given))) for p in site.round.parts],
        progress=votes.round_progress(site.store, given), votes=len(given),
        voters=len(mine), votes_per_item=site.store.settings.votes_per_item,
    )  # fmt: skip


@router.post("/admin/rater")
def switch(site: access.ThisSite, session: access.Admin, form: access.OwnForm) -> Response:
    """Block a rater, or let them in again."""
    try:
        invitations.disable(site.store, form.one("name"), disabled=form.one("disabled") == "yes")
    except UserError as problem:
        raise HTTPException(404, "Nobody has that name.") from problem
    return site.moved("/admin")


def _per_hour(given: list[Vote], hours: int = 12) -> list[int]:
    """Votes in each of the last hours, the newest last."""
    now = time.time()
    counts = [0] * hours
    for vote in given:
        age = int((now - vote.time) // 3600)
        if 0 <= age < hours:
            counts[hours - 1 - age] += 1
    return counts


# ---- items


@dataclass(frozen=True)
class Looked:
    """An item with what was said of it."""

    item: Item
    votes: list[Vote]
    means: list[float]
    """Of each image, what all say of it; nothing where nobody has."""
    apart: float | None
    """How far raters differ, 0 to 1."""

    @property
    def comments(self) -> int:
        """How many wrote something."""
        return sum(bool(vote.comment) for vote in self.votes)


@router.get("/admin/items")
def items(request: Request, site: access.ThisSite, session: access.Admin) -> Response:
    """The items of a question with their pictures and votes, those that raters differ on first."""
    asked = request.query_params
    part = _part(site, asked.get("question"))
    order = asked.get("order", ORDERS[0])
    found = _sorted(_looked(part, part.of(site.tally.votes())), order)
    pages = max(1, -(-len(found) // PAGE))
    page = access.number(asked.get("page", "1"), 1, pages)
    return site.page(
        request, "items.html", session, part=part, order=order, orders=ORDERS, page=page,
        pages=pages, items=found[PAGE * (page - 1) : PAGE * page], total=len(found),
        questions=[part.question.name for part in site.round.parts],
    )  # fmt: skip


def _part(site: Site, name: str | None) -> Part:
    try:
        return site.round.part(name or site.round.parts[0].question.name)
    except UserError as problem:
        raise HTTPException(404, "There is no such question.") from problem


def _looked(part: Part, given: list[Vote]) -> list[Looked]:
    apart = agreement.disagreement(part, given)
    said: dict[str, list[Vote]] = {item.id: [] for item in part.items}
    for vote in given:
        said[vote.item].append(vote)
    return [Looked(i, said[i.id], _means(part, said[i.id]), apart.get(i.id)) for i in part.items]


def _means(part: Part, given: list[Vote]) -> list[float]:
    scores = [part.question.scores(part.images_per_item, v.answer) for v in given if not v.repeat]
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)]


def _sorted(found: list[Looked], order: str) -> list[Looked]:
    keys = {
        "disagreement": lambda one: -1.0 if one.apart is None else one.apart,
        "votes": lambda one: len(one.votes),
        "comments": lambda one: one.comments,
        "name": lambda one: 0,
    }
    if order not in keys:
        raise HTTPException(404, "There is no such order.")
    return sorted(found, key=keys[order], reverse=True)


@router.get("/admin/picture/{item}/{place}")
def picture(site: access.ThisSite, session: access.Admin, item: str, place: str) -> Response:
    """A picture of an item, by the item's own order."""
    found = site.store.items.get(item)
    if found is None:
        raise HTTPException(404, "There is no such item.")
    return site.png(found.images[access.number(place, 0, len(found.images) - 1)])


# ---- the export

Suffix = Literal[".csv", ".json"]
TYPES: dict[Suffix, str] = {".csv": "text/csv; charset=utf-8", ".json": "application/json"}


@router.get("/admin/export.csv")
def export_csv(site: access.ThisSite, session: access.Admin) -> Response:
    """All votes as a table."""
    return _exported(site.store, site.tally.votes(), ".csv")


@router.get("/admin/export.json")
def export_json(site: access.ThisSite, session: access.Admin) -> Response:
    """All votes with their texts as they are."""
    return _exported(site.store, site.tally.votes(), ".json")


def _exported(store: LabelStore, given: list[Vote], suffix: Suffix) -> Response:
    data = votes.rows_as(votes.exported(store, given), suffix)
    headers = {"content-disposition": f'attachment; filename="labels{suffix}"'}
    return Response(data, media_type=TYPES[suffix], headers=headers)
