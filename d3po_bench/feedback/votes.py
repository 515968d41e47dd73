"""What was answered: votes, skips and undos, and which of them count."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from d3po_bench.errors import UserError
from d3po_bench.feedback.agreement import Floats, scores
from d3po_bench.feedback.handout import Hand, hand_of, require_hand, set_state
from d3po_bench.feedback.notes import add_note
from d3po_bench.feedback.questions import Answer
from d3po_bench.feedback.rounds import Progress, Vote
from d3po_bench.feedback.schema import VOTE, answer_of, order_of
from d3po_bench.feedback.store import NOTES, RATERS, VOTES, LabelStore, Row, open_labels
from d3po_bench.feedback.study import MOST_COMMENT
from d3po_bench.runs.files import csv_bytes, write_output

MOST_MILLISECONDS = 24 * 60 * 60 * 1000


class AlreadyVotedError(UserError):
    """The hand was answered before, or nothing is left to undo; nothing was stored."""


def cast_vote(
    store: LabelStore, rater: int, number: int, answer: Answer | None, milliseconds: int, step: int,
    comment: str = "",
) -> None:  # fmt: skip
    """Store what a rater answered; None skips. On return it is on disk.

    Args:
        store: of the round.
        rater: number of the rater.
        number: of the hand.
        answer: in the item's own indices, whatever order was shown.
        milliseconds: from seeing the item to answering it.
        step: the hand's `step` when it was shown: tells an answer that is sent again, its
            acknowledgement having been lost, from a new answer after an undo.
        comment: what the rater wrote, if anything.

    Raises:
        NotHandedError: the hand is not this rater's.
        AlreadyVotedError: it was answered before.
        UserError: the answer does not fit the item, the time is out of range, or the comment is
            too long.
    """
    if not 0 <= milliseconds <= MOST_MILLISECONDS:
        raise UserError(f"A vote cannot have taken {milliseconds} milliseconds. Vote again.")
    if len(comment) > MOST_COMMENT:
        raise UserError(f"A comment has {MOST_COMMENT} characters at most. Shorten it.")
    with store.writing() as connection:
        row = require_hand(connection, rater, number)
        hand = hand_of(store, connection, row)
        try:
            if answer is not None:
                answer = store.round.asked(hand.item).check(len(hand.shown), answer)
        except ValueError as problem:
            raise UserError(f"{ascii(answer)[:80]}: {problem}. Vote again.") from problem
        if step % 2 or step != hand.step:
            raise AlreadyVotedError("This item was answered already. Reload the page.")
        kind = "skip" if answer is None else "vote"
        _append(store, connection, row, step, kind, answer, milliseconds)
        if comment:
            add_note(store, connection, rater, "comment", comment, (number, step))
        set_state(store, connection, row, "skipped" if answer is None else "done")


def last_vote(store: LabelStore, rater: int) -> int:
    """Number of this rater's last vote or skip that is not undone; 0 where there is none."""
    with store.reading() as connection:
        row = _last(connection, rater)
        return int(row["id"]) if row else 0


def undo_vote(store: LabelStore, rater: int, number: int) -> Hand:
    """Take back this rater's last vote or skip, with a new row; its item is open again.

    Args:
        store: of the round.
        rater: number of the rater.
        number: what `last_vote` gives: an undo that is sent again, its acknowledgement having
            been lost, does not take back another.

    Raises:
        AlreadyVotedError: `number` is not the last, or there is nothing to take back.
    """
    with store.writing() as connection:
        last = _last(connection, rater)
        if last is None or last["id"] != number:
            raise AlreadyVotedError("This is not your last vote. Reload the page.")
        row = require_hand(connection, rater, last["hand"])
        _append(store, connection, row, last["step"] + 1, "undo", None, 0)
        set_state(store, connection, row, "open")
        return hand_of(store, connection, row)


def effective_votes(store: LabelStore) -> list[Vote]:
    """Votes in the order they were given, without what was skipped or undone.

    Raises:
        UserError: a vote on an item that the round does not have, or with an answer that does
            not fit it.
    """
    return Tally(store).votes()


TOLD = VOTES.c["item", "repeat", "shown", "answer", "milliseconds", "time"]


class Tally:
    """The votes that count, of which each row is read once: rows are only ever added.

    Threads may share it.
    """

    def __init__(self, store: LabelStore) -> None:
        self._store, self._last = store, 0
        self._votes: dict[tuple[int, int], Vote] = {}
        self._lock = threading.Lock()

    def votes(self) -> list[Vote]:
        """What `effective_votes` gives."""
        query = (
            sql.select(*VOTES.c["id", "hand", "step", "kind"], RATERS.c.name, *TOLD, NOTES.c.text)
            .join(RATERS, RATERS.c.id == VOTES.c.rater)
            .outerjoin(
                NOTES,
                sql.and_(
                    NOTES.c.kind == "comment",
                    NOTES.c.rater == VOTES.c.rater,
                    NOTES.c.hand == VOTES.c.hand,
                    NOTES.c.step == VOTES.c.step,
                ),
            )
            .order_by(VOTES.c.id)
        )
        with self._lock, self._store.reading() as connection:
            new = query.where(VOTES.c.id > self._last)
            for number, hand, step, kind, *told in connection.execute(new):
                if kind == "undo":
                    self._votes.pop((hand, step - 1), None)
                elif kind == "vote":
                    self._votes[hand, step] = _vote(self._store, number, *told)
                self._last = number
            return list(self._votes.values())


def round_progress(store: LabelStore, votes: Sequence[Vote]) -> Progress:
    """Items that have `votes_per_item` votes, and those that do not; gold not counted."""
    number = Counter(vote.item for vote in votes if vote.repeat == 0)
    wanted = [item.id for item in store.round.items if item.gold is None]
    done = sum(number[item] >= store.settings.votes_per_item for item in wanted)
    return Progress(done, len(wanted) - done)


def export(store: LabelStore, out: Path) -> int:
    """Write the votes, one a row, as CSV or JSON by the name of `out`; returns their number.

    Raises:
        UserError: the labels are damaged, `out` has another suffix or holds something else, or it
            cannot be written.
    """
    kind = out.suffix.lower()
    if kind not in (".csv", ".json"):
        raise UserError(f"Votes are written as .csv or .json, not {out.name!a}. Change --out.")
    rows = exported(store, effective_votes(store))
    write_output(out, rows_as(rows, kind))
    return len(rows)


def exported(store: LabelStore, votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """The votes as rows of the export; docs/human-feedback.md has its columns.

    `scores` is what training makes of the answer, empty where it makes nothing of it.
    """
    rows = []
    for vote in votes:
        item = store.items[vote.item]
        question, images = store.round.asked(item), len(item.images)
        learned = item.use == "main" and vote.repeat == 0
        said = asdict(vote)
        comment = said.pop("comment")
        rows.append({
            "prompt": item.prompt, **said, "images": item.images, "question": question.name,
            "kind": question.kind, "group": item.group, "use": item.use,
            "scores": tuple(question.scores(images, vote.answer)) if learned else (),
            "comment": comment,
        })  # fmt: skip
    return rows


def rows_as(rows: Sequence[dict[str, Any]], kind: str) -> bytes:
    """Rows as `.csv` or `.json`."""
    if kind == ".json":
        return (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    return csv_bytes([{k: _cell(v) for k, v in row.items()} for row in rows])


def _cell(value: Any) -> Any:
    """A value as a cell that no spreadsheet computes, and that says what it was when it is read."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    formula = isinstance(value, str) and re.match(r"'*\s*[=+@-]", value)
    return f"'{value}" if formula else value


def scores_of(folder: Path, labels: str | None = None, question: str | None = None) -> Floats:
    """What the votes say of each image of the round in `folder`, [P, K].

    Args:
        folder: of the round.
        labels: URL of the votes; None for those in the folder.
        question: whose answers; None where there is one question.

    Raises:
        UserError: the votes are damaged, or of another round, or there is no such question.
    """
    with open_labels(folder, labels) as store:
        part = store.round.part(question)
        return scores(part, part.of(effective_votes(store)))


# ---- rows


def _append(
    store: LabelStore, connection: Connection, row: Row, step: int, kind: str, answer: Any,
    milliseconds: int,
) -> None:  # fmt: skip
    values = {key: row[key] for key in ("rater", "item", "repeat", "shown")} | {
        "hand": row["id"], "step": step, "kind": kind, "milliseconds": milliseconds,
        "answer": None if answer is None else json.dumps(answer), "time": store.clock(),
    }  # fmt: skip
    connection.execute(sql.insert(VOTES).values(values))


def _not_undone(*columns: Any) -> sql.Select[Any]:
    """Votes and skips that no later row undoes."""
    undo = VOTES.alias()
    undone = sql.select(undo.c.id).where(
        undo.c.hand == VOTES.c.hand, undo.c.step == VOTES.c.step + 1
    )
    return sql.select(VOTES, *columns).where(VOTES.c.kind != "undo", ~undone.exists())


def _last(connection: Connection, rater: int) -> Row | None:
    """The row that an undo would take back."""
    query = _not_undone().where(VOTES.c.rater == rater).order_by(VOTES.c.id.desc()).limit(1)
    return connection.execute(query).mappings().first()


def _vote(
    store: LabelStore, number: int, name: str, item: str, repeat: int, shown: str, answer: str,
    milliseconds: int, time: float, comment: str | None,
) -> Vote:  # fmt: skip
    """The vote of a row, which another program may have written."""
    try:
        VOTE.validate_python((name, item, repeat, milliseconds, time))
        images = len(store.items[item].images)
        order = order_of(shown, images)
        found = answer_of(answer, store.round.asked(store.items[item]), images)
    except (KeyError, ValueError, TypeError, RecursionError) as problem:
        texts = {"item": item, "shown": shown, "answer": answer}
        said = ", ".join(f"{k} {ascii(text)[:40]}" for k, text in texts.items())
        raise UserError(
            f"Vote {number} does not fit this round: {said}. Restore the labels from a copy, or "
            "give those of this round."
        ) from problem
    return Vote(name, item, repeat, order, found, milliseconds, time, comment or "")
