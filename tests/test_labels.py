"""The labels of a round: nothing is lost, doubled or mixed up, whoever votes how often."""

from __future__ import annotations

import hashlib
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
from d3po_bench.feedback import votes
from d3po_bench.feedback.handout import (
    Hand,
    NotHandedError,
    find_hand,
    hand_out,
    has_finished,
    progress,
)
from d3po_bench.feedback.invitations import (
    disable,
    find_rater,
    invite,
    raters,
    token_hash,
)
from d3po_bench.feedback.rounds import Progress, Round
from d3po_bench.feedback.store import HandoutSettings, LabelStore, default_url
from d3po_bench.feedback.votes import (
    AlreadyVotedError,
    cast_vote,
    effective_votes,
    last_vote,
    round_progress,
    undo_vote,
)
from tests.feedback_round import new_round

PLAIN = HandoutSettings(gold_every=0, repeat_every=0)
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
    folder: Path, round_: Round, settings: HandoutSettings = PLAIN, clock: Clock | None = None
) -> LabelStore:
    return LabelStore(url_of(folder), round_, settings, clock or Clock())


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
    found = [find_rater(store, token=invite(store, name)) for name in names]
    return [rater.id for rater in found if rater]


def handed(store: LabelStore, rater: int) -> Hand:
    hand = hand_out(store, rater)
    assert hand is not None
    return hand


def voted(store: LabelStore, rater: int, *tagged: int) -> Hand:
    hand = handed(store, rater)
    cast_vote(store, rater, hand.id, tagged, 1500, hand.step)
    return hand


@pytest.fixture
def small(tmp_path: Path) -> Round:
    return new_round(tmp_path / "round", "tags", 4, images=3, size=4)


@pytest.fixture
def store(tmp_path: Path, small: Round, clock: Clock) -> Iterator[LabelStore]:
    with opened(tmp_path / "round", small, PLAIN, clock) as made:
        yield made


# ---- raters


@sqlite_alone
def test_a_token_is_kept_as_its_hash_alone(tmp_path: Path, store: LabelStore) -> None:
    token = invite(store, "Ann")
    rater = find_rater(store, token=token)
    assert rater is not None
    assert (rater.name, rater.token_hash) == ("Ann", token_hash(token))
    assert len(token) == 43  # 32 bytes
    store.close()
    kept = b"".join(p.read_bytes() for p in (tmp_path / "round").glob("labels.sqlite*"))
    assert token.encode() not in kept


def test_a_new_invitation_ends_the_old_one(store: LabelStore) -> None:
    old, other = invite(store, "Ann"), invite(store, "Bob")
    new = invite(store, "Ann")
    assert find_rater(store, token=old) is None
    assert find_rater(store, token=new) is not None
    assert find_rater(store, token=other) is not None
    assert [rater.name for rater in raters(store)] == ["Ann", "Bob"]


def test_a_disabled_rater_is_nobody_until_let_in(store: LabelStore) -> None:
    token = invite(store, "Ann")
    disable(store, "Ann")
    assert find_rater(store, token=token) is None
    assert find_rater(store, id_=1) is None
    disable(store, "Ann", disabled=False)
    assert find_rater(store, token=token) == find_rater(store, id_=1) != None  # noqa: E711
    with pytest.raises(UserError, match="Invited so far: Ann"):
        disable(store, "Eve")


def test_odd_names_are_refused(store: LabelStore) -> None:
    for name in ("", " ", "x" * 61, "a\nb"):
        with pytest.raises(UserError, match="cannot be a rater's name"):
            invite(store, name)
    assert raters(store) == []


# ---- handing out


def test_asking_again_gives_the_same_item_in_the_same_order(store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    first = handed(store, ann)
    assert sorted(first.shown) == [0, 1, 2]
    assert handed(store, ann) == first == find_hand(store, ann, first.id)


def test_nobody_gets_an_item_twice_and_everybody_gets_to_the_end(store: LabelStore) -> None:
    store.settings = replace(PLAIN, votes_per_item=2)
    given: dict[int, list[str]] = {rater: [] for rater in invited(store, "Ann", "Bob", "Cyd")}
    while sum(voted_or_none(store, rater, items) for rater, items in given.items()):
        pass
    assert all(len(set(items)) == len(items) for items in given.values())
    assert Counter(item for items in given.values() for item in items) == dict.fromkeys(
        ("0000", "0001", "0002", "0003"), 2
    )
    assert round_progress(store, effective_votes(store)) == Progress(4, 0)


def voted_or_none(store: LabelStore, rater: int, given: list[str]) -> bool:
    hand = hand_out(store, rater)
    if hand:
        given.append(hand.item.id)
        cast_vote(store, rater, hand.id, (), 1, hand.step)
    return hand is not None


def test_the_item_with_the_fewest_votes_comes_first(store: LabelStore) -> None:
    store.settings = replace(PLAIN, votes_per_item=4)
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
    assert hand_out(store, bob) is None
    clock.now += 60 * 15 - 1
    assert hand_out(store, bob) is None
    clock.now += 2
    assert handed(store, bob).item == left.item
    # it is Bob's now: there is nothing for Ann
    assert hand_out(store, ann) is None
    # but what she answers late is not thrown away
    cast_vote(store, ann, left.id, (), 1, left.step)
    assert [vote.rater for vote in effective_votes(store)].count("Ann") == 1


def test_an_item_given_by_a_clock_that_was_ahead_is_not_taken_until_then(
    store: LabelStore, clock: Clock
) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    year = 365 * 24 * 3600.0
    clock.now += year
    items = {voted(store, ann).item.id for _ in range(3)}
    left = handed(store, ann)
    clock.now -= year
    assert handed(store, bob).item.id == left.item.id
    assert {vote.item for vote in effective_votes(store)} == items


def test_a_clock_that_is_set_back_a_little_takes_no_item_away(
    store: LabelStore, clock: Clock
) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    hand = handed(store, ann)
    clock.now -= 60
    assert handed(store, bob).item.id != hand.item.id
    assert handed(store, ann).id == hand.id


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
    with opened(tmp_path / "r", round_, HandoutSettings(gold_every=10, repeat_every=5)) as store:
        (ann,) = invited(store, "Ann")
        hands = [voted(store, ann) for _ in range(50)]
        first = {hand.item.id: n for n, hand in enumerate(hands) if hand.repeat == 0}
        again = [(n, hand) for n, hand in enumerate(hands) if hand.repeat]
        # one gold item in each ten; repeats from when there is something to repeat
        golds = [sum(h.item.gold is not None and not h.repeat for h in hands[:n]) for n in (10, 50)]
        assert golds == [1, 5]
        assert 8 <= len(again) <= 10
        assert all(n - first[hand.item.id] > store.settings.repeat_gap for n, hand in again)
        assert len({hand.item.id for _, hand in again}) == len(again)
        # a repeat is no second vote on the item
        assert executed(tmp_path / "r", "select max(taken) from items") == [(1,)]


@pytest.mark.parametrize("skipped", [0, 1])
def test_who_skips_what_is_asked_again_has_finished(skipped: int, tmp_path: Path) -> None:
    round_ = new_round(tmp_path / "r", "tags", 20, images=2, size=2)
    with opened(tmp_path / "r", round_, HandoutSettings(gold_every=0, repeat_every=2)) as store:
        (ann,) = invited(store, "Ann")
        repeats = []
        while hand := hand_out(store, ann):
            repeats.append(hand.repeat)
            answer = None if hand.repeat == 1 or len(repeats) <= skipped else (0,)
            cast_vote(store, ann, hand.id, answer, 1500, hand.step)
        assert 1 in repeats
        assert has_finished(store, ann) == (not skipped)


def test_gold_is_for_everybody_whatever_the_number_of_votes(tmp_path: Path) -> None:
    round_ = new_round(tmp_path / "r", "tags", 9, images=2, size=2, gold={0: ()})
    with opened(tmp_path / "r", round_, HandoutSettings(gold_every=2, repeat_every=0)) as store:
        for rater in invited(store, "Ann", "Bob", "Cyd"):
            assert "0000" in {voted(store, rater).item.id for _ in range(2)}


def test_progress_counts_what_is_done_and_what_could_come(store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    assert progress(store, ann) == Progress(0, 4)
    voted(store, ann)
    handed(store, ann)
    assert progress(store, ann) == Progress(1, 3)
    assert progress(store, bob) == Progress(0, 2)


# ---- votes


def test_a_vote_holds_what_was_shown_and_when(store: LabelStore, clock: Clock) -> None:
    (ann,) = invited(store, "Ann")
    hand = handed(store, ann)
    clock.now = 2000.5
    cast_vote(store, ann, hand.id, (2, 0), 1234, 0)
    (vote,) = effective_votes(store)
    assert vote.rater == "Ann"
    assert (vote.item, vote.repeat, vote.shown) == (hand.item.id, 0, hand.shown)
    assert (vote.answer, vote.milliseconds, vote.time) == ((0, 2), 1234, 2000.5)


def rows(folder: Path) -> list[tuple[Any, ...]]:
    return executed(folder / "round", "select hand, step, kind, answer from votes order by id")


def test_an_undo_is_a_row_and_the_item_comes_again(tmp_path: Path, store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    first, second = voted(store, ann, 0), voted(store, ann, 1)
    third = handed(store, ann)
    undone = undo_vote(store, ann, last_vote(store, ann))
    assert (undone.id, undone.shown, undone.step) == (second.id, second.shown, 2)
    assert handed(store, ann) == undone
    assert [vote.answer for vote in effective_votes(store)] == [(0,)]
    cast_vote(store, ann, undone.id, (2,), 5, undone.step)
    assert handed(store, ann) == third
    assert [vote.answer for vote in effective_votes(store)] == [(0,), (2,)]
    assert rows(tmp_path) == [
        (first.id, 0, "vote", "[0]"),
        (second.id, 0, "vote", "[1]"),
        (second.id, 1, "undo", None),
        (second.id, 2, "vote", "[2]"),
    ]


def test_undo_goes_back_vote_by_vote_to_the_first(store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    hands = [voted(store, ann) for _ in range(3)]
    assert [undo_vote(store, ann, last_vote(store, ann)).id for _ in range(3)] == [
        hand.id for hand in reversed(hands)
    ]
    with pytest.raises(AlreadyVotedError, match="not your last vote"):
        undo_vote(store, ann, last_vote(store, ann))
    assert last_vote(store, ann) == 0
    assert effective_votes(store) == []


def test_an_undo_that_is_sent_again_takes_no_other_vote_back(store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    first, second = voted(store, ann), voted(store, ann)
    voted(store, bob)
    last = last_vote(store, ann)
    assert undo_vote(store, ann, last).id == second.id
    for vote in (last, last + 1, 0):  # again; Bob's; none
        with pytest.raises(AlreadyVotedError, match="not your last vote"):
            undo_vote(store, ann, vote)
    assert {vote.item for vote in effective_votes(store) if vote.rater == "Ann"} == {first.item.id}


def test_a_skipped_item_goes_to_somebody_else(store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    skipped = handed(store, ann)
    cast_vote(store, ann, skipped.id, None, 5, 0)
    assert skipped.item.id not in {voted(store, ann).item.id for _ in range(3)}
    assert hand_out(store, ann) is None
    assert handed(store, bob).item == skipped.item
    assert len(effective_votes(store)) == 3
    # the last three were votes; the fourth undo takes back the skip
    assert [undo_vote(store, ann, last_vote(store, ann)).id for _ in range(4)][-1] == skipped.id


def test_refused_votes_store_nothing(tmp_path: Path, store: LabelStore) -> None:
    ann, bob = invited(store, "Ann", "Bob")
    hand = handed(store, ann)
    for rater, number in [(bob, hand.id), (ann, 99), (ann, 0), (ann, 10**30)]:
        with pytest.raises(NotHandedError, match="was not handed to you"):
            cast_vote(store, rater, number, (), 5, 0)
    for step in (1, 2, -2):
        with pytest.raises(AlreadyVotedError):
            cast_vote(store, ann, hand.id, (), 5, step)
    for answer in ((3,), (0, 0), "a"):
        with pytest.raises(UserError, match=r"an answer (is a list|names each)"):
            cast_vote(store, ann, hand.id, answer, 5, 0)
    for spent in (-1, 10**9):
        with pytest.raises(UserError, match="milliseconds"):
            cast_vote(store, ann, hand.id, (), spent, 0)
    assert rows(tmp_path) == []
    cast_vote(store, ann, hand.id, (), 5, 0)
    with pytest.raises(AlreadyVotedError):
        cast_vote(store, ann, hand.id, (1,), 5, 0)
    undo_vote(store, ann, last_vote(store, ann))
    with pytest.raises(AlreadyVotedError):  # the first answer, sent again after the undo
        cast_vote(store, ann, hand.id, (), 5, 0)
    assert len(rows(tmp_path)) == 2


def test_sixteen_raters_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    round_ = new_round(tmp_path / "r", "pairs", 24, size=2)
    three = replace(PLAIN, votes_per_item=3)
    problems: list[BaseException] = []
    with opened(tmp_path / "r", round_, three) as one, opened(tmp_path / "r", round_, three) as two:
        people = invited(one, *(f"rater {n}" for n in range(16)))
        counts: Counter[int] = Counter()

        def work(store: LabelStore, rater: int) -> None:
            try:
                while hand := hand_out(store, rater):
                    cast_vote(store, rater, hand.id, "a", 1, hand.step)
                    counts[rater] += 1
            except BaseException as problem:
                problems.append(problem)

        # two stores: as two server processes on one database
        threads = [
            threading.Thread(target=work, args=((one, two)[n % 2], rater))
            for n, rater in enumerate(people)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        votes = effective_votes(one)
        assert problems == []
        assert len(votes) == counts.total() == 24 * 3
        assert Counter(vote.item for vote in votes) == {item.id: 3 for item in round_.items}
        assert len({(vote.rater, vote.item) for vote in votes}) == len(votes)


def test_the_admins_tally_reads_each_row_once(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the page of 40,000 votes takes seconds, each time that it reloads."""
    read: list[int] = []
    vote = votes._vote

    def counted(store: LabelStore, number: int, *told: Any) -> Any:
        read.append(number)
        return vote(store, number, *told)

    monkeypatch.setattr(votes, "_vote", counted)
    tally, (ann,) = votes.Tally(store), invited(store, "Ann")
    voted(store, ann, 0)
    voted(store, ann, 1)
    assert [v.answer for v in tally.votes()] == [(0,), (1,)]
    undo_vote(store, ann, last_vote(store, ann))
    assert [v.answer for v in tally.votes()] == [(0,)]
    voted(store, ann, 2)
    assert [v.answer for v in tally.votes()] == [(0,), (2,)]
    assert read == [1, 2, 4]


def test_a_row_that_does_not_fit_is_refused_each_time(tmp_path: Path, store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    voted(store, ann)
    voted(store, ann)
    executed(tmp_path / "round", f"update votes set answer = '{'[' * 20_000}' where id = 1")
    tally = votes.Tally(store)
    for _ in range(2):
        with pytest.raises(UserError, match="Vote 1 does not fit this round"):
            tally.votes()


def test_of_one_answer_sent_by_many_threads_one_is_stored(store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    hand = handed(store, ann)
    outcomes: list[str] = []

    def send() -> None:
        try:
            cast_vote(store, ann, hand.id, (), 5, 0)
            outcomes.append("stored")
        except AlreadyVotedError:
            outcomes.append("refused")

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(outcomes) == {"stored": 1, "refused": 7}
    assert len(effective_votes(store)) == 1


# ---- the database


def test_labels_are_there_after_reopening(tmp_path: Path, small: Round, store: LabelStore) -> None:
    (ann,) = invited(store, "Ann")
    voted(store, ann, 1)
    before = effective_votes(store)
    store.close()
    with opened(tmp_path / "round", small, replace(PLAIN, seed=5)) as again:
        assert effective_votes(again) == before
        assert raters(again)[0].name == "Ann"


@sqlite_alone
def test_votes_are_synced_before_they_are_acknowledged(store: LabelStore) -> None:
    with store.writing() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    with store.writing("NORMAL") as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1


def test_labels_of_another_round_are_refused(tmp_path: Path, small: Round) -> None:
    opened(tmp_path / "round", small).close()
    fewer = replace(small, groups=small.groups[1:])
    with pytest.raises(UserError, match="not of this round: they have an item 0000"):
        opened(tmp_path / "round", fewer)
    pairs = new_round(tmp_path / "p", "pairs", 4, size=2)
    with pytest.raises(UserError, match="not of this round: they are of kind tags"):
        opened(tmp_path / "round", pairs)


def test_a_longer_round_keeps_its_labels(tmp_path: Path, small: Round) -> None:
    with opened(tmp_path / "round", replace(small, groups=small.groups[:2])) as store:
        (ann,) = invited(store, "Ann")
        voted(store, ann)
    with opened(tmp_path / "round", small) as store:
        assert len(effective_votes(store)) == 1
        assert progress(store, ann) == Progress(1, 3)


@sqlite_alone
def test_the_tables_are_those_of_version_1(tmp_path: Path, store: LabelStore) -> None:
    """Labels that exist already must stay readable: other tables need another VERSION.

    `notes` came later, and is made in labels that lack it.
    """
    query = "select sql from sqlite_master where sql is not null and tbl_name != 'notes' "
    query += "order by name"
    tables = "\n".join(made for (made,) in executed(tmp_path / "round", query))
    assert hashlib.sha256(tables.encode()).hexdigest()[:16] == "666026a5ead9df09"


def test_a_newer_version_is_refused(tmp_path: Path, small: Round) -> None:
    opened(tmp_path / "round", small).close()
    executed(tmp_path / "round", "update facts set value = '2' where name = 'version'")
    with pytest.raises(UserError, match=r"have version 2, and this program reads version 1"):
        opened(tmp_path / "round", small)


def test_a_bad_url_is_one_line(small: Round) -> None:
    for url in ("nonsense", "sqlite:////no/such/folder/x.sqlite", "oracle9://x"):
        with pytest.raises(UserError, match=r"Cannot use .* as a database: ") as problem:
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
