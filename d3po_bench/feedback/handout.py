"""Who gets which item: gold and repeats when they are due, else the item with the fewest votes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy import Connection, Table

from d3po_bench.errors import UserError
from d3po_bench.feedback.rounds import Item, Progress
from d3po_bench.feedback.store import BLOCK, HANDS, ITEMS, VOTES, LabelStore, Row, draw_number

MOST_ID = 2**31 - 1
"""Of a row: what a 32-bit column holds."""

State = Literal["open", "abandoned", "done", "skipped"]


class NotHandedError(UserError):
    """The item was not handed to this rater."""


@dataclass(frozen=True)
class Hand:
    """An item in the hands of a rater."""

    id: int
    item: Item
    repeat: int
    shown: tuple[int, ...]
    """Index of the image at each place."""
    step: int
    """Rows of votes written about this hand so far; even while it is open."""


def hand_out(store: LabelStore, rater: int) -> Hand | None:
    """The item that this rater should judge now; None when there is nothing for them.

    What they hold comes first, so that asking again gives the same item in the same order.
    """
    now, longest = store.clock(), 60 * store.settings.minutes
    # Later than any hand can expire: the clock was ahead, perhaps by a year, when it was given.
    late = sql.select(HANDS).where(
        HANDS.c.state == "open",
        (HANDS.c.expires < now) | (HANDS.c.expires > now + 2 * longest),
    )
    with store.writing("NORMAL") as connection:
        for row in connection.execute(late).mappings().all():
            set_state(store, connection, row, "abandoned")
        held = _held(store, connection, rater)
        if held is None and _answered(store, connection, rater) < _wanted_of(store):
            held = _regained(store, connection, rater) or _new(store, connection, rater)
        return hand_of(store, connection, held) if held else None


def find_hand(store: LabelStore, rater: int, number: int) -> Hand:
    """What this rater was handed under `number`.

    Raises:
        NotHandedError: it was handed to somebody else, or to nobody.
    """
    with store.reading() as connection:
        return hand_of(store, connection, require_hand(connection, rater, number))


def progress(store: LabelStore, rater: int) -> Progress:
    """Items this rater has answered or skipped, and how many could still come.

    Practice is not counted.
    """
    mine = _mine(store, rater)
    done = mine.where(HANDS.c.state.in_(("done", "skipped")))
    held = mine.where(HANDS.c.state == "open")
    free = _count(ITEMS).where(*_free(store, rater))
    with store.reading() as connection:
        numbers = [connection.execute(query).scalar_one() for query in (done, held, free)]
        left = max(0, _wanted_of(store) - _answered(store, connection, rater))
    return Progress(numbers[0], min(left, numbers[1] + numbers[2]))


def has_finished(store: LabelStore, rater: int) -> bool:
    """Whether a rater has given all answers that were asked of them.

    That is as many as the study wants of each, or, where there were fewer items, an answer to every
    one: who skips some of them has not earned a completion code. An item that is asked again has
    been answered.
    """
    mine = _mine(store, rater)
    open_ = mine.where(HANDS.c.state.in_(("open", "skipped")), HANDS.c.repeat == 0)
    free = _count(ITEMS).where(*_free(store, rater))
    with store.reading() as connection:
        answered = _answered(store, connection, rater)
        if answered >= _wanted_of(store):
            return True
        undone = sum(connection.execute(query).scalar_one() for query in (open_, free))
        return answered > 0 and undone == 0


def _answered(store: LabelStore, connection: Connection, rater: int) -> int:
    """Answers of this rater that count, repeats and known answers among them."""
    done = _mine(store, rater).where(HANDS.c.state == "done")
    return int(connection.execute(done).scalar_one())


def _wanted_of(store: LabelStore) -> int:
    """Answers that are wanted of each rater."""
    return store.round.study.answers or MOST_ID


def _mine(store: LabelStore, rater: int) -> sql.Select[int]:
    """How many hands this rater was given, practice left out."""
    mine = _count(HANDS).where(HANDS.c.rater == rater)
    return mine.where(HANDS.c.item.not_in(store.practice))


# ---- hands, inside a transaction


def require_hand(connection: Connection, rater: int, number: int) -> Row:
    """The row of a hand.

    Raises:
        NotHandedError: it is not this rater's.
    """
    query = sql.select(HANDS).where(HANDS.c.id == number, HANDS.c.rater == rater)
    row = connection.execute(query).mappings().first() if 0 < number <= MOST_ID else None
    if row is None:
        raise NotHandedError("This item was not handed to you. Reload the page.")
    return row


def hand_of(store: LabelStore, connection: Connection, row: Row) -> Hand:
    """The hand that a row describes."""
    step = connection.execute(_count(VOTES).where(VOTES.c.hand == row["id"])).scalar_one()
    shown = tuple(json.loads(row["shown"]))
    return Hand(row["id"], store.items[row["item"]], row["repeat"], shown, step)


def set_state(store: LabelStore, connection: Connection, row: Row, state: State) -> None:
    """Change a hand's state, and with it what counts as taken of its item."""
    values: dict[str, Any] = {"state": state}
    if state == "open":
        now = store.clock()
        values |= {"handed": now, "expires": now + 60 * store.settings.minutes}
    connection.execute(sql.update(HANDS).where(HANDS.c.id == row["id"]).values(values))
    counts = ("open", "done")
    change = (state in counts) - (row["state"] in counts)
    if change and row["repeat"] == 0:
        _take(connection, row["item"], change)


def _take(connection: Connection, item: str, change: int) -> None:
    taken = ITEMS.c.taken + change
    connection.execute(sql.update(ITEMS).where(ITEMS.c.id == item).values(taken=taken))


def _count(table: Table) -> sql.Select[int]:
    return sql.select(sql.func.count()).select_from(table)


# ---- what comes next


def _held(store: LabelStore, connection: Connection, rater: int) -> Row | None:
    """The open hand that was given last: after an undo, the one that was undone."""
    query = sql.select(HANDS).where(HANDS.c.rater == rater, HANDS.c.state == "open")
    query = query.order_by(HANDS.c.handed.desc(), HANDS.c.id)
    row = connection.execute(query).mappings().first()
    if row:
        expires = store.clock() + 60 * store.settings.minutes
        change = sql.update(HANDS).where(HANDS.c.id == row["id"]).values(expires=expires)
        connection.execute(change)
    return row


def _regained(store: LabelStore, connection: Connection, rater: int) -> Row | None:
    """A hand that this rater left lying and nobody took since."""
    query = (
        sql.select(HANDS)
        .join(ITEMS, ITEMS.c.id == HANDS.c.item)
        .where(HANDS.c.rater == rater, HANDS.c.state == "abandoned")
        .where(_wanted(store) | (HANDS.c.repeat > 0) | ITEMS.c.gold)
        .order_by(HANDS.c.id)
    )
    row = connection.execute(query).mappings().first()
    if row:
        set_state(store, connection, row, "open")
    return row


def _new(store: LabelStore, connection: Connection, rater: int) -> Row | None:
    """Practice first; then a gold item or a repeat when one is due, else one with few votes."""
    if practice := _practice(store, connection, rater):
        return _give(store, connection, rater, practice, 0)
    mine = _mine(store, rater)
    given = connection.execute(mine).scalar_one()
    golds = connection.execute(
        mine.join(ITEMS, ITEMS.c.id == HANDS.c.item).where(ITEMS.c.gold, HANDS.c.repeat == 0)
    ).scalar_one()
    repeats = connection.execute(mine.where(HANDS.c.repeat > 0)).scalar_one()
    item, repeat = None, 0
    if golds < _due(store, "gold", store.settings.gold_every, rater, given):
        checking = ITEMS.c.gold & ITEMS.c.id.not_in(store.practice)
        item = _pick(store, connection, rater, checking, _unseen(rater))
    if item is None and repeats < _due(store, "repeat", store.settings.repeat_every, rater, given):
        item, repeat = _repeatable(store, connection, rater), 1
    if item is None:
        item, repeat = _pick(store, connection, rater, *_free(store, rater)), 0
    return None if item is None else _give(store, connection, rater, item, repeat)


def _practice(store: LabelStore, connection: Connection, rater: int) -> str | None:
    """The next item of practice that this rater has not had."""
    mine = HANDS.c.item.in_(store.practice) & (HANDS.c.rater == rater)
    had = set(connection.execute(sql.select(HANDS.c.item).where(mine)).scalars())
    return next((item for item in store.practice if item not in had), None)


def _due(store: LabelStore, what: str, every: int, rater: int, given: int) -> int:
    """How many of the first `given` + 1 hands should be of this sort.

    One in each block of `every`, at a place that the rater cannot foresee.
    """
    if every < 1:
        return 0
    block = given // every
    return block + (given % every >= draw_number(store.seed, what, rater, block) % every)


def _wanted(store: LabelStore) -> sql.ColumnElement[bool]:
    return ITEMS.c.taken < store.settings.votes_per_item


def _unseen(rater: int) -> sql.ColumnElement[bool]:
    seen = sql.select(HANDS.c.id).where(HANDS.c.rater == rater, HANDS.c.item == ITEMS.c.id)
    return ~seen.exists()


def _free(store: LabelStore, rater: int) -> tuple[sql.ColumnElement[bool], ...]:
    return (ITEMS.c.gold.is_(False), _wanted(store), _unseen(rater))


def _pick(
    store: LabelStore, connection: Connection, rater: int, *which: sql.ColumnElement[bool]
) -> str | None:
    """The item with the fewest votes; of equals, each rater begins elsewhere in the order.

    One question after the other, each with its part of what is wanted of a rater.
    """
    number, questions = len(store.items), len(store.round.study.question)
    turn = (ITEMS.c.place % BLOCK + draw_number(store.seed, "turn", rater) % number) % number
    query = sql.select(ITEMS.c.id).where(*which)
    if questions > 1:
        part = _answered(store, connection, rater) * questions // _wanted_of(store)
        question = ITEMS.c.place // BLOCK
        query = query.order_by(question != part, question)
    query = query.order_by(ITEMS.c.taken, turn).limit(1)
    found: str | None = connection.execute(query).scalar_one_or_none()
    return found


def _repeatable(store: LabelStore, connection: Connection, rater: int) -> str | None:
    """An item this rater answered at least `repeat_gap` hands ago and was not asked again."""
    again = HANDS.alias()
    repeated = sql.select(again.c.id).where(
        again.c.rater == rater, again.c.item == HANDS.c.item, again.c.repeat > 0
    )
    query = (
        sql.select(HANDS.c.item, HANDS.c.state)
        .where(HANDS.c.rater == rater, HANDS.c.item.not_in(store.practice), ~repeated.exists())
        .order_by(HANDS.c.id.desc())
        .offset(store.settings.repeat_gap)
    )
    items = [row.item for row in connection.execute(query) if row.state == "done"]
    return min(items, key=lambda i: draw_number(store.seed, "again", rater, i), default=None)


def _give(store: LabelStore, connection: Connection, rater: int, item: str, repeat: int) -> Row:
    order = list(range(len(store.items[item].images)))
    random.Random(draw_number(store.seed, "shown", rater, item, repeat)).shuffle(order)
    now = store.clock()
    row: dict[str, Any] = {
        "rater": rater, "item": item, "repeat": repeat, "shown": json.dumps(order), "handed": now,
        "expires": now + 60 * store.settings.minutes, "state": "open",
    }  # fmt: skip
    added = connection.execute(sql.insert(HANDS).values(row).returning(HANDS.c.id)).scalar_one()
    if repeat == 0:
        _take(connection, item, 1)
    return {**row, "id": added}
