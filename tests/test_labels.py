"""Rounds are read strictly; the label store loses, doubles and mixes up nothing."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from d3po_bench.errors import UserError
from d3po_bench.feedback.page.server import default_url
from d3po_bench.feedback.rounds import Item, Round, check_answer
from d3po_bench.feedback.store import (
    AlreadyVotedError,
    Hand,
    LabelStore,
    NotHandedError,
    Plan,
    Progress,
    token_hash,
)
from tests.feedback_round import new_round, picture

PLAIN = Plan(gold_every=0, repeat_every=0)
SERVER = os.environ.get("D3PO_TEST_POSTGRES")
"""URL of a scratch database, such as postgresql+psycopg://me:secret@localhost/scratch: the same
tests on Postgres."""
SCHEMAS: set[str] = set()
sqlite_alone = pytest.mark.skipif(SERVER is not None, reason="of SQLite's files alone")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(
    folder: Path, round_: Round, plan: Plan = PLAIN, clock: Clock | None = None
) -> LabelStore:
    return LabelStore(url_of(folder), round_, plan, clock or Clock())


def url_of(folder: Path) -> str:
    """SQLite in the folder, or a schema of its own in the Postgres that SERVER names."""
    if SERVER is None:
        return default_url(folder)
    name = "test_" + hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    _run(SERVER, f"create schema if not exists {name}")
    SCHEMAS.add(name)
    inside = sql.make_url(SERVER).update_query_dict({"options": f"-csearch_path={name}"})
    return inside.render_as_string(hide_password=False)


@pytest.fixture(autouse=True)
def gone_afterwards() -> Iterator[None]:
    """Leave no schema behind."""
    yield
    while SERVER and SCHEMAS:
        _run(SERVER, f"drop schema {SCHEMAS.pop()} cascade")


def executed(folder: Path, statement: str) -> list[tuple[Any, ...]]:
    """Look into a round's labels, or change them, past the store."""
    return _run(url_of(folder), statement)


def _run(url: str, statement: str) -> list[tuple[Any, ...]]:
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        found = connection.execute(sql.text(statement))
        rows = [tuple(row) for row in found] if found.returns_rows else []
    engine.dispose()
    return rows


def invited(store: LabelStore, *names: str) -> list[int]:
    found = [store.rater_of(store.invite(name)) for name in names]
    return [rater.id for rater in found if rater]


def handed(store: LabelStore, rater: int) -> Hand:
    hand = store.hand_out(rater)
    assert hand is not None
    return hand


def voted(store: LabelStore, rater: int, *tagged: int) -> Hand:
    hand = handed(store, rater)
    store.vote(rater, hand.id, tagged, 1500, hand.step)
    return hand


@pytest.fixture
def small(tmp_path: Path) -> Round:
    return new_round(tmp_path / "round", "tags", 4, images=3, size=4)


@pytest.fixture
def store(tmp_path: Path, small: Round, clock: Clock) -> Iterator[LabelStore]:
    with opened(tmp_path / "round", small, PLAIN, clock) as made:
        yield made


# ---- round.json


@pytest.mark.parametrize(("kind", "gold"), [("tags", (0, 2)), ("tags", ()), ("pairs", "tie")])
def test_a_round_is_read_as_it_was_written(tmp_path: Path, kind: Any, gold: Any) -> None:
    made = new_round(tmp_path / "r", kind, 3, gold={1: gold}, size=4, prompt="a “cat” {}")
    assert Round.read(tmp_path / "r") == made
    assert [item.gold for item in made.items] == [None, gold, None]
    assert made.images_per_item == (7 if kind == "tags" else 2)


def edit(folder: Path, **changes: Any) -> Path:
    """Change fields of round.json; a name like items.0.id goes down."""
    path = folder / "round.json"
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        place = data
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[int(last) if last.isdigit() else last] = value
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "grid"}, "kind"),
        ({"kind": ["tags"]}, "kind"),
        ({"question": None}, "question"),
        ({"blurred": 1}, "blurred"),
        ({"items": []}, "items"),
        ({"items": {}}, "items"),
        ({"extra": 1}, "the whole"),
        ({"items__1": "x"}, "items[1]"),
        ({"items__1__extra": 1}, "items[1]"),
        ({"items__1__id": "0000"}, "items[1].id"),
        ({"items__1__id": "a/b"}, "items[1].id"),
        ({"items__1__id": 1}, "items[1].id"),
        ({"items__1__prompt": None}, "items[1].prompt"),
        ({"items__1__images": ["images/0001-0.png"]}, "items[1].images"),
        ({"items__1__images": "images"}, "items[1].images"),
        ({"items__1__images": ["images/0001-0.png"] * 10}, "items[1].images"),
        ({"items__1__images": ["images/0001-0.png"] * 2}, "items[1].images"),
        ({"items__1__images__2": "/etc/passwd"}, "items[1].images[2]"),
        ({"items__1__images__2": "../outside.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "images/../../outside.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "link.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "a\\b.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "a\0b.png"}, "items[1].images[2]"),
        ({"items__1__images__2": ""}, "items[1].images[2]"),
        ({"items__1__images__2": "images"}, "items[1].images[2]"),
        ({"items__1__images__2": "images/none.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "text.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "cut.png"}, "items[1].images[2]"),
        ({"items__1__images__2": "empty.png"}, "items[1].images[2]"),
        ({"items__1__gold": "a"}, "items[1].gold"),
        ({"items__1__gold": [3]}, "items[1].gold"),
        ({"items__1__gold": [-1]}, "items[1].gold"),
        ({"items__1__gold": [True]}, "items[1].gold"),
        ({"items__1__gold": [0, 0]}, "items[1].gold"),
    ],
)
def test_a_malformed_round_is_refused_in_one_line(
    tmp_path: Path, small: Round, change: dict[str, Any], field: str
) -> None:
    folder = tmp_path / "round"
    (tmp_path / "outside.png").write_bytes(picture(1))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "text.png").write_text("no picture at all, but long enough")
    (folder / "cut.png").write_bytes(picture(1)[:-20])
    (folder / "empty.png").touch()
    path = edit(folder, **change)
    with pytest.raises(UserError) as problem:
        Round.read(folder)
    said = str(problem.value)
    assert said.startswith(f"Expected {field} in {path} to be ")
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udcff", "[]", "3", "null"])
def test_what_is_no_round_is_refused(tmp_path: Path, small: Round, text: str) -> None:
    path = tmp_path / "round" / "round.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=str(path)):
        Round.read(tmp_path / "round")


def test_a_folder_without_a_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected a round in .* got no round\.json"):
        Round.read(tmp_path)


def test_a_round_that_could_not_be_read_is_not_written(tmp_path: Path, small: Round) -> None:
    before = (tmp_path / "round" / "round.json").read_bytes()
    wrong = replace(small, items=(Item("a", "b", ("images/none.png",) * 3),))
    with pytest.raises(UserError, match=r"items\[0\]\.images\[0\]"):
        wrong.write(tmp_path / "round")
    assert (tmp_path / "round" / "round.json").read_bytes() == before


def test_answers_are_checked() -> None:
    assert check_answer("tags", 7, [6, 0]) == (0, 6)
    assert check_answer("pairs", 2, "bad") == "bad"
    for kind, answer in [("tags", "a"), ("tags", None), ("pairs", [0]), ("pairs", "c")]:
        with pytest.raises(ValueError, match=r"one of a, b|a list of indices"):
            check_answer(kind, 2, answer)  # type: ignore[arg-type]


# ---- raters


@sqlite_alone
def test_a_token_is_kept_as_its_hash_alone(tmp_path: Path, store: LabelStore) -> None:
    token = store.invite("Ann")
    rater = store.rater_of(token)
    assert rater is not None
    assert (rater.name, rater.token_hash) == ("Ann", token_hash(token))
    assert len(token) == 43  # 32 bytes
    store.close()
    kept = b"".join(p.read_bytes() for p in (tmp_path / "round").glob("labels.sqlite*"))
    assert token.encode() not in kept


def test_a_new_invitation_ends_the_old_one(store: LabelStore) -> None:
    old, other = store.invite("Ann"), store.invite("Bob")
    new = store.invite("Ann")
    assert store.rater_of(old) is None
    assert store.rater_of(new) is not None
    assert store.rater_of(other) is not None
    assert [rater.name for rater in store.raters()] == ["Ann", "Bob"]


def test_a_disabled_rater_is_nobody_until_let_in(store: LabelStore) -> None:
    token = store.invite("Ann")
    store.disable("Ann")
    assert store.rater_of(token) is None
    assert store.rater(1) is None
    store.disable("Ann", disabled=False)
    assert store.rater_of(token) == store.rater(1) != None  # noqa: E711
    with pytest.raises(UserError, match="Known: Ann"):
        store.disable("Eve")


@pytest.mark.parametrize("name", ["", " ", "x" * 61, "a\nb"])
def test_odd_names_are_refused(store: LabelStore, name: str) -> None:
    with pytest.raises(UserError, match="Expected a rater's name"):
        store.invite(name)


# ---- handing out


def test_asking_again_gives_the_same_item_in_the_same_order(store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    first = handed(store, ann)
    assert sorted(first.shown) == [0, 1, 2]
    assert handed(store, ann) == first == store.hand(ann, first.id)


def test_nobody_gets_an_item_twice_and_everybody_gets_to_the_end(store: LabelStore) -> None:
    store.plan = replace(PLAIN, votes_per_item=2)
    raters = invited(store, "Ann", "Bob", "Cyd")
    given: dict[int, list[str]] = {rater: [] for rater in raters}
    while sum(voted_or_none(store, rater, given[rater]) for rater in raters):
        pass
    assert all(len(set(items)) == len(items) for items in given.values())
    assert Counter(item for items in given.values() for item in items) == dict.fromkeys(
        ("0000", "0001", "0002", "0003"), 2
    )
    assert store.status() == Progress(4, 0)


def voted_or_none(store: LabelStore, rater: int, given: list[str]) -> bool:
    hand = store.hand_out(rater)
    if hand:
        given.append(hand.item.id)
        store.vote(rater, hand.id, (), 1, hand.step)
    return hand is not None


def test_the_item_with_the_fewest_votes_comes_first(store: LabelStore) -> None:
    store.plan = replace(PLAIN, votes_per_item=4)
    ann, bob = invited(store, "Ann", "Bob")
    first = {voted(store, ann).item.id for _ in range(3)}
    assert handed(store, bob).item.id not in first


def test_the_seed_decides_the_order_and_another_seed_another(tmp_path: Path) -> None:
    def order(seed: int, name: str) -> list[tuple[str, tuple[int, ...]]]:
        round_ = new_round(tmp_path / name, "tags", 6, images=3, size=2)
        with opened(tmp_path / name, round_, replace(PLAIN, seed=seed)) as store:
            (ann,) = invited(store, "Ann")
            hands = [voted(store, ann) for _ in range(6)]
        return [(hand.item.id, hand.shown) for hand in hands]

    assert order(1, "a") == order(1, "b") != order(2, "c")


def test_an_abandoned_item_returns_to_the_pool(store: LabelStore, clock: Clock) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    left = handed(store, ann)
    given = {voted(store, bob).item.id for _ in range(3)}
    assert left.item.id not in given
    assert store.hand_out(bob) is None
    clock.now += 60 * 15 - 1
    assert store.hand_out(bob) is None
    clock.now += 2
    assert handed(store, bob).item == left.item
    # it is Bob's now: there is nothing for Ann
    assert store.hand_out(ann) is None
    # but what she answers late is not thrown away
    store.vote(ann, left.id, (), 1, left.step)
    assert [vote.rater for vote in store.effective_votes()].count("Ann") == 1


def test_who_comes_back_gets_what_they_left_if_nobody_took_it(
    store: LabelStore, clock: Clock
) -> None:
    (ann,) = invited(store, "Ann")
    left = handed(store, ann)
    clock.now += 3600
    assert handed(store, ann) == left


def test_gold_and_repeats_are_mixed_in_at_their_rate(tmp_path: Path) -> None:
    gold = dict.fromkeys(range(10), (0,))
    round_ = new_round(tmp_path / "r", "tags", 60, images=2, size=2, gold=gold)
    with opened(tmp_path / "r", round_, Plan(gold_every=10, repeat_every=5)) as store:
        (ann,) = invited(store, "Ann")
        hands = [voted(store, ann) for _ in range(50)]
        first = {hand.item.id: n for n, hand in enumerate(hands) if hand.repeat == 0}
        again = [(n, hand) for n, hand in enumerate(hands) if hand.repeat]
        # one gold item in each ten; repeats from when there is something to repeat
        golds = [sum(h.item.gold is not None and not h.repeat for h in hands[:n]) for n in (10, 50)]
        assert golds == [1, 5]
        assert 8 <= len(again) <= 10
        assert all(n - first[hand.item.id] > store.plan.repeat_gap for n, hand in again)
        assert len({hand.item.id for _, hand in again}) == len(again)
        # a repeat is no second vote on the item
        assert executed(tmp_path / "r", "select max(taken) from items") == [(1,)]


def test_gold_is_for_everybody_whatever_the_number_of_votes(tmp_path: Path) -> None:
    round_ = new_round(tmp_path / "r", "tags", 9, images=2, size=2, gold={0: ()})
    with opened(tmp_path / "r", round_, Plan(gold_every=2, repeat_every=0)) as store:
        for rater in invited(store, "Ann", "Bob", "Cyd"):
            assert "0000" in {voted(store, rater).item.id for _ in range(2)}


def test_progress_counts_what_is_done_and_what_could_come(store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    assert store.progress(ann) == Progress(0, 4)
    voted(store, ann)
    handed(store, ann)
    assert store.progress(ann) == Progress(1, 3)
    assert store.progress(bob) == Progress(0, 2)


# ---- votes


def test_a_vote_holds_what_was_shown_and_when(store: LabelStore, clock: Clock) -> None:
    (ann,) = invited(store, "Ann")
    hand = handed(store, ann)
    clock.now = 2000.5
    store.vote(ann, hand.id, (2, 0), 1234, 0)
    (vote,) = store.effective_votes()
    assert vote.rater == "Ann"
    assert (vote.item, vote.repeat, vote.shown) == (hand.item.id, 0, hand.shown)
    assert (vote.answer, vote.milliseconds, vote.time) == ((0, 2), 1234, 2000.5)


def rows(folder: Path) -> list[tuple[Any, ...]]:
    return executed(folder / "round", "select hand, step, kind, answer from votes order by id")


def test_an_undo_is_a_row_and_the_item_comes_again(tmp_path: Path, store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    first, second = voted(store, ann, 0), voted(store, ann, 1)
    third = handed(store, ann)
    undone = store.undo(ann, store.last(ann))
    assert (undone.id, undone.shown, undone.step) == (second.id, second.shown, 2)
    assert handed(store, ann) == undone
    assert [vote.answer for vote in store.effective_votes()] == [(0,)]
    store.vote(ann, undone.id, (2,), 5, undone.step)
    assert handed(store, ann) == third
    assert [vote.answer for vote in store.effective_votes()] == [(0,), (2,)]
    assert rows(tmp_path) == [
        (first.id, 0, "vote", "[0]"),
        (second.id, 0, "vote", "[1]"),
        (second.id, 1, "undo", None),
        (second.id, 2, "vote", "[2]"),
    ]


def test_undo_goes_back_vote_by_vote_to_the_first(store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    hands = [voted(store, ann) for _ in range(3)]
    assert [store.undo(ann, store.last(ann)).id for _ in range(3)] == [
        hand.id for hand in reversed(hands)
    ]
    with pytest.raises(AlreadyVotedError, match="Expected a vote to undo, got none"):
        store.undo(ann, store.last(ann))
    assert store.last(ann) == 0
    assert store.effective_votes() == []


def test_an_undo_that_is_sent_again_takes_no_other_vote_back(store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    first, second = voted(store, ann), voted(store, ann)
    voted(store, bob)
    last = store.last(ann)
    assert store.undo(ann, last).id == second.id
    for vote in (last, last + 1, 0):  # again; Bob's; none
        with pytest.raises(AlreadyVotedError, match="Expected your last vote to undo"):
            store.undo(ann, vote)
    assert {vote.item for vote in store.effective_votes() if vote.rater == "Ann"} == {first.item.id}


def test_a_skipped_item_goes_to_somebody_else(store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    skipped = handed(store, ann)
    store.vote(ann, skipped.id, None, 5, 0)
    assert skipped.item.id not in {voted(store, ann).item.id for _ in range(3)}
    assert store.hand_out(ann) is None
    assert handed(store, bob).item == skipped.item
    assert len(store.effective_votes()) == 3
    # the last three were votes; the fourth undo takes back the skip
    assert [store.undo(ann, store.last(ann)).id for _ in range(4)][-1] == skipped.id


def test_refused_votes_store_nothing(tmp_path: Path, store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    hand = handed(store, ann)
    for rater, number in [(bob, hand.id), (ann, 99), (ann, 0), (ann, 10**30)]:
        with pytest.raises(NotHandedError, match="Expected an item that was handed to you"):
            store.vote(rater, number, (), 5, 0)
    for step in (1, 2, -2):
        with pytest.raises(AlreadyVotedError):
            store.vote(ann, hand.id, (), 5, step)
    for answer in ((3,), (0, 0), "a"):
        with pytest.raises(UserError, match="as answer, got"):
            store.vote(ann, hand.id, answer, 5, 0)
    for spent in (-1, 10**9):
        with pytest.raises(UserError, match="milliseconds"):
            store.vote(ann, hand.id, (), spent, 0)
    assert rows(tmp_path) == []
    store.vote(ann, hand.id, (), 5, 0)
    with pytest.raises(AlreadyVotedError):
        store.vote(ann, hand.id, (1,), 5, 0)
    store.undo(ann, store.last(ann))
    with pytest.raises(AlreadyVotedError):  # the first answer, sent again after the undo
        store.vote(ann, hand.id, (), 5, 0)
    assert len(rows(tmp_path)) == 2


def test_sixteen_raters_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    round_ = new_round(tmp_path / "r", "pairs", 24, size=2)
    plan = replace(PLAIN, votes_per_item=3)
    problems: list[BaseException] = []
    with opened(tmp_path / "r", round_, plan) as one, opened(tmp_path / "r", round_, plan) as two:
        raters = invited(one, *(f"rater {n}" for n in range(16)))
        counts: Counter[int] = Counter()

        def work(store: LabelStore, rater: int) -> None:
            try:
                while hand := store.hand_out(rater):
                    store.vote(rater, hand.id, "a", 1, hand.step)
                    counts[rater] += 1
            except BaseException as problem:
                problems.append(problem)

        # two stores: as two server processes on one database
        threads = [
            threading.Thread(target=work, args=((one, two)[n % 2], rater))
            for n, rater in enumerate(raters)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        votes = one.effective_votes()
        assert problems == []
        assert len(votes) == counts.total() == 24 * 3
        assert Counter(vote.item for vote in votes) == {item.id: 3 for item in round_.items}
        assert len({(vote.rater, vote.item) for vote in votes}) == len(votes)


def test_of_one_answer_sent_by_many_threads_one_is_stored(store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    hand = handed(store, ann)
    outcomes: list[str] = []

    def send() -> None:
        try:
            store.vote(ann, hand.id, (), 5, 0)
            outcomes.append("stored")
        except AlreadyVotedError:
            outcomes.append("refused")

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(outcomes) == {"stored": 1, "refused": 7}
    assert len(store.effective_votes()) == 1


# ---- the database


def test_labels_are_there_after_reopening(tmp_path: Path, small: Round, store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    voted(store, ann, 1)
    before = store.effective_votes()
    store.close()
    with opened(tmp_path / "round", small, replace(PLAIN, seed=5)) as again:
        assert again.effective_votes() == before
        assert again.raters()[0].name == "Ann"


@sqlite_alone
def test_votes_are_synced_before_they_are_acknowledged(store: LabelStore) -> None:
    with store._writing() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    with store._writing("NORMAL") as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1


def test_labels_of_another_round_are_refused(tmp_path: Path, small: Round) -> None:
    opened(tmp_path / "round", small).close()
    fewer = replace(small, items=small.items[1:])
    with pytest.raises(UserError, match="got the item 0000, which it does not have"):
        opened(tmp_path / "round", fewer)
    pairs = new_round(tmp_path / "p", "pairs", 4, size=2)
    with pytest.raises(UserError, match="got labels of kind tags"):
        opened(tmp_path / "round", pairs)


def test_a_longer_round_keeps_its_labels(tmp_path: Path, small: Round) -> None:
    with opened(tmp_path / "round", replace(small, items=small.items[:2])) as store:
        (ann,) = invited(store, "Ann")
        voted(store, ann)
    with opened(tmp_path / "round", small) as store:
        assert len(store.effective_votes()) == 1
        assert store.progress(ann) == Progress(1, 3)


def test_a_newer_version_is_refused(tmp_path: Path, small: Round) -> None:
    opened(tmp_path / "round", small).close()
    executed(tmp_path / "round", "update facts set value = '2' where name = 'version'")
    with pytest.raises(UserError, match=r"Expected labels of version 1 in .*, got version 2"):
        opened(tmp_path / "round", small)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.sqlite", "oracle9://x"])
def test_a_bad_url_is_one_line(small: Round, url: str) -> None:
    with pytest.raises(UserError, match="Expected a database at") as problem:
        LabelStore(url, small)
    assert "\n" not in str(problem.value)


@sqlite_alone
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, small: Round) -> None:
    (tmp_path / "round" / "labels.sqlite").write_text("something else entirely" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        opened(tmp_path / "round", small)


def test_a_password_is_not_shown(small: Round) -> None:
    with pytest.raises(UserError) as problem:
        LabelStore("postgresql+nosuchdriver://me:secret@host/db", small)
    assert "secret" not in str(problem.value)
