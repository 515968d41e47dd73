"""The labels of a round in a database: its tables, and transactions that lose nothing.

Votes are only ever added. An undo is a row of its own, so that nothing a rater did is lost. A
row is on disk before the caller hears of it: SQLite runs with a write-ahead log, and votes and
undos are committed with `synchronous=FULL`, which syncs the log. So an acknowledged vote
survives a kill of the process and a power cut. What only hands out an item is committed with
`synchronous=NORMAL`: it survives a kill, and the next vote syncs it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import sqlalchemy as sql
from sqlalchemy import Column, Connection, ForeignKey, Table
from sqlalchemy.exc import SQLAlchemyError

from d3po_bench.errors import UserError
from d3po_bench.feedback.rounds import Round

LABELS = "labels.sqlite"
"""Where a round's labels are, unless told otherwise."""
VERSION = 1
BLOCK = 10**6
"""Places in the shuffled order that each question has."""

Row = Mapping[Any, Any]
Sync = Literal["FULL", "NORMAL"]
Place = tuple[tuple[int, int] | None, ...]
"""Device and number of each file of a database; None where there is none."""

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
NOTES = Table(
    "notes",  # labels of an earlier version get it when they are opened
    TABLES,
    Column("id", sql.Integer, primary_key=True),
    Column("rater", ForeignKey("raters.id"), nullable=False),
    Column("kind", sql.String(10), nullable=False),  # consent, begun or comment
    Column("hand", sql.Integer, nullable=False),  # and step: the vote that a comment came with
    Column("step", sql.Integer, nullable=False),
    Column("text", sql.Text, nullable=False),
    Column("time", sql.Float(53), nullable=False),
    sql.UniqueConstraint("rater", "kind", "hand", "step"),
)


@dataclass(frozen=True)
class HandoutSettings:
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


class MovedError(SQLAlchemyError):
    """The database is no longer where it was opened."""


class LabelStore:
    """The labels of one round. Threads may share it, and processes may share its database.

    What is in it is asked and changed by `invitations`, `handout` and `votes`.
    """

    def __init__(
        self, url: str, round_: Round, settings: HandoutSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """Open the database at `url`, an SQLAlchemy URL, making its tables if need be.

        Raises:
            UserError: it cannot be opened, is newer than this program, or has labels of
                another round.
        """
        self.round = round_
        self.settings = settings or HandoutSettings()
        self.items = {item.id: item for item in round_.items}
        self.practice = [item.id for item in round_.items if item.use == "practice"]
        """Names of the items that every rater begins with, in their order."""
        self.clock = clock
        # One writer at a time: waiting here is fair, while SQLite's own wait is a poll.
        self._lock = threading.Lock()
        self._place: Place = ()
        with _in_one_line(url, (SQLAlchemyError, ImportError)):  # the driver may be missing
            self._engine = sql.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sql.event.listen(self._engine, "connect", _set_up_sqlite)
            sql.event.listen(self._engine, "begin", _begin_sqlite)
        try:
            with _in_one_line(url):
                with self._engine.begin() as connection:
                    if connection.dialect.name == "postgresql":  # no other may make tables now
                        lock = sql.func.pg_advisory_xact_lock(VERSION)
                        connection.execute(sql.select(lock))
                    TABLES.create_all(connection)
                with self.writing() as connection:
                    self.seed = self._prepare(connection, url)
                self._place = _place_of(self._engine.url)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self, sync: Sync = "FULL") -> Iterator[Connection]:
        """A transaction that no other writer interleaves with; committed on leaving.

        Raises:
            MovedError: its file is no longer in its place, where nobody would find what is written.
        """
        engine = self._engine.execution_options(writing=sync)
        with self._lock:
            self._require_place()
            with engine.begin() as connection:
                # Postgres has no BEGIN IMMEDIATE: a row that every writer locks does the same.
                lock = sql.select(FACTS.c.value).where(FACTS.c.name == "version").with_for_update()
                connection.execute(lock)
                yield connection
            self._require_place()  # as it was when all was written

    def reading(self) -> contextlib.AbstractContextManager[Connection]:
        """A transaction that sees one state of the database.

        Raises:
            MovedError: its file is no longer in its place.
        """
        self._require_place()
        return self._engine.connect()

    def _require_place(self) -> None:
        if self._place and _place_of(self._engine.url) != self._place:
            raise MovedError(
                f"{self._engine.url.database} was moved or removed while it was in use. Put that "
                "file back with its -wal, or restore a copy and start again"
            )

    def _prepare(self, connection: Connection, url: str) -> int:
        """Check what is there, add what is not, and give the seed that the database began with."""
        facts = {row.name: row.value for row in connection.execute(sql.select(FACTS))}
        known_as = self.round.kind, self.round.content
        mine = {"version": str(VERSION), "kind": known_as[0], "seed": str(self.settings.seed)}
        mine["round"] = known_as[1]
        # Labels of an earlier version do not name their round: they are of the first that asks.
        new = [n for n in mine if n not in facts and (not facts or n == "round")]
        facts |= {name: mine[name] for name in new}
        if new:
            rows = [{"name": name, "value": facts[name]} for name in new]
            connection.execute(sql.insert(FACTS), rows)
        if facts.get("version") != str(VERSION):
            raise UserError(
                f"The labels in {_shown(url)} have version {facts.get('version')}, and this "
                f"program reads version {VERSION}. Use the d3po-bench that wrote them."
            )
        known = {row.id for row in connection.execute(sql.select(ITEMS.c.id))}
        strange = sorted(known - self.items.keys())
        if strange or (facts["kind"], facts["round"]) != known_as:
            why = "were given to other pictures, prompts or another question"
            if strange or facts["kind"] != self.round.kind:
                why = f"have an item {strange[0]}" if strange else f"are of kind {facts['kind']}"
            raise UserError(
                f"The labels in {_shown(url)} are not of this round: they {why}. Give the round "
                "they belong to, or another place for the labels."
            )
        seed = int(facts["seed"])
        order = sorted(self.items, key=lambda item: draw_number(seed, "item", item))
        block = {q.name: n * BLOCK for n, q in enumerate(self.round.study.question)}
        rows = [
            {"id": i, "place": block[item.question] + n, "gold": item.gold is not None, "taken": 0}
            for n, i in enumerate(order)
            if i not in known and (item := self.items[i])
        ]
        if rows:
            connection.execute(sql.insert(ITEMS), rows)
        return seed


def draw_number(*key: Any) -> int:
    """A number from 0 to 2^32 - 1, a function of `key` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:4], "big")


# ---- the labels of a folder


def default_url(folder: Path) -> str:
    """Where a round's labels are kept unless told otherwise."""
    return f"sqlite:///{folder.resolve() / LABELS}"


@contextlib.contextmanager
def open_labels(
    folder: Path, labels: str | None, settings: HandoutSettings | None = None, *, new: bool = False
) -> Iterator[LabelStore]:
    """The labels of a round.

    Args:
        folder: of the round.
        labels: URL of the labels; None for those in the folder.
        settings: how items are handed out.
        new: make them if need be; else `labels` must be there, and a folder without has no votes.

    Raises:
        UserError: no such round, no such labels, or labels of another round; or the database
            fails while it is used.
    """
    if labels:
        (require_lasting if new else _require_file)(labels)
    made = new or (folder / LABELS).exists()
    url = labels or (default_url(folder) if made else "sqlite://")
    with LabelStore(url, Round.read(folder), settings) as store, _in_one_line(url):
        yield store


def require_lasting(url: str) -> None:
    """Refuse SQLite's databases in memory, and those whose file its URL hides.

    Raises:
        UserError: votes would be gone with this process, or nobody would see their file go.
    """
    with _in_one_line(url):
        where = sql.make_url(url)
    if where.get_backend_name() == "sqlite" and not _file(where):
        raise UserError(
            f"Votes in {_shown(url)} would not last. Give --labels the path of a file, such as "
            "sqlite:///labels.sqlite."
        )


def _require_file(url: str) -> None:
    """Refuse an SQLite file that is not there, which opening it would make."""
    with _in_one_line(url):
        where = sql.make_url(url)
    file = _file(where)
    if file and not Path(file).is_file():
        raise UserError(
            f"There are no labels at {_shown(url)}. Correct --labels, or ask for votes with "
            "`d3po-bench feedback serve`."
        )


# ---- SQLite, and what a database may say


def _file(url: sql.URL) -> str | None:
    """Where SQLite keeps its database, if it does in a file that the URL names."""
    named = url.get_backend_name() == "sqlite" and "uri" not in url.query
    return url.database if named and url.database not in ("", ":memory:") else None


def _place_of(url: sql.URL) -> Place:
    """Which files lie where SQLite's were opened; nothing in memory, and of other databases.

    SQLite itself does not look again: it writes on into a file that has been removed.
    """
    file = _file(url)
    return tuple(map(_identity, (file, f"{file}-wal"))) if file else ()


def _identity(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)  # noqa: PTH116  # often: twice for every vote
        return found.st_dev, found.st_ino
    return None


def _set_up_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    sync: Sync | None = connection.get_execution_options().get("writing")
    if sync is None:
        connection.exec_driver_sql("BEGIN")
    else:
        # A writer that begins as a reader would fail when two of them turn to writing.
        connection.exec_driver_sql(f"PRAGMA synchronous={sync}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def _in_one_line(
    url: str, faults: tuple[type[Exception], ...] = (SQLAlchemyError,)
) -> Iterator[None]:
    """Say in one line that the database cannot be used, without its password."""
    try:
        yield
    except faults as problem:
        reason = str(getattr(problem, "orig", None) or problem).splitlines()[0]
        raise UserError(
            f"Cannot use {_shown(url)} as a database: {reason}. Give --labels a URL such as "
            "sqlite:///labels.sqlite."
        ) from problem


def _shown(url: str) -> str:
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return ascii(url)[:80]
