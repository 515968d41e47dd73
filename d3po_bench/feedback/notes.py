"""What raters agreed to, have read, and wrote."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sql
from sqlalchemy import Connection

from d3po_bench.feedback.store import NOTES, LabelStore

Note = Literal["entered", "consent", "begun", "comment"]
"""They came from a platform, agreed, have read what to do, or wrote something."""


def add_note(
    store: LabelStore, connection: Connection, rater: int, kind: Note, text: str,
    of: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Keep what a rater wrote or agreed to.

    Args:
        store: of the round.
        connection: a transaction that writes.
        rater: number of the rater.
        kind: what it is.
        text: what it says.
        of: hand and step of the vote that a comment came with.
    """
    row = {"rater": rater, "kind": kind, "hand": of[0], "step": of[1], "text": text}
    connection.execute(sql.insert(NOTES).values(row | {"time": store.clock()}))


def note_once(store: LabelStore, rater: int, kind: Note, text: str) -> None:
    """Keep it, unless it is known already. On return it is on disk."""
    with store.writing() as connection:
        query = sql.select(NOTES.c.id).where(NOTES.c.rater == rater, NOTES.c.kind == kind)
        if connection.execute(query).first() is None:
            add_note(store, connection, rater, kind, text)


def notes_of(store: LabelStore, rater: int) -> set[str]:
    """Which kinds of note there are of a rater."""
    query = sql.select(NOTES.c.kind).where(NOTES.c.rater == rater).distinct()
    with store.reading() as connection:
        return {row.kind for row in connection.execute(query)}
