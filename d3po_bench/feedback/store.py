"""LabelStore: who was handed which item and what they answered, in a database.

Votes are only ever added. An undo is a row of its own, so that nothing a rater did is lost. A
row is on disk before the caller hears of it: SQLite runs with a write-ahead log, and votes and
undos are committed with `synchronous=FULL`, which syncs the log. So an acknowledged vote
survives a kill of the process and a power cut. What only hands out an item is committed with
`synchronous=NORMAL`: it survives a kill, and the next vote syncs it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import sqlalchemy as sql
from sqlalchemy import Column, Connection, Engine, ForeignKey, Table
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from d3po_bench.errors import UserError
from d3po_bench.feedback.rounds import Answer, Item, Round, Vote, check_answer

VERSION = 1
MOST_MILLISECONDS = 24 * 60 * 60 * 1000
MOST_ID = 2**31 - 1
"""Of a row: what a 32-bit column holds."""

Row = Mapping[Any, Any]
State = Literal["open", "abandoned", "done", "skipped"]
Sync = Literal["FULL", "NORMAL"]

TABLES = sql.MetaData()
FACTS = Table(
    "facts",
    TABLES,
    Column("name", sql.String(40), primary_key=True),
    Column("value", sql.Text, nullable=False),
)
RATERS = Table(
    "raters",
    TABLES,
    Column("id", sql.Integer, primary_key=True),
    Column("name", sql.String(60), nullable=False, unique=True),
    Column("token_hash", sql.String(64), nullable=False, unique=True),
    Column("disabled", sql.Boolean, nullable=False),
)
ITEMS = Table(
    "items",
    TABLES,
    Column("id", sql.String(64), primary_key=True),
    Column("place", sql.Integer, nullable=False),  # in the shuffled order
    Column("gold", sql.Boolean, nullable=False),
    Column("taken", sql.Integer, nullable=False),  # votes and open hands, repeats not counted
)
HANDS = Table(
    "hands",
    TABLES,
    Column("id", sql.Integer, primary_key=True),
    Column("rater", ForeignKey("raters.id"), nullable=False),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("repeat", sql.Integer, nullable=False),
    Column("shown", sql.String(100), nullable=False),
    Column("handed", sql.Float(53), nullable=False),
    Column("expires", sql.Float(53), nullable=False),
    Column("state", sql.String(10), nullable=False),
    sql.UniqueConstraint("rater", "item", "repeat"),  # nobody sees an item twice
    sql.Index("hands_by_state", "state", "expires"),
)
VOTES = Table(
    "votes",
    TABLES,
    Column("id", sql.Integer, primary_key=True),
    Column("hand", ForeignKey("hands.id"), nullable=False),
    Column("step", sql.Integer, nullable=False),  # even: an answer; odd: its undo
    Column("rater", ForeignKey("raters.id"), nullable=False, index=True),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("repeat", sql.Integer, nullable=False),
    Column("shown", sql.String(100), nullable=False),
    Column("kind", sql.String(10), nullable=False),  # vote, skip or undo
    Column("answer", sql.Text),  # JSON; of a vote alone
    Column("milliseconds", sql.Integer, nullable=False),
    Column("time", sql.Float(53), nullable=False),
    sql.UniqueConstraint("hand", "step"),  # the same answer sent twice is stored once
)


class RefusedError(UserError):
    """A vote that is not taken; nothing was stored."""


class NotHandedError(RefusedError):
    """The item was not handed to this rater."""


class AlreadyVotedError(RefusedError):
    """The hand was answered before, or nothing is left to undo."""


@dataclass(frozen=True)
class Plan:
    """How items are handed out."""

    votes_per_item: int = 1
    """Raters asked about each item."""
    gold_every: int = 10
    """One of so many hands is an item with a known answer, while there are any; 0: none."""
    repeat_every: int = 10
    """One of so many hands is an item that the rater has judged before; 0: none."""
    repeat_gap: int = 5
    """Hands between a first judgement and its repeat, at least."""
    minutes: float = 15.0
    """After so long without an answer, an item is free for others."""
    seed: int = 0
    """Of all orders. The seed that a database began with stays."""


@dataclass(frozen=True)
class Rater:
    """Somebody who was invited."""

    id: int
    name: str
    token_hash: str
    """SHA-256 of the invitation token, in hexadecimal. The token itself is not kept."""
    disabled: bool


@dataclass(frozen=True)
class Hand:
    """An item in the hands of a rater."""

    id: int
    item: Item
    repeat: int
    shown: tuple[int, ...]
    """Index of the image at each place."""
    step: int
    """Rows written about this hand so far; even while it is open."""
    open: bool


@dataclass(frozen=True)
class Progress:
    """How far a rater, or the round, has come."""

    done: int
    """Items answered or skipped; of the round: items with all their votes."""
    left: int
    """Of a rater: without repeats and items with a known answer, which nobody may foresee."""


def check_name(name: str) -> None:
    """Refuse a rater's name that is no name.

    Raises:
        UserError: it is empty, longer than 60 characters, or not printable.
    """
    if not name.strip() or len(name) > 60 or not name.isprintable():
        raise UserError(
            f"Expected a rater's name of 1 to 60 printable characters, got {ascii(name)[:80]}. "
            "Give another name."
        )


def token_hash(token: str) -> str:
    """SHA-256 in hexadecimal. Tokens are 256 random bits: nothing can be guessed from it."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


class LabelStore:
    """The labels of one round. Threads may share it, and processes may share its database."""

    def __init__(
        self,
        url: str,
        round_: Round,
        plan: Plan | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the database at `url`, an SQLAlchemy URL, making its tables if need be.

        Raises:
            UserError: it cannot be opened, is newer than this program, or has labels of
                another round.
        """
        self.round = round_
        self.plan = plan or Plan()
        self._items = {item.id: item for item in round_.items}
        self._clock = clock
        # One writer at a time: waiting here is fair, while SQLite's own wait is a poll.
        self._lock = threading.Lock()
        self._engine = _engine(url)
        with contextlib.ExitStack() as failing:
            failing.callback(self.close)
            with _database(url):
                with self._engine.begin() as connection:
                    _one_at_a_time(connection)
                    TABLES.create_all(connection)
                with self._writing() as connection:
                    self._prepare(connection, url)
            failing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # ---- raters

    def invite(self, name: str) -> str:
        """A fresh invitation token for `name`, new or known; an earlier one no longer works.

        Raises:
            UserError: the name is empty, longer than 60 characters, or not printable.
        """
        check_name(name)
        token = secrets.token_urlsafe(32)
        with self._writing() as connection:
            found = connection.execute(
                sql.update(RATERS).where(RATERS.c.name == name).values(token_hash=token_hash(token))
            )
            if not found.rowcount:
                row = {"name": name, "token_hash": token_hash(token), "disabled": False}
                connection.execute(sql.insert(RATERS).values(row))
        return token

    def invite_admin(self) -> str:
        """A fresh token for the admin page; an earlier one no longer works."""
        token = secrets.token_urlsafe(32)
        with self._writing() as connection:
            connection.execute(sql.delete(FACTS).where(FACTS.c.name == "admin"))
            connection.execute(sql.insert(FACTS).values(name="admin", value=token_hash(token)))
        return token

    def admin_hash(self) -> str | None:
        """SHA-256 of the admin token, or None while there is none."""
        with self._reading() as connection:
            return _fact(connection, "admin")

    def rater_of(self, token: str) -> Rater | None:
        """Who was invited with `token`; None if nobody, or somebody disabled."""
        return self._rater(RATERS.c.token_hash == token_hash(token))

    def rater(self, id_: int) -> Rater | None:
        """The rater with this number; None if there is none, or disabled."""
        return self._rater(RATERS.c.id == id_)

    def raters(self) -> list[Rater]:
        """Everybody who was invited, by name."""
        with self._reading() as connection:
            rows = connection.execute(sql.select(RATERS).order_by(RATERS.c.name))
            return [Rater(**row) for row in rows.mappings()]

    def disable(self, name: str, *, disabled: bool = True) -> None:
        """Keep a rater out, or let them in again. Their votes stay.

        Raises:
            UserError: nobody has that name.
        """
        with self._writing() as connection:
            change = sql.update(RATERS).where(RATERS.c.name == name).values(disabled=disabled)
            if not connection.execute(change).rowcount:
                known = ", ".join(r.name for r in self.raters()) or "nobody"
                raise UserError(
                    f"Expected a rater of this round, got {ascii(name)[:80]}. Known: {known}."
                )

    # ---- handing out

    def hand_out(self, rater: int) -> Hand | None:
        """The item that this rater should judge now; None when there is nothing for them.

        What they hold comes first, so that asking again gives the same item in the same order.
        """
        with self._writing("NORMAL") as connection:
            self._return_abandoned(connection)
            held = self._held(connection, rater) or self._regained(connection, rater)
            held = held or self._new(connection, rater)
            return self._hand(connection, held) if held else None

    def hand(self, rater: int, hand: int) -> Hand:
        """What this rater was handed under the number `hand`.

        Raises:
            NotHandedError: it was handed to somebody else, or to nobody.
        """
        with self._reading() as connection:
            return self._hand(connection, self._own(connection, rater, hand))

    def progress(self, rater: int) -> Progress:
        """Items this rater has answered or skipped, and how many could still come."""
        done, held = _is(HANDS, state=("done", "skipped")), _is(HANDS, state=("open",))
        with self._reading() as connection:
            mine = sql.select(sql.func.count()).select_from(HANDS).where(HANDS.c.rater == rater)
            left = sql.select(sql.func.count()).select_from(ITEMS).where(*self._free(rater))
            return Progress(
                connection.execute(mine.where(done)).scalar_one(),
                connection.execute(left).scalar_one()
                + connection.execute(mine.where(held)).scalar_one(),
            )

    def status(self) -> Progress:
        """Items that have `votes_per_item` votes, and those that do not; gold not counted."""
        votes: dict[str, int] = {}
        for vote in self.effective_votes():
            votes[vote.item] = votes.get(vote.item, 0) + (vote.repeat == 0)
        wanted = [item.id for item in self.round.items if item.gold is None]
        done = sum(votes.get(item, 0) >= self.plan.votes_per_item for item in wanted)
        return Progress(done, len(wanted) - done)

    # ---- votes

    def vote(
        self, rater: int, hand: int, answer: Answer | None, milliseconds: int, step: int
    ) -> None:
        """Store what a rater answered; None skips. On return it is on disk.

        Args:
            rater: number of the rater.
            hand: number of the hand.
            answer: in the item's own indices, whatever order was shown.
            milliseconds: from seeing the item to answering it.
            step: the hand's `step` when it was shown: tells an answer that is sent again, its
                acknowledgement having been lost, from a new answer after an undo.

        Raises:
            NotHandedError: the hand is not this rater's.
            AlreadyVotedError: it was answered before.
            UserError: the answer is none, or the time is out of range.
        """
        if not 0 <= milliseconds <= MOST_MILLISECONDS:
            raise UserError(
                f"Expected 0 to {MOST_MILLISECONDS} milliseconds, got {milliseconds}. Vote again."
            )
        with self._writing() as connection:
            row = self._own(connection, rater, hand)
            if answer is not None:
                answer = self._checked(row, answer)
            if step % 2 or step != _steps(connection, hand):
                raise _already()
            self._answer(connection, row, answer, milliseconds, step)

    def last(self, rater: int) -> int:
        """Number of this rater's last vote or skip that is not undone; 0 where there is none."""
        with self._reading() as connection:
            row = _last(connection, rater)
            return int(row["id"]) if row else 0

    def undo(self, rater: int, vote: int) -> Hand:
        """Take back this rater's last vote or skip, with a new row; its item is open again.

        Args:
            rater: number of the rater.
            vote: what `last` gives: an undo that is sent again, its acknowledgement having been
                lost, does not take back another.

        Raises:
            AlreadyVotedError: `vote` is not the last, or there is nothing to take back.
        """
        with self._writing() as connection:
            last = _last(connection, rater)
            if last is None:
                raise AlreadyVotedError("Expected a vote to undo, got none. Vote first.")
            if last["id"] != vote:
                raise AlreadyVotedError(
                    "Expected your last vote to undo, got another. Reload the page."
                )
            row = self._own(connection, rater, last["hand"])
            self._append(connection, row, last["step"] + 1, "undo", None, 0)
            self._set(connection, row, "open")
            return self._hand(connection, row)

    def effective_votes(self) -> list[Vote]:
        """Votes in the order they were given, without what was skipped or undone.

        Raises:
            UserError: a vote on an item that the round has not, or that answers something else.
        """
        query = (
            _live(RATERS.c.name.label("name"))
            .join(RATERS, RATERS.c.id == VOTES.c.rater)
            .where(VOTES.c.kind == "vote")
            .order_by(VOTES.c.id)
        )
        with self._reading() as connection:
            return [self._vote(row) for row in connection.execute(query).mappings()]

    def _vote(self, row: Row) -> Vote:
        """The vote of a row, which another program may have written."""
        try:
            images = len(self._items[row["item"]].images)
            answer = check_answer(self.round.kind, images, json.loads(row["answer"]))
            shown = tuple(json.loads(row["shown"]))
            if sorted(shown) != list(range(images)):
                raise ValueError("an order of all images")
        except (KeyError, TypeError, ValueError) as problem:
            said = ", ".join(f"{k} {ascii(row[k])[:40]}" for k in ("item", "shown", "answer"))
            raise UserError(
                f"Expected votes on this round's items, got vote {row['id']} with {said}. Restore "
                "the labels from a copy, or give those of this round."
            ) from problem
        return Vote(
            rater=row["name"], item=row["item"], repeat=row["repeat"], shown=shown,
            answer=answer, milliseconds=row["milliseconds"], time=row["time"],
        )  # fmt: skip

    # ---- inside a transaction

    @contextlib.contextmanager
    def _writing(self, sync: Sync = "FULL") -> Iterator[Connection]:
        """A transaction that no other writer interleaves with; committed on leaving."""
        engine = self._engine.execution_options(writing=sync)
        with self._lock, engine.begin() as connection:
            # Postgres has no BEGIN IMMEDIATE: a row that every writer locks does the same.
            lock = sql.select(FACTS.c.value).where(FACTS.c.name == "version").with_for_update()
            connection.execute(lock)
            yield connection

    def _reading(self) -> contextlib.AbstractContextManager[Connection]:
        return self._engine.connect()

    def _prepare(self, connection: Connection, url: str) -> None:
        """Check what is there, and add what is not."""
        found = _fact(connection, "version")
        if found is None:
            facts = {"version": VERSION, "kind": self.round.kind, "seed": self.plan.seed}
            rows = [{"name": name, "value": str(value)} for name, value in facts.items()]
            connection.execute(sql.insert(FACTS), rows)
        elif found != str(VERSION):
            raise UserError(
                f"Expected labels of version {VERSION} in {_shown(url)}, got version {found}. "
                "Use the version of d3po-bench that wrote them."
            )
        self._seed = int(_fact(connection, "seed") or 0)
        self._require_same(connection, url)
        self._add_items(connection)

    def _require_same(self, connection: Connection, url: str) -> None:
        """Refuse labels of another round."""
        kind = _fact(connection, "kind")
        known = {row.id for row in connection.execute(sql.select(ITEMS.c.id))}
        strange = sorted(known - self._items.keys())
        if strange or kind != self.round.kind:
            got = f"the item {strange[0]}" if strange else f"labels of kind {kind}"
            raise UserError(
                f"Expected the labels of this round in {_shown(url)}, got {got}, which it does "
                "not have. Give the round they belong to, or another place for the labels."
            )

    def _add_items(self, connection: Connection) -> None:
        known = {row.id for row in connection.execute(sql.select(ITEMS.c.id))}
        order = sorted(self._items, key=lambda item: _draw(self._seed, "item", item))
        rows = [
            {"id": i, "place": n, "gold": self._items[i].gold is not None, "taken": 0}
            for n, i in enumerate(order)
            if i not in known
        ]
        if rows:
            connection.execute(sql.insert(ITEMS), rows)

    def _rater(self, which: sql.ColumnElement[bool]) -> Rater | None:
        query = sql.select(RATERS).where(which, RATERS.c.disabled.is_(False))
        with self._reading() as connection:
            row = connection.execute(query).mappings().first()
            return Rater(**row) if row else None

    def _own(self, connection: Connection, rater: int, hand: int) -> Row:
        query = sql.select(HANDS).where(HANDS.c.id == hand, HANDS.c.rater == rater)
        row = connection.execute(query).mappings().first() if 0 < hand <= MOST_ID else None
        if row is None:
            raise NotHandedError("Expected an item that was handed to you, got another. Reload.")
        return dict(row)

    def _checked(self, row: Row, answer: Answer) -> Answer:
        try:
            return check_answer(self.round.kind, len(json.loads(row["shown"])), answer)
        except ValueError as problem:
            raise UserError(
                f"Expected {problem} as answer, got {ascii(answer)[:80]}. Vote again."
            ) from problem

    def _answer(
        self, connection: Connection, row: Row, answer: Answer | None, spent: int, step: int
    ) -> None:
        kind = "skip" if answer is None else "vote"
        try:
            self._append(connection, row, step, kind, answer, spent)
        except IntegrityError as problem:  # somebody else's process was faster
            raise _already() from problem
        self._set(connection, row, "skipped" if answer is None else "done")

    def _append(
        self, connection: Connection, row: Row, step: int, kind: str, answer: Any, spent: int
    ) -> None:
        values = {key: row[key] for key in ("rater", "item", "repeat", "shown")} | {
            "hand": row["id"],
            "step": step,
            "kind": kind,
            "answer": None if answer is None else json.dumps(answer),
            "milliseconds": spent,
            "time": self._clock(),
        }
        connection.execute(sql.insert(VOTES).values(values))

    def _set(self, connection: Connection, row: Row, state: State) -> None:
        """Change a hand's state, and with it what counts as taken of its item."""
        now = self._clock()
        values: dict[str, Any] = {"state": state}
        if state == "open":
            values |= {"handed": now, "expires": now + 60 * self.plan.minutes}
        connection.execute(sql.update(HANDS).where(HANDS.c.id == row["id"]).values(values))
        counts = ("open", "done")
        change = (state in counts) - (row["state"] in counts)
        if change and row["repeat"] == 0:
            _take(connection, row["item"], change)

    def _return_abandoned(self, connection: Connection) -> None:
        late = sql.select(HANDS).where(HANDS.c.state == "open", HANDS.c.expires < self._clock())
        for row in connection.execute(late).mappings().all():
            self._set(connection, row, "abandoned")

    def _held(self, connection: Connection, rater: int) -> Row | None:
        """The open hand that was given last: after an undo, the one that was undone."""
        query = sql.select(HANDS).where(HANDS.c.rater == rater, HANDS.c.state == "open")
        row = connection.execute(query.order_by(HANDS.c.handed.desc(), HANDS.c.id)).mappings()
        found = row.first()
        if found:
            expires = self._clock() + 60 * self.plan.minutes
            change = sql.update(HANDS).where(HANDS.c.id == found["id"]).values(expires=expires)
            connection.execute(change)
        return dict(found) if found else None

    def _regained(self, connection: Connection, rater: int) -> Row | None:
        """A hand that this rater left lying and nobody took since."""
        query = (
            sql.select(HANDS)
            .join(ITEMS, ITEMS.c.id == HANDS.c.item)
            .where(HANDS.c.rater == rater, HANDS.c.state == "abandoned")
            .where(self._wanted() | (HANDS.c.repeat > 0) | ITEMS.c.gold)
            .order_by(HANDS.c.id)
        )
        row = connection.execute(query).mappings().first()
        if row:
            self._set(connection, row, "open")
        return dict(row) if row else None

    def _new(self, connection: Connection, rater: int) -> Row | None:
        """A gold item or a repeat when one is due, else the item with the fewest votes."""
        mine = sql.select(sql.func.count()).select_from(HANDS).where(HANDS.c.rater == rater)
        count = connection.execute(mine).scalar_one()
        golds = connection.execute(
            mine.join(ITEMS, ITEMS.c.id == HANDS.c.item).where(ITEMS.c.gold, HANDS.c.repeat == 0)
        ).scalar_one()
        repeats = connection.execute(mine.where(HANDS.c.repeat > 0)).scalar_one()
        item, repeat = None, 0
        if golds < self._due("gold", self.plan.gold_every, rater, count):
            item = self._pick(connection, rater, ITEMS.c.gold, self._unseen(rater))
        if item is None and repeats < self._due("repeat", self.plan.repeat_every, rater, count):
            item, repeat = self._repeatable(connection, rater), 1
        if item is None:
            item, repeat = self._pick(connection, rater, *self._free(rater)), 0
        return None if item is None else self._give(connection, rater, item, repeat)

    def _due(self, what: str, every: int, rater: int, count: int) -> int:
        """How many of the first `count` + 1 hands should be of this sort.

        One in each block of `every`, at a place that the rater cannot foresee.
        """
        if every < 1:
            return 0
        block = count // every
        return block + (count % every >= _draw(self._seed, what, rater, block) % every)

    def _wanted(self) -> sql.ColumnElement[bool]:
        return ITEMS.c.taken < self.plan.votes_per_item

    def _unseen(self, rater: int) -> sql.ColumnElement[bool]:
        seen = sql.select(HANDS.c.id).where(HANDS.c.rater == rater, HANDS.c.item == ITEMS.c.id)
        return ~seen.exists()

    def _free(self, rater: int) -> tuple[sql.ColumnElement[bool], ...]:
        return (ITEMS.c.gold.is_(False), self._wanted(), self._unseen(rater))

    def _pick(
        self, connection: Connection, rater: int, *which: sql.ColumnElement[bool]
    ) -> str | None:
        """The item with the fewest votes; of equals, each rater begins elsewhere in the order."""
        number = len(self._items)
        turn = (ITEMS.c.place + _draw(self._seed, "turn", rater) % number) % number
        query = sql.select(ITEMS.c.id).where(*which).order_by(ITEMS.c.taken, turn).limit(1)
        found: str | None = connection.execute(query).scalar_one_or_none()
        return found

    def _repeatable(self, connection: Connection, rater: int) -> str | None:
        """An item this rater answered at least `repeat_gap` hands ago and was not asked again."""
        again = HANDS.alias()
        repeated = sql.select(again.c.id).where(
            again.c.rater == rater, again.c.item == HANDS.c.item, again.c.repeat > 0
        )
        query = (
            sql.select(HANDS.c.item, HANDS.c.state)
            .where(HANDS.c.rater == rater, ~repeated.exists())
            .order_by(HANDS.c.id.desc())
            .offset(self.plan.repeat_gap)
        )
        items = [row.item for row in connection.execute(query) if row.state == "done"]
        return min(items, key=lambda i: _draw(self._seed, "again", rater, i), default=None)

    def _give(self, connection: Connection, rater: int, item: str, repeat: int) -> Row:
        order = list(range(len(self._items[item].images)))
        random.Random(_draw(self._seed, "shown", rater, item, repeat)).shuffle(order)
        now = self._clock()
        row: dict[str, Any] = {
            "rater": rater,
            "item": item,
            "repeat": repeat,
            "shown": json.dumps(order),
            "handed": now,
            "expires": now + 60 * self.plan.minutes,
            "state": "open",
        }
        added = connection.execute(sql.insert(HANDS).values(row)).inserted_primary_key
        if added is None:
            raise TypeError("the database gave no number to a new row")
        if repeat == 0:
            _take(connection, item, 1)
        return {**row, "id": added[0]}

    def _hand(self, connection: Connection, row: Row) -> Hand:
        steps = _steps(connection, row["id"])
        shown = tuple(json.loads(row["shown"]))
        item = self._items[row["item"]]
        return Hand(row["id"], item, row["repeat"], shown, steps, steps % 2 == 0)


# ---- rows


def _live(*columns: Any) -> sql.Select[Any]:
    """Votes and skips that no later row undoes."""
    undo = VOTES.alias()
    undone = sql.select(undo.c.id).where(
        undo.c.hand == VOTES.c.hand, undo.c.step == VOTES.c.step + 1
    )
    return sql.select(VOTES, *columns).where(VOTES.c.kind != "undo", ~undone.exists())


def _last(connection: Connection, rater: int) -> Row | None:
    """The row that an undo would take back."""
    query = _live().where(VOTES.c.rater == rater).order_by(VOTES.c.id.desc()).limit(1)
    return connection.execute(query).mappings().first()


def _steps(connection: Connection, hand: int) -> int:
    query = sql.select(sql.func.count()).select_from(VOTES).where(VOTES.c.hand == hand)
    return connection.execute(query).scalar_one()


def _take(connection: Connection, item: str, change: int) -> None:
    taken = ITEMS.c.taken + change
    connection.execute(sql.update(ITEMS).where(ITEMS.c.id == item).values(taken=taken))


def _fact(connection: Connection, name: str) -> str | None:
    query = sql.select(FACTS.c.value).where(FACTS.c.name == name)
    found: str | None = connection.execute(query).scalar_one_or_none()
    return found


def _is(table: Table, **values: tuple[str, ...]) -> sql.ColumnElement[bool]:
    return sql.and_(*(table.c[name].in_(known) for name, known in values.items()))


def _already() -> AlreadyVotedError:
    return AlreadyVotedError("Expected an open item, got one that was answered. Reload the page.")


def _draw(*key: Any) -> int:
    """A number from 0 to 2^32 - 1, a function of `key` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:4], "big")


# ---- the database


def _engine(url: str) -> Engine:
    with _database(url):
        engine = sql.create_engine(url)
    if engine.dialect.name == "sqlite":
        sql.event.listen(engine, "connect", _set_up_sqlite)
        sql.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in (
        "busy_timeout=30000", "journal_mode=WAL", "foreign_keys=ON"
    ):  # fmt: skip
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    sync: Sync | None = connection.get_execution_options().get("writing")
    if sync is None:
        connection.exec_driver_sql("BEGIN")
    else:
        # A writer that begins as a reader would fail when two of them turn to writing.
        connection.exec_driver_sql(f"PRAGMA synchronous={sync}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _one_at_a_time(connection: Connection) -> None:
    """Let no other process make the tables until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(VERSION)))


@contextlib.contextmanager
def _database(url: str) -> Iterator[None]:
    """Say in one line that the database cannot be used.

    Raises:
        UserError: naming it, without its password.
    """
    try:
        yield
    except (SQLAlchemyError, ImportError) as problem:
        reason = str(getattr(problem, "orig", None) or problem).splitlines()[0]
        raise UserError(
            f"Expected a database at {_shown(url)}, got: {reason}. Give another --labels URL, "
            "such as sqlite:///labels.sqlite."
        ) from problem


def require_labels(url: str) -> None:
    """Refuse an SQLite file that is not there, which opening it would make.

    Raises:
        UserError: naming it.
    """
    with _database(url):
        where = sql.make_url(url)
    file = where.database if where.get_backend_name() == "sqlite" else None
    if file and file != ":memory:" and "uri" not in where.query and not Path(file).is_file():
        raise UserError(
            f"Expected labels at {_shown(url)}, got no such file. Correct --labels, or ask for "
            "votes with `d3po-bench feedback serve`."
        )


def _shown(url: str) -> str:
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return ascii(url)[:80]
