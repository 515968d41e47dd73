"""The labelling page, as a rater uses it and as somebody hostile does."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
import uvicorn
from fastapi.testclient import TestClient
from httpx2 import Response
from itsdangerous import URLSafeTimedSerializer

from d3po_bench.cli import main
from d3po_bench.errors import UserError
from d3po_bench.feedback.handout import find_hand
from d3po_bench.feedback.invitations import (
    disable,
    find_rater,
    invite,
    invite_as,
    raters,
)
from d3po_bench.feedback.page import connections, server, words
from d3po_bench.feedback.page.connections import Connection
from d3po_bench.feedback.page.sessions import Limiter, Limits, Sessions, session_key
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.store import VOTES, HandoutSettings, LabelStore, MovedError, default_url
from d3po_bench.feedback.votes import cast_vote, effective_votes
from tests import feedback_load
from tests.feedback_round import new_round, picture

KEY = b"k" * 32
PLAIN = HandoutSettings(votes_per_item=2, gold_every=0, repeat_every=0)
FORM = "application/x-www-form-urlencoded"
COOKIE = Sessions(KEY).cookie


@dataclass
class Site:
    """A round being served."""

    folder: Path
    round: Round
    store: LabelStore
    limits: Limits = field(default_factory=Limits)

    def browser(self, token: str | None = None) -> TestClient:
        """Somebody's browser, signed in with `token`."""
        pages = server.app(self.round, self.folder, self.store, KEY, self.limits)
        client = TestClient(pages, follow_redirects=False)  # which also raises what would be a 500
        if token:
            assert client.post("/join", data={"token": token}).status_code == 303
        return client

    def rater(self, name: str = "Ann") -> TestClient:
        return self.browser(invite(self.store, name))

    def votes(self) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.folder / "labels.sqlite") as connection:
            rows = connection.execute("select rater, hand, kind, answer from votes").fetchall()
        connection.close()
        return rows


def site(folder: Path, kind: Any = "tags", **options: Any) -> Iterator[Site]:
    round_ = new_round(folder, kind, options.pop("number", 4), size=4, **options)
    with LabelStore(default_url(folder), round_, PLAIN) as store:
        yield Site(folder, round_, store)


@pytest.fixture
def tags(tmp_path: Path) -> Iterator[Site]:
    yield from site(tmp_path / "round")


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Site]:
    yield from site(tmp_path / "round", "pairs")


def fields(client: TestClient) -> dict[str, str]:
    """The hidden fields of the page's answer."""
    page = client.get("/").text
    return {**hidden(page, 'id="vote"'), "milliseconds": "1200"}


def hidden(page: str, form: str) -> dict[str, str]:
    """The hidden fields of the form that begins with `form`."""
    answer = page.partition(form)[2].partition("</form>")[0]
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', answer))


def undo(client: TestClient) -> dict[str, str]:
    """What the page's Undo would send."""
    return hidden(client.get("/").text, 'action="/undo"')


def refused(response: Response, status: int) -> None:
    assert response.status_code == status
    assert "Nothing was changed." in response.text


# ---- as a rater


def test_without_a_session_there_is_only_the_way_in(tags: Site) -> None:
    client = tags.browser()
    assert client.get("/").headers["location"] == "/join"
    assert 'name="token"' in client.get("/join").text
    for path in ("/admin", "/image/1/0"):
        refused(client.get(path), 401)


def test_an_invitation_opens_a_session_in_a_guarded_cookie(tags: Site) -> None:
    token = invite(tags.store, "Ann")
    response = tags.browser().post("/join", data={"token": f" {token}\n"})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= set(cookie.split("; "))
    assert token not in cookie
    assert "Secure" not in cookie
    pages = server.app(tags.round, tags.folder, tags.store, KEY)
    safe = TestClient(pages, base_url="https://testserver", follow_redirects=False)
    assert "Secure" in safe.post("/join", data={"token": token}).headers["set-cookie"]


def test_tags_are_stored_in_the_items_own_order(tags: Site) -> None:
    ann = tags.rater()
    page = ann.get("/").text
    assert page.count('<img src="/image/') == 7
    assert "Tag every deformed picture" in page
    assert "prompt number" in page
    for key in ("1", "7", "Enter", "s", "u"):
        assert f'data-keys="{key}"' in page
    form = fields(ann)
    hand = find_hand(tags.store, 1, int(form["hand"]))
    response = ann.post("/vote", data={**form, "tag": ["0", "6"]})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    (vote,) = effective_votes(tags.store)
    assert vote.answer == tuple(sorted((hand.shown[0], hand.shown[6])))
    assert (vote.rater, vote.item, vote.milliseconds) == ("Ann", hand.item.id, 1200)
    assert "1 done" in ann.get("/").text


def test_pictures_are_served_by_their_place(tags: Site) -> None:
    ann = tags.rater()
    hand = find_hand(tags.store, 1, int(fields(ann)["hand"]))
    for place in (0, 6):
        response = ann.get(f"/image/{hand.id}/{place}")
        path = tags.folder / hand.item.images[hand.shown[place]]
        assert response.content == path.read_bytes()
        assert response.headers["content-type"] == "image/png"


@pytest.mark.parametrize("place", [0, 1])
def test_a_choice_is_of_the_picture_whatever_the_side(pairs: Site, place: int) -> None:
    ann = pairs.rater()
    sides = set()
    for _ in range(4):
        form = fields(ann)
        hand = find_hand(pairs.store, 1, int(form["hand"]))
        ann.post("/vote", data={**form, "answer": str(place)})
        vote = effective_votes(pairs.store)[-1]
        assert vote.shown == hand.shown
        assert vote.answer == "ab"[hand.shown[place]]
        sides.add(vote.answer)
    assert sides == {"a", "b"}  # the seed's draw: neither side is always the same
    assert "Thank you, Ann" in ann.get("/").text


def test_tie_both_bad_skip_and_undo(pairs: Site) -> None:
    ann = pairs.rater()
    for answer in ("tie", "bad"):
        ann.post("/vote", data={**fields(ann), "answer": answer})
    ann.post("/skip", data=fields(ann))
    assert [vote.answer for vote in effective_votes(pairs.store)] == ["tie", "bad"]
    for _ in range(2):
        assert ann.post("/undo", data=undo(ann)).status_code == 303
    assert [vote.answer for vote in effective_votes(pairs.store)] == ["tie"]
    assert [kind for _, _, kind, _ in pairs.votes()] == ["vote", "vote", "skip", "undo", "undo"]


def test_the_page_does_not_tell_which_picture_is_which(pairs: Site) -> None:
    page = pairs.rater().get("/").text
    assert re.findall(r'alt="([^"]*)"', page) == ["Picture 1", "Picture 2"]
    assert ".png" not in page
    assert "0000" not in page


def test_unsafe_pictures_are_blurred_until_asked(tmp_path: Path) -> None:
    for made in site(tmp_path / "round", blurred=True, question="unsafe"):
        page = made.rater().get("/").text
        assert 'class="tags veiled"' in page
        assert 'data-keys="v"' in page
    for made in site(tmp_path / "plain"):
        assert "veiled" not in made.rater().get("/").text


def test_every_kind_and_question_has_its_words(tmp_path: Path) -> None:
    for n, (name, text) in enumerate(words.ALL["en"].asked.items()):
        kind, question = name.split(".")
        for made in site(tmp_path / str(n), kind, question=question, number=1):
            assert text in made.rater().get("/").text


def test_signing_out_ends_the_session_for_whoever_has_its_cookie(tags: Site) -> None:
    ann = tags.rater()
    form, copy = fields(ann), tags.browser()
    copy.cookies.set(COOKIE, ann.cookies[COOKIE])
    assert copy.get("/").status_code == 200
    response = ann.post("/leave", data=form)
    assert response.headers["location"] == "/join"
    for client in (ann, copy):
        assert client.get("/").headers["location"] == "/join"
        refused(client.post("/vote", data=form), 401)
    assert tags.votes() == []


def test_a_new_invitation_or_a_block_ends_a_session(tags: Site) -> None:
    ann, bob = tags.rater("Ann"), tags.rater("Bob")
    form = fields(ann)
    invite(tags.store, "Ann")
    refused(ann.get("/"), 401)
    refused(ann.post("/vote", data=form), 401)
    form = fields(bob)
    disable(tags.store, "Bob")
    refused(bob.post("/vote", data=form), 401)
    assert tags.votes() == []


# ---- hostile


def test_a_prompt_is_text_whatever_is_in_it(tmp_path: Path) -> None:
    script = '<script>alert({})</script>"><img src=x onerror=alert(1)>'
    for made in site(tmp_path / "round", prompt=script):
        page = made.rater('<b onclick="x">Eve</b>').get("/").text
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert" in page
        assert "<b onclick" not in page
        assert page.count("<img ") == 7
        admin = made.browser(invite_as(made.store)).get("/admin").text
        assert "&lt;b onclick=" in admin
        assert "<b onclick" not in admin


def test_every_answer_carries_the_headers_and_no_page_has_inline_script(tags: Site) -> None:
    ann, admin = tags.rater(), tags.browser(invite_as(tags.store))
    answers = [
        ann.get("/"), ann.get("/join"), ann.get("/nothing"), ann.get("/static/page.js"),
        ann.get("/image/1/0"), ann.post("/vote"), admin.get("/admin"), ann.put("/vote"),
    ]  # fmt: skip
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["x-frame-options"] == "DENY"
        assert not re.search(r"<script(?! src=)| on\w+=| style=|https?://", answer.text)
    stored = [answer.headers["cache-control"] for answer in answers]
    assert stored == [
        *["no-store"] * 3, "no-cache", "private, max-age=600", *["no-store"] * 3
    ]  # fmt: skip


def test_a_vote_without_a_session_is_refused(tags: Site) -> None:
    form = fields(tags.rater())
    refused(tags.browser().post("/vote", data=form), 401)
    assert tags.votes() == []


def test_a_vote_with_anothers_session_is_refused(tags: Site) -> None:
    ann, bob = tags.rater("Ann"), tags.rater("Bob")
    anns, bobs = fields(ann), fields(bob)
    refused(bob.post("/vote", data=anns), 403)  # Ann's form
    refused(bob.post("/vote", data={**bobs, "hand": anns["hand"]}), 403)  # Ann's hand
    refused(bob.post("/skip", data={**bobs, "hand": anns["hand"]}), 403)
    refused(bob.get(f"/image/{anns['hand']}/0"), 403)
    assert tags.votes() == []


def test_a_forged_cookie_is_no_session(tags: Site) -> None:
    """Signed by somebody else, signed by us but of another shape, or nonsense."""
    form = fields(tags.rater())
    like_ours = {"role": "rater", "rater": 1, "mark": "", "nonce": "n"}
    payloads: tuple[Any, ...] = ([], {"role": "rater"}, "x", None)
    signed = [(key, like_ours) for key in (b"k" * 31, b"x" * 32, b"")]
    signed += [(KEY, payload) for payload in payloads]
    cookies = [str(URLSafeTimedSerializer(k, salt="session").dumps(p)) for k, p in signed]
    for cookie in [*cookies, "", "x", "a.b.c", "." * 5000, "eyJ9.x.y"]:
        eve = tags.browser()
        eve.cookies.set(COOKIE, cookie)
        assert eve.get("/").headers["location"] == "/join"
        refused(eve.post("/vote", data=form), 401)
    assert tags.votes() == []


def test_a_session_of_another_invitation_is_refused(tags: Site) -> None:
    form = fields(tags.rater())
    eve = tags.browser()
    eve.cookies.set(COOKIE, Sessions(KEY).begin("rater", 1, "another hash"))
    refused(eve.post("/vote", data=form), 401)


def test_a_forged_csrf_token_is_refused(tags: Site) -> None:
    ann = tags.rater()
    ann.post("/vote", data=fields(ann))
    before = tags.votes()
    for path in ("/vote", "/skip", "/undo", "/leave"):
        for csrf in ("", "x", "0" * 64, "é"):
            refused(ann.post(path, data={**fields(ann), "csrf": csrf}), 403)
    assert tags.votes() == before


def test_the_csrf_token_of_another_session_of_the_same_rater_is_refused(tags: Site) -> None:
    token = invite(tags.store, "Ann")
    one, two = tags.browser(token), tags.browser(token)
    refused(one.post("/vote", data={**fields(one), "csrf": fields(two)["csrf"]}), 403)
    assert tags.votes() == []


def test_what_another_site_sends_is_refused(tags: Site) -> None:
    ann, token = tags.rater(), invite(tags.store, "Bob")
    foreign = [
        {"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
        {"origin": "http://testserver.evil.example"}, {"origin": "http://[x"},
        {"origin": "https://testserver"}, {"origin": "http://testserver:8000"},
    ]  # fmt: skip
    for headers in foreign:
        refused(ann.post("/vote", data=fields(ann), headers=headers), 403)
        refused(tags.browser().post("/join", data={"token": token}, headers=headers), 403)
    assert tags.votes() == []
    same = {"origin": "http://testserver", "sec-fetch-site": "same-origin"}
    assert ann.post("/vote", data=fields(ann), headers=same).status_code == 303


def test_no_path_leads_elsewhere(tags: Site) -> None:
    ann = tags.rater()
    assert fields(ann)["hand"] == "1"
    paths = [
        "/image/1/../../round.json", "/image/1/..%2f..%2fround.json", "/image/..%2f..%2f1/0",
        "/image/%2e%2e/%2e%2e/round.json", "/image/1/-1", "/image/1/7", "/image/1/0.png",
        "/image/1/%00", "/image/1/٣", "/image/99999999999999999999999/0", "/image/4294967297/0",
        "/image/0/0", "/image/x/0", "/static/../server.py", "/static/..%2fserver.py",
        "/static/%2e%2e/server.py", "/static/", "/labels.sqlite", "/round.json", "/.session-key",
        "/docs", "/openapi.json",
    ]  # fmt: skip
    for path in paths:
        response = ann.get(path)
        assert 400 <= response.status_code < 500, path
        assert "def " not in response.text
        assert '"items"' not in response.text


def test_a_picture_that_became_a_link_to_elsewhere_is_gone(tags: Site) -> None:
    ann = tags.rater()
    hand = find_hand(tags.store, 1, int(fields(ann)["hand"]))
    (tags.folder.parent / "secret.png").write_bytes(picture(5))
    path = tags.folder / hand.item.images[hand.shown[0]]
    path.unlink()
    refused(ann.get(f"/image/{hand.id}/0"), 503)
    path.symlink_to(tags.folder.parent / "secret.png")
    refused(ann.get(f"/image/{hand.id}/0"), 503)


def test_pictures_that_were_exchanged_get_no_votes_until_they_are_back(tags: Site) -> None:
    ann = tags.rater()
    form = fields(ann)
    hand = find_hand(tags.store, 1, int(form["hand"]))
    shown = tags.folder / hand.item.images[hand.shown[0]]
    other = tags.folder / hand.item.images[hand.shown[1]]
    whole, facts = shown.read_bytes(), shown.stat()
    shown.write_bytes(other.read_bytes())
    os.utime(shown, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    refused(ann.get(f"/image/{hand.id}/0"), 503)
    refused(ann.get("/"), 503)
    refused(ann.post("/vote", data=form), 503)
    assert tags.votes() == []
    shown.write_bytes(whole)
    assert ann.get(f"/image/{hand.id}/0").content == whole
    assert ann.post("/vote", data=form).status_code == 303


def test_no_answer_names_the_host_that_a_request_claims(tags: Site) -> None:
    ann = tags.rater()
    for path in ("/join/", "/vote/", "/admin/", "/static/page.css/"):
        refused(ann.get(path, headers={"host": "evil.example"}), 404)
    left = ann.post("/leave", data=fields(ann))
    assert left.headers["location"] == "/join"


def test_each_round_of_a_host_has_a_cookie_of_its_own(tags: Site) -> None:
    """Browsers send a cookie to every port."""
    one, two = Sessions(KEY), Sessions(b"x" * 32)
    assert one.cookie != two.cookie
    assert one.cookie == Sessions(KEY).cookie
    assert not set(one.cookie) - set("d3po_feedback_0123456789abcdef")


def test_a_hand_that_was_not_given_is_refused(tags: Site) -> None:
    ann = tags.rater()
    form = fields(ann)
    for hand in ("2", "0", "2147483647", "9" * 30, "-1", "1.0", "", "x", "١"):
        response = ann.post("/vote", data={**form, "hand": hand})
        assert response.status_code in (400, 403)
    assert tags.votes() == []


def test_the_same_vote_twice_is_stored_once(tags: Site) -> None:
    ann = tags.rater()
    form = fields(ann)
    assert ann.post("/vote", data=form).status_code == 303
    for path in ("/vote", "/skip"):
        refused(ann.post(path, data=form), 409)
    assert ann.post("/undo", data=undo(ann)).status_code == 303
    refused(ann.post("/vote", data=form), 409)  # from before the undo
    refused(ann.post("/undo", data=undo(ann)), 409)  # nothing is left
    assert [kind for _, _, kind, _ in tags.votes()] == ["vote", "undo"]


def test_the_same_undo_twice_takes_one_vote_back(tags: Site) -> None:
    """Its reply may be lost on the way, and the page sends it again."""
    ann = tags.rater()
    for _ in range(2):
        ann.post("/vote", data=fields(ann))
    form = undo(ann)
    assert ann.post("/undo", data=form).status_code == 303
    refused(ann.post("/undo", data=form), 409)
    refused(ann.post("/undo", data={"csrf": form["csrf"]}), 400)
    assert [kind for _, _, kind, _ in tags.votes()] == ["vote", "vote", "undo"]


def test_malformed_fields_are_refused(tags: Site) -> None:
    ann = tags.rater()
    changes: list[dict[str, Any]] = [
        {"tag": "7"}, {"tag": "-1"}, {"tag": "x"}, {"tag": ["0", "99"]}, {"milliseconds": "-1"},
        {"milliseconds": "99999999999"}, {"milliseconds": "1e3"}, {"step": "x"},
        {"step": ["0", "0"]}, {"hand": ["1", "1"]}, {"csrf": ["a", "b"]},
    ]  # fmt: skip
    for change in changes:
        refused(ann.post("/vote", data={**fields(ann), **change}), 400)
    assert tags.votes() == []


def test_malformed_choices_are_refused(pairs: Site) -> None:
    ann = pairs.rater()
    answers: list[Any] = ["2", "a", "", "left", "-1", ["0", "1"]]
    for answer in answers:
        refused(ann.post("/vote", data={**fields(ann), "answer": answer}), 400)
    refused(ann.post("/vote", data=fields(ann)), 400)
    assert pairs.votes() == []


def test_bodies_that_are_not_small_forms_are_refused(tags: Site) -> None:
    ann = tags.rater()
    bodies = [
        (b"x" * 20_000, FORM, 413),
        (b"csrf=" + b"x" * 5_000_000, FORM, 413),
        (b"a=1&" * 100, FORM, 400),
        (b"csrf=%ff%fe", FORM, 400),
        (b"\xff\xfe", FORM, 400),
        (b"", FORM, 400),
        (b"{}", "application/json", 415),
        (b"--b\r\n\r\n--b--", "multipart/form-data; boundary=b", 415),
        (b"x", "", 415),
    ]
    for body, kind, status in bodies:
        for path in ("/vote", "/join", "/undo"):
            refused(ann.post(path, content=body, headers={"content-type": kind}), status)
    assert tags.votes() == []


def test_a_body_without_a_length_is_cut_off_too(tags: Site) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    refused(tags.rater().post("/vote", content=endless(), headers={"content-type": FORM}), 413)


def test_wrong_sign_ins_are_refused_and_soon_not_even_looked_at(tags: Site) -> None:
    token, eve = invite(tags.store, "Ann"), tags.browser()
    statuses = [
        eve.post("/join", data={"token": f"{token[:-1]}-{n}"}).status_code for n in range(60)
    ]
    assert statuses[:20] == [403] * 20
    assert set(statuses[20:]) <= {403, 429}
    assert statuses.count(403) < 40
    assert COOKIE not in eve.cookies
    assert tags.votes() == []


def test_after_many_wrong_tries_an_address_waits_but_valid_links_work(tags: Site) -> None:
    """Raters of one office share an address, perhaps with whoever tries tokens."""
    tags.limits = replace(tags.limits, sign_ins=(1, 0.001))
    client, token = tags.browser(), invite(tags.store, "Ann")
    statuses = [client.post("/join", data={"token": t}).status_code for t in ("x", "x", token)]
    assert statuses == [403, 429, 303]


def test_right_sign_ins_do_not_count_as_wrong(tags: Site) -> None:
    tags.limits = replace(tags.limits, sign_ins=(1, 0.001))
    client, token = tags.browser(), invite(tags.store, "Ann")
    for _ in range(5):
        assert client.post("/join", data={"token": token}).status_code == 303


def test_odd_tokens_are_refused(tags: Site) -> None:
    for token in ("", "x" * 10_000, "\0", "é", "' or 1=1 --"):
        refused(tags.browser().post("/join", data={"token": token}), 403)


def test_voting_too_fast_is_slowed_down(tags: Site) -> None:
    tags.limits = Limits(votes=(2, 0.001), pages=(1000, 1.0))
    ann = tags.rater()
    for _ in range(2):
        assert ann.post("/vote", data=fields(ann)).status_code == 303
    response = ann.post("/vote", data=fields(ann))
    refused(response, 429)
    assert response.headers["retry-after"] == "2"
    assert len(tags.votes()) == 2


def test_asking_for_pages_too_fast_is_slowed_down(tags: Site) -> None:
    tags.limits = Limits(pages=(3, 0.001))
    ann = tags.rater()
    assert [ann.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]


def test_a_limiter_refills_and_forgets() -> None:
    now = 0.0
    limiter = Limiter(3, 2.0, clock=lambda: now)
    assert [limiter.allow("a") for _ in range(4)] == [True, True, True, False]
    assert limiter.allow("b")
    now = 0.5
    assert [limiter.allow("a") for _ in range(2)] == [True, False]
    now = 100.0
    for n in range(10_001):
        limiter.allow(str(n))
    now = 200.0
    limiter.allow("last")
    assert len(limiter._buckets) == 1  # or hostile keys would fill the memory


def test_a_database_that_fails_is_said_in_words(
    tags: Site, caplog: pytest.LogCaptureFixture
) -> None:
    ann = tags.rater()
    form = fields(ann)
    with tags.store.writing() as connection:
        connection.exec_driver_sql("create trigger full before insert on votes "
                                   "begin select raise(abort, 'disk is full'); end")  # fmt: skip
    for _ in range(2):
        response = ann.post("/vote", data=form)
        refused(response, 503)
        assert "could not be saved" in response.text
    assert [record.message for record in caplog.records] == ["disk is full"]  # once, of no rater


@pytest.mark.parametrize("names", [("",), ("-wal",), ("", "-wal", "-shm")])
def test_votes_into_a_file_that_was_removed_are_not_acknowledged(
    tags: Site, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    ann, admin = tags.rater(), tags.browser(invite_as(tags.store))
    form = fields(ann)
    kept = [(tags.folder / f"labels.sqlite{name}", f"kept{name}") for name in names]
    for path, name in kept:
        path.rename(tags.folder / name)
    for _ in range(2):
        refused(ann.post("/vote", data=form), 503)
        refused(ann.get("/"), 503)
        refused(admin.get("/admin"), 503)
    assert [record.message for record in caplog.records] == 2 * [  # of each browser's server
        f"{tags.folder}/labels.sqlite was moved or removed while it was in use. Put that file back "
        "with its -wal, or restore a copy and start again"
    ]
    assert not [path for path, _ in kept if path.exists()]
    for path, name in kept:
        (tags.folder / name).rename(path)
    assert ann.post("/vote", data=form).status_code == 303
    assert len(tags.votes()) == 1


def test_a_vote_whose_file_goes_while_it_is_written_is_not_acknowledged(tags: Site) -> None:
    ann, rater = tags.rater(), find_rater(tags.store, id_=1)
    hand = find_hand(tags.store, 1, int(fields(ann)["hand"]))
    assert rater

    def removing() -> None:
        with tags.store.writing() as connection:
            connection.exec_driver_sql("update facts set value = value")
            (tags.folder / "labels.sqlite").unlink()

    with pytest.raises(MovedError):
        removing()
    with pytest.raises(MovedError):
        cast_vote(tags.store, 1, hand.id, (0,), 1, 0)


# ---- the admin


def test_the_admin_sees_rate_agreement_and_quality(tmp_path: Path) -> None:
    for made in site(tmp_path / "round", number=3, gold={0: (0,)}):
        ann, bob = made.rater("Ann"), made.rater("Bob")
        for client in (ann, bob):
            client.post("/vote", data={**fields(client), "tag": "0"})
        invite(made.store, "Cyd")
        page = made.browser(invite_as(made.store)).get("/admin").text
        assert "of 2, 2 votes each" in page
        assert 'scope="row">Cyd' in page
        assert re.search(r"<dt>Votes</dt><dd>2 <small>by 2 raters", page)
        assert re.search(r"<dt>Last hour</dt><dd>2 ", page)
        assert "<td>1</td><td>1.2</td>" in page


def test_only_the_admin_sees_the_overview(tags: Site) -> None:
    ann, admin = tags.rater(), tags.browser(invite_as(tags.store))
    refused(ann.get("/admin"), 403)
    refused(ann.post("/admin/rater", data={**fields(ann), "name": "Ann", "disabled": "yes"}), 403)
    assert admin.get("/").headers["location"] == "/admin"
    refused(admin.post("/vote", data={"csrf": "x"}), 401)
    invite_as(tags.store)
    refused(admin.get("/admin"), 403)


def test_the_admin_blocks_a_rater_and_lets_them_in(tags: Site) -> None:
    ann, admin = tags.rater(), tags.browser(invite_as(tags.store))
    found = re.search(r'name="csrf" value="(\w+)"', admin.get("/admin").text)
    assert found
    form = {"csrf": found[1], "name": "Ann", "disabled": "yes"}
    refused(admin.post("/admin/rater", data={**form, "csrf": "x"}), 403)
    assert ann.get("/").status_code == 200
    assert admin.post("/admin/rater", data=form).status_code == 303
    refused(ann.get("/"), 401)
    assert ">blocked<" in admin.get("/admin").text
    admin.post("/admin/rater", data={**form, "disabled": "no"})
    assert ann.get("/").status_code == 200
    refused(admin.post("/admin/rater", data={**form, "name": "Eve"}), 404)


# ---- serving


def test_links_are_shown_once(tags: Site) -> None:
    url = "http://127.0.0.1:8000"
    first = list(server.invitations(tags.store, ["Ann", "Bob", "Ann"], url))
    assert [line.split(":")[0] for line in first[1:]] == ["Ann", "Bob", "admin"]
    for line in first[1:]:
        assert tags.browser(line.partition("#")[2]).get("/").status_code in (200, 303)
    again = list(server.invitations(tags.store, ["Ann", "Cyd"], url))
    assert again[1] == "Ann: invited before; --renew makes a new link"
    assert again[2].startswith(f"Cyd: {url}/join#")
    assert again[3].startswith("admin: invited before")
    renewed = list(server.invitations(tags.store, ["Ann"], url, renew=True))
    assert find_rater(tags.store, token=first[1].partition("#")[2]) is None
    assert find_rater(tags.store, token=renewed[1].partition("#")[2]) is not None


def test_the_signing_key_is_its_owners_and_stays(tmp_path: Path) -> None:
    key = session_key(tmp_path)
    path = tmp_path / ".session-key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(key) == 32
    assert session_key(tmp_path) == key
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="not a key of 32"):
        session_key(tmp_path)
    with pytest.raises(UserError, match="Cannot read or write"):
        session_key(tmp_path / "none")


def test_a_port_that_is_taken_is_one_line(tags: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Cannot listen on 127.0.0.1:{port}: "):
            server.serve(tags.folder, port=port)


def test_a_folder_without_a_round_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no round\.json in"):
        server.serve(tmp_path)
    assert list(tmp_path.iterdir()) == []


PUBLIC = "https://labels.example"


def test_behind_a_proxy_a_rater_signs_in_and_votes(tags: Site) -> None:
    """The proxy's default: another Host, and the browser's own Origin."""
    pages = server.app(tags.round, tags.folder, tags.store, KEY, public_url=PUBLIC)
    client = TestClient(pages, base_url="http://127.0.0.1:8000", follow_redirects=False)
    token, own = invite(tags.store, "Ann"), {"origin": PUBLIC, "sec-fetch-site": "same-origin"}
    joined = client.post("/join", data={"token": token}, headers=own)
    assert joined.status_code == 303
    assert "Secure" in joined.headers["set-cookie"]
    client.headers["cookie"] = joined.headers["set-cookie"].split(";")[0]
    form = fields(client)
    for origin in (
        "https://evil.example", "http://", "https://labels.example.evil.example",
        "http://labels.example", "http://127.0.0.1:8000", "https://labels.example:8000",
    ):  # fmt: skip
        refused(client.post("/vote", data=form, headers={"origin": origin}), 403)
    assert client.post("/vote", data=form, headers=own).status_code == 303
    assert len(tags.votes()) == 1
    assert client.get("/join").headers["strict-transport-security"] == "max-age=31536000"
    assert "strict-transport-security" not in tags.browser().get("/join").headers


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[int]:
    """The command in a process of its own; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "d3po_bench", "feedback", "serve", str(folder)]
    command += ["--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith("Serving on ")
            yield port
        finally:
            process.terminate()


def test_an_interrupted_server_says_that_votes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    new_round(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["feedback", "serve", str(tmp_path), "--port", "0"])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error == "error: Interrupted. Votes are kept, and the same command serves on.\n"


@contextlib.contextmanager
def listening(tags: Site) -> Iterator[int]:
    """The pages behind real connections, in this process; their port."""
    pages = server.app(tags.round, tags.folder, tags.store, KEY)
    running = uvicorn.Server(server.configured(pages, proxied=False))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


def ended(connection: socket.socket) -> bool:
    """Whether the server closes it."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


HALVES = (
    b"POST /join HTTP/1.1\r\nHost: x\r\n",
    b"POST /join HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    b"Content-Length: 100\r\n\r\ntoken=",
)


def test_half_sent_requests_keep_nobody_out(
    tags: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Connection, "most", 20)
    with listening(tags) as port, contextlib.ExitStack() as stack:
        opened = []
        for n in range(60):
            half = socket.create_connection(("127.0.0.1", port), timeout=10)
            opened.append(stack.enter_context(half))
            half.sendall(HALVES[n % 2])
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(asked):
            asked.request("GET", "/join")
            assert asked.getresponse().status == 200
        assert ended(opened[0])  # it made room
        assert len(Connection.waiting) <= 20
    assert caplog.records == []
    assert Connection.waiting == {}


def test_a_request_that_does_not_come_whole_is_cut_off_in_time(
    tags: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SECONDS", 0.2)
    with listening(tags) as port:
        for half in HALVES:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sent:
                sent.sendall(half)
                assert ended(sent)
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(asked):  # an answered one waits for the next request as before
            for _ in range(2):
                asked.request("GET", "/static/page.css")
                assert asked.getresponse().read()
                time.sleep(0.4)


@pytest.mark.parametrize("files", [64, 256, 1024, 10**6])
def test_connections_leave_room_for_other_files(
    files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    most, queue = connections.limits()
    assert 0 < most + queue <= files * 5 // 8


@pytest.mark.parametrize("public", [True, False])
def test_only_a_proxy_may_say_who_asks(tags: Site, public: bool) -> None:
    """Wrong tries count for each address; whose it is, is a proxy's word or none's."""
    with serving(tags.folder, *(["--public-url", PUBLIC] if public else [])) as port:

        def tried(address: str) -> int:
            headers = {"x-forwarded-for": address, "content-type": FORM}
            for _ in range(100):  # the port is open before pages are
                try:
                    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                    with contextlib.closing(asked) as connection:
                        connection.request("POST", "/join", "token=wrong", headers)
                        return connection.getresponse().status
                except ConnectionError:
                    time.sleep(0.05)
            raise TimeoutError("no answer")

        assert 429 in [tried("203.0.113.1") for _ in range(40)]
        assert tried("203.0.113.2") == (403 if public else 429)


def test_a_public_url_that_is_not_an_origin_is_refused(tags: Site) -> None:
    urls = [
        "", "labels.example", "ftp://labels.example", "https://", "https://a//page", "https://a/../b",
        "https://a/b c", "https://a/?x",
        "https://a/#x", "https://a:999999", "https://[a", "https://a?", "https://a#",
        "https://me@a", "https://a b", "https://a\n", " https://a", "https://b\u00fccher.example",
        "https://a:",
    ]  # fmt: skip
    for url in urls:
        with pytest.raises(UserError, match="not a public URL such as https://labels"):
            server.serve(tags.folder, public_url=url)


def test_a_public_url_becomes_what_browsers_send() -> None:
    assert server.place_of("https://Labels.Example/") == (PUBLIC, "")
    assert server.place_of("https://labels.example:443") == (PUBLIC, "")
    assert server.place_of("http://labels.example:80") == ("http://labels.example", "")
    assert server.place_of("https://labels.example:8443") == ("https://labels.example:8443", "")
    assert server.place_of("http://[::1]:80") == ("http://[::1]", "")
    assert server.place_of("https://Lab.example/A/b/") == ("https://lab.example", "/A/b")


def test_nothing_is_served_to_a_rater_without_a_name(tags: Site) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match="cannot be a rater's name"):
        server.serve(tags.folder, port=0, names=["Ann", ""], echo=said.append)
    assert said == []
    assert raters(tags.store) == []


@pytest.mark.slow
def test_acknowledged_votes_survive_kill_9(tmp_path: Path) -> None:
    # the real server, twice killed while three raters vote; `python -m tests.feedback_load`
    # is the same at full size
    outcome = feedback_load.run(tmp_path / "round", 3, 8, 2, kind="study", think=0.2, every=0.7)
    assert (outcome.acknowledged, outcome.stored) == (24, 24)
    assert (outcome.lost, outcome.doubled, outcome.seen_twice) == (0, 0, 0)


@pytest.mark.parametrize("seconds", [float("inf"), -1e300, 1e300])
def test_a_vote_at_no_time_is_said_in_words(tags: Site, seconds: float) -> None:
    client = tags.rater()
    client.post("/vote", data=fields(client))
    with tags.store.writing() as connection:
        connection.execute(sql.update(VOTES).values(time=seconds))
    refused(tags.browser(invite_as(tags.store)).get("/admin"), 503)


def test_a_rater_is_invited_under_one_name(tags: Site) -> None:
    lines = list(
        server.invitations(tags.store, ["Zo\u00e9", "Zoe\u0301", " Zo\u00e9 "], "http://x")
    )
    assert [line.partition(":")[0] for line in lines[1:]] == ["Zo\u00e9", "admin"]
    with pytest.raises(UserError, match="'simulated 1' is a name of simulated raters"):
        list(server.invitations(tags.store, ["simulated 1"], "http://x"))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:a?uri=true"])
def test_votes_are_not_taken_into_what_does_not_last(url: str, tags: Site) -> None:
    with pytest.raises(UserError, match="would not last"):
        server.serve(tags.folder, url, port=0)
