"""Who may take part: invitations, which are known by the hash of their token alone."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sql

from d3po_bench.errors import UserError
from d3po_bench.feedback.notes import add_note
from d3po_bench.feedback.rounds import Pool
from d3po_bench.feedback.store import FACTS, HANDS, NOTES, RATERS, LabelStore


@dataclass(frozen=True)
class Rater:
    """Somebody who was invited."""

    id: int
    name: str
    token_hash: str
    """SHA-256 of the invitation token, in hexadecimal. The token itself is not kept."""
    disabled: bool


def token_hash(token: str) -> str:
    """SHA-256 in hexadecimal. Tokens are 256 random bits: nothing can be guessed from it."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def check_name(name: str) -> None:
    """Refuse a name that is empty, longer than 60 characters, or not printable.

    Raises:
        UserError: naming it.
    """
    if not name.strip() or len(name) > 60 or not name.isprintable():
        raise UserError(
            f"{ascii(name)[:80]} cannot be a rater's name. Give 1 to 60 printable characters."
        )


def invite(store: LabelStore, name: str) -> str:
    """A new invitation token for `name`, new or known; an earlier one no longer works.

    Raises:
        UserError: as `check_name`.
    """
    check_name(name)
    token = secrets.token_urlsafe(32)
    with store.writing() as connection:
        change = sql.update(RATERS).where(RATERS.c.name == name)
        if not connection.execute(change.values(token_hash=token_hash(token))).rowcount:
            row = {"name": name, "token_hash": token_hash(token), "disabled": False}
            connection.execute(sql.insert(RATERS).values(row))
    return token


Fact = Literal["admin", "platform"]
"""Who has a link that is no rater's: the admin, and a platform for all its participants."""


def invite_as(store: LabelStore, role: Fact = "admin") -> str:
    """A new token for the admin page or a platform; an earlier one no longer works."""
    token = secrets.token_urlsafe(32)
    with store.writing() as connection:
        connection.execute(sql.delete(FACTS).where(FACTS.c.name == role))
        connection.execute(sql.insert(FACTS).values(name=role, value=token_hash(token)))
    return token


def hash_of(store: LabelStore, role: Fact = "admin") -> str | None:
    """SHA-256 of the admin's or a platform's token, or None while there is none."""
    query = sql.select(FACTS.c.value).where(FACTS.c.name == role)
    with store.reading() as connection:
        found: str | None = connection.execute(query).scalar_one_or_none()
    return found


def enter(store: LabelStore, name: str, most: int) -> tuple[int, str]:
    """Let a participant of a platform in: their number, and the token of their session.

    Whoever knows a participant's id could come in their place, see their code, or answer for them.
    So an id is taken again only while it has no item: somebody whose browser was closed early, or
    who never heard of the first try.

    Raises:
        UserError: somebody of that name has begun, or was invited by name, or `most` have come.
    """
    token = secrets.token_urlsafe(32)
    with store.writing() as connection:
        query = sql.select(RATERS.c.id, RATERS.c.disabled).where(RATERS.c.name == name)
        known = connection.execute(query).first()
        if known is None:
            came = sql.select(sql.func.count()).where(NOTES.c.kind == "entered")
            if connection.execute(came).scalar_one() >= most:
                raise UserError("This study has all its participants. Thank you.")
            row = {"name": name, "token_hash": token_hash(token), "disabled": False}
            adding = sql.insert(RATERS).values(row).returning(RATERS.c.id)
            number = int(connection.execute(adding).scalar_one())
            add_note(store, connection, number, "entered", "")
            return number, token
        mine = sql.select(NOTES.c.id).where(NOTES.c.rater == known.id, NOTES.c.kind == "entered")
        hands = sql.select(HANDS.c.id).where(HANDS.c.rater == known.id)
        begun = connection.execute(hands).first() or not connection.execute(mine).first()
        if begun or known.disabled:
            raise UserError("This participant has begun in another browser. Continue there.")
        change = sql.update(RATERS).where(RATERS.c.id == known.id)
        connection.execute(change.values(token_hash=token_hash(token)))
        return int(known.id), token


LEFT = "left "
"""Begins the names of facts that say which sessions have ended, and when."""


def leave(store: LabelStore, nonce: str, most_seconds: int) -> None:
    """End a session for good, and forget those that are older than any session gets."""
    old = FACTS.c.name.startswith(LEFT) & (FACTS.c.value < _time(store.clock() - most_seconds))
    with store.writing() as connection:
        connection.execute(sql.delete(FACTS).where(old))
        connection.execute(sql.delete(FACTS).where(FACTS.c.name == LEFT + nonce))
        connection.execute(sql.insert(FACTS).values(name=LEFT + nonce, value=_time(store.clock())))


def has_left(store: LabelStore, nonce: str) -> bool:
    """Whether that session was ended."""
    query = sql.select(FACTS.c.name).where(FACTS.c.name == LEFT + nonce)
    with store.reading() as connection:
        return connection.execute(query).first() is not None


def _time(seconds: float) -> str:
    """Seconds as text that sorts as they do."""
    return f"{int(seconds):012d}"


SIMULATED = "simulated {}"
"""Name of a simulated rater, by number from 1."""


def pool_of(names: Iterable[str]) -> Pool:
    """Whether raters of these names are people; one who is simulated makes all of them so."""
    simulated = re.compile(SIMULATED.format(r"\d+"))
    return "simulated" if any(simulated.fullmatch(name) for name in names) else "people"


def raters(store: LabelStore) -> list[Rater]:
    """Everybody who was invited, by name."""
    with store.reading() as connection:
        rows = connection.execute(sql.select(RATERS).order_by(RATERS.c.name))
        return [Rater(**row) for row in rows.mappings()]


def find_rater(
    store: LabelStore, *, id_: int | None = None, token: str | None = None
) -> Rater | None:
    """Who has this number or was invited with `token`; None if nobody, or somebody blocked."""
    which = RATERS.c.id == id_ if token is None else RATERS.c.token_hash == token_hash(token)
    query = sql.select(RATERS).where(which, RATERS.c.disabled.is_(False))
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    return Rater(**row) if row else None


def disable(store: LabelStore, name: str, *, disabled: bool = True) -> None:
    """Block a rater, or let them in again. Their votes stay.

    Raises:
        UserError: nobody has that name.
    """
    with store.writing() as connection:
        change = sql.update(RATERS).where(RATERS.c.name == name).values(disabled=disabled)
        if not connection.execute(change).rowcount:
            known = ", ".join(rater.name for rater in raters(store)) or "nobody"
            raise UserError(f"No rater is called {ascii(name)[:80]}. Invited so far: {known}.")
