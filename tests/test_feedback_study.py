"""A study: what surrounds its items, who comes to it, what is asked, and what becomes of it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from d3po_bench.errors import UserError
from d3po_bench.experience import dataset
from d3po_bench.feedback import agreement, comparisons, votes
from d3po_bench.feedback.handout import Hand, hand_out
from d3po_bench.feedback.invitations import find_rater, invite, invite_as, raters
from d3po_bench.feedback.page import server, words
from d3po_bench.feedback.questions import Answer
from d3po_bench.feedback.report import report
from d3po_bench.feedback.rounds import Progress, Round
from d3po_bench.feedback.schema import read_study
from d3po_bench.feedback.store import HandoutSettings, LabelStore, default_url
from d3po_bench.feedback.study import one_question
from tests.feedback_round import new_source, new_study

KEY = b"k" * 32


class Site:
    """The study of docs/studies.md, being served to clients of this process."""

    def __init__(self, folder: Path, votes_per_item: int = 1, **changes: str) -> None:
        file = new_study(folder, **changes)
        sources = [new_source(folder / str(n), 3, first=3 * n, size=4) for n in range(2)]
        self.round = comparisons.take(folder / "round", sources, read_study(file), folder)
        self.folder = folder / "round"
        settings = HandoutSettings(votes_per_item, gold_every=3, repeat_every=0)
        self.store = LabelStore(default_url(self.folder), self.round, settings)
        self.platform = invite_as(self.store, "platform")
        self.pages = server.app(self.round, self.folder, self.store, KEY)

    def client(self, **headers: str) -> TestClient:
        return TestClient(self.pages, follow_redirects=False, headers=headers)

    def rater(self, name: str = "Ann") -> TestClient:
        """Somebody invited by name, who has agreed and read the instructions."""
        client = self.client()
        client.post("/join", data={"token": invite(self.store, name)})
        return begun(client)

    def participant(self, name: str) -> TestClient:
        """Somebody from a platform, as far."""
        client = self.client()
        assert self.enter(client, name).status_code == 303
        return begun(client)

    def enter(self, client: TestClient, name: str, token: str | None = None) -> Response:
        at = f"/start/{token or self.platform}"
        return client.post(at, data={"participant": name})

    def held(self, name: str) -> Hand | None:
        (rater,) = (rater for rater in raters(self.store) if rater.name == name)
        return hand_out(self.store, rater.id)

    def work(self, client: TestClient, name: str, most: int = 100, **how: Any) -> int:
        """Answer what comes, the known items right; returns the number of answers."""
        for n in range(most):
            hand = self.held(name)
            if hand is None:
                return n
            form = {**hidden(client.get("/").text, 'id="vote"'), **answer(hand), **how}
            if not self.round.asked(hand.item).comment:
                form.pop("comment", None)
            assert client.post("/vote", data=form).status_code == 303
        return most


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with made.store:
        yield made


def hidden(page: str, form: str) -> dict[str, str]:
    """The hidden fields of the form that begins with `form`."""
    inside = page.partition(form)[2].partition("</form>")[0]
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', inside))


def begun(client: TestClient) -> TestClient:
    agreed = client.post("/agree", data={**hidden(client.get("/").text, "/agree"), "agree": "yes"})
    assert agreed.status_code == 303
    assert client.post("/begin", data=hidden(client.get("/").text, "/begin")).status_code == 303
    return client


def answer(hand: Hand) -> dict[str, str]:
    """What the page would send: of a known item what is right, else the first or a 4."""
    gold = hand.item.gold
    if hand.item.question == "real":
        return {"answer": str(gold[0] if isinstance(gold, tuple) else 4), "milliseconds": "2000"}
    right = "ab".index(gold) if isinstance(gold, str) else 0
    return {"answer": str(hand.shown.index(right)), "milliseconds": "2000"}


# ---- the way in


def test_consent_and_instructions_come_before_the_first_item_and_once(site: Site) -> None:
    client = site.client()
    client.post("/join", data={"token": invite(site.store, "Ann")})
    consent = client.get("/").text
    assert "Taking part is voluntary" in consent
    assert 'name="hand"' not in consent
    assert "There is no such page" not in client.get("/instructions").text  # to read is free
    agreed = {**hidden(consent, "/agree"), "agree": "yes"}
    assert client.post("/agree", data={**agreed, "csrf": "x"}).status_code == 403
    assert "/agree" in client.get("/").text
    for _ in range(2):  # its reply may be lost
        assert client.post("/agree", data=agreed).status_code == 303
    instructions = client.get("/").text
    assert "You will see two kinds of pages." in instructions
    assert instructions.count('src="/example/') == 3
    assert client.get("/example/0/1").headers["content-type"] == "image/png"
    for path in ("/example/9/0", "/example/0/9", "/example/0/-1"):
        assert client.get(path).status_code == 400
    client.post("/begin", data=hidden(instructions, "/begin"))
    assert 'name="hand"' in client.get("/").text


def test_who_does_not_agree_is_signed_out_and_nothing_is_kept(site: Site) -> None:
    client = site.client()
    client.post("/join", data={"token": invite(site.store, "Ann")})
    gone = client.post("/agree", data={**hidden(client.get("/").text, "/agree"), "agree": "no"})
    assert "You have not agreed" in gone.text
    assert client.get("/").headers["location"] == "/join"
    assert votes.effective_votes(site.store) == []


def test_practice_tells_what_is_right_and_is_not_exported_as_judged(site: Site) -> None:
    ann = site.rater()
    told = []
    for _ in range(2):
        hand = site.held("Ann")
        assert hand is not None
        assert hand.item.use == "practice"
        wrong = {"better": "tie", "real": "5"}[hand.item.question]
        page = ann.get("/").text
        assert "Practice" in page
        assert "/skip" not in page
        form = {**hidden(page, 'id="vote"'), "answer": wrong}
        moved = ann.post("/vote", data=form).headers["location"]
        assert moved == f"/?told={hand.id}"
        told.append(ann.get(moved).text)
    assert "Not quite." in told[0]
    assert "One of the two is broken." in told[0]
    assert "1 (not at all) / 2" in told[1]
    rows = votes.exported(site.store, votes.effective_votes(site.store))
    assert [(row["use"], row["scores"]) for row in rows] == [("practice", ())] * 2
    other = site.rater("Bob").get("/?told=1").text
    assert "Not quite" not in other  # it is Ann's
    site.work(ann, "Ann", 1)
    done = [v for v in votes.effective_votes(site.store) if not v.item.startswith("practice")]
    assert len(done) == 1
    assert "Not quite" not in ann.get("/?told=3").text  # of an item that counts, nothing is told


# ---- languages


@pytest.mark.parametrize(
    ("asked", "language"),
    [
        ("de-CH,de;q=0.9,en;q=0.8", "de"), ("fr, es;q=0.5, en;q=0.4", "es"), ("zh-Hans-CN", "zh"),
        ("fr", "en"), ("", "en"), ("de;q=0, en", "en"), ("de;q=x,,;;=," * 99, "en"),
    ],
)  # fmt: skip
def test_the_browser_decides_the_language(site: Site, asked: str, language: str) -> None:
    page = site.client(**{"accept-language": asked}).get("/join").text
    assert f'<html lang="{language}"' in page
    assert words.ALL[language].sign_in in page  # type: ignore[index]


def test_a_language_that_was_chosen_stays(site: Site) -> None:
    client = site.client(**{"accept-language": "es"})
    at = f"/start/{site.platform}"
    page = client.get(at, params={"PROLIFIC_PID": "p1", "lang": "de"}).text
    assert "Tierbilder" in page
    assert 'href="?PROLIFIC_PID=p1&amp;lang=zh"' in page  # and the participant stays, too
    assert '<html lang="de"' in client.get("/join").text
    assert '<html lang="es"' in site.client(**{"accept-language": "es"}).get("/join?lang=xx").text


def test_every_language_has_all_words() -> None:
    english = vars(words.ALL["en"])
    for language, own in words.ALL.items():
        assert vars(own).keys() == english.keys(), language
        assert own.asked.keys() == english["asked"].keys()
        for name, text in english.items():
            if isinstance(text, str):
                assert getattr(own, name).count("{}") == text.count("{}"), (language, name)


# ---- platforms


def test_a_participant_gets_the_code_when_everything_is_answered_and_not_before(
    tmp_path: Path,
) -> None:
    made = Site(tmp_path, answers="answers = 5")
    with made.store:
        client = made.participant("5f3c1a")
        for answered in range(7):  # two of practice, five that count
            assert "C0DE42" not in client.get("/").text, answered
            for path in ("/instructions", "/join", f"/start/{made.platform}"):
                assert "C0DE42" not in client.get(path, params={"PROLIFIC_PID": "5f3c1a"}).text
            assert made.work(client, "5f3c1a", 1) == 1
        page = client.get("/").text
        assert "C0DE42" in page
        assert "https://app.prolific.com/submissions/complete?cc=C0DE42" in page
        ann = made.rater("Ann")
        made.work(ann, "Ann")
        assert "C0DE42" not in ann.get("/").text  # she was invited by name
        undone = hidden(page, 'action="/undo"')
        assert client.post("/undo", data=undone).status_code == 303
        assert "C0DE42" not in client.get("/").text


def test_skipping_does_not_lead_to_the_code(site: Site) -> None:
    client = site.participant("p1")
    site.work(client, "p1", 3)
    while (hand := site.held("p1")) is not None:
        form = {**hidden(client.get("/").text, 'id="vote"'), "hand": str(hand.id)}
        assert client.post("/skip", data=form).status_code == 303
    page = client.get("/").text
    assert "A completion code is shown to those who answer every item" in page
    assert "C0DE42" not in page


def test_who_comes_when_all_is_answered_gets_no_code(site: Site) -> None:
    site.work(site.rater("Ann"), "Ann")
    late = site.participant("late")
    site.work(late, "late", 2)  # practice
    while (hand := site.held("late")) is not None and hand.item.use == "gold":
        break
    assert "C0DE42" not in late.get("/").text


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "x" * 61,
        "<b>",
        "é",
        "a\n",
        "../x",
        "a'--",
        "\0",
        "%00",
        "{{%PROLIFIC_PID%}}",
    ],
)
def test_odd_participant_ids_are_refused(site: Site, name: str) -> None:
    client = site.client()
    arrived = client.get(f"/start/{site.platform}", params={"PROLIFIC_PID": name})
    assert arrived.status_code == site.enter(client, name).status_code == 400
    assert raters(site.store) == []


def test_a_participant_is_nobody_elses(site: Site) -> None:
    invite(site.store, "Ann")
    assert site.enter(site.client(), "Ann").status_code == 403  # who was invited by name
    first = site.client()
    site.enter(first, "p1")
    again = site.client()  # nothing was handed out yet: the first reply may have been lost
    assert site.enter(again, "p1").status_code == 303
    assert first.get("/").status_code == 401
    begun(again).get("/")
    stranger = site.client()
    assert site.enter(stranger, "p1").status_code == 403
    assert stranger.get("/").headers["location"] == "/join"
    assert again.get(f"/start/{site.platform}", params={"PROLIFIC_PID": "p1"}).status_code == 303
    assert [rater.name for rater in raters(site.store)] == ["Ann", "p1"]


def test_a_platforms_link_is_needed_and_other_sites_forms_are_refused(site: Site) -> None:
    client = site.client()
    assert site.enter(client, "p1", "wrong").status_code == 403
    assert client.get("/start/wrong?PROLIFIC_PID=p1").status_code == 403
    evil = {"origin": "https://evil.example"}
    at = f"/start/{site.platform}"
    assert client.post(at, data={"participant": "p1"}, headers=evil).status_code == 403
    old, site.platform = site.platform, invite_as(site.store, "platform")
    assert site.enter(client, "p1", old).status_code == 403
    assert site.enter(client, "p1").status_code == 303


def test_no_more_participants_than_the_study_takes(tmp_path: Path) -> None:
    made = Site(tmp_path, code='code = "C0DE42"\nmost = 2')
    with made.store:
        for name, status in (("a", 303), ("b", 303), ("c", 403), ("a", 303)):
            assert made.enter(made.client(), name).status_code == status


@pytest.mark.parametrize("before", ["", "/labels"])
def test_a_proxy_may_show_the_page_at_a_path_and_strip_it_or_not(site: Site, before: str) -> None:
    pages = server.app(
        site.round, site.folder, site.store, KEY, None, "https://lab.example", "/labels"
    )
    client = TestClient(pages, base_url="http://127.0.0.1:8000", follow_redirects=False)
    own = {"origin": "https://lab.example", "sec-fetch-site": "same-origin"}
    joined = client.post(f"{before}/join", data={"token": invite(site.store, "Ann")}, headers=own)
    assert joined.headers["location"] == "/labels/"
    assert "Path=/labels" in joined.headers["set-cookie"]
    client.headers["cookie"] = joined.headers["set-cookie"].split(";")[0]
    page = client.get(f"{before}/").text
    addresses = re.findall(r'(?:href|src|action)="([^"?]+)', page)
    assert addresses
    assert all(address.startswith("/labels/") for address in addresses)
    agreed = {**hidden(page, "/agree"), "agree": "yes"}
    assert client.post(f"{before}/agree", data=agreed, headers=own).status_code == 303
    assert client.get(f"{before}/static/page.js").status_code == 200
    assert client.get(f"{before}/nothing").status_code == 404


def test_links_of_a_platform_are_shown_once(site: Site) -> None:
    renewed = list(server.invitations(site.store, [], "https://x/labels", renew=True))
    assert renewed[2].startswith("platform: https://x/labels/start/")
    assert renewed[2].endswith("?PROLIFIC_PID={{%PROLIFIC_PID%}}")
    assert list(server.invitations(site.store, [], "https://x"))[2].startswith("platform: invited")


# ---- answers


def asking(folder: Path, kind: Any, images: int = 2, **more: Any) -> tuple[Round, LabelStore]:
    sources = [new_source(folder / str(n), 2, first=2 * n, size=4) for n in range(images)]
    study = one_question(kind, "Which?", **more)
    round_ = comparisons.take(folder / "round", sources, study)
    return round_, LabelStore(default_url(folder / "round"), round_, HandoutSettings(9, 0, 0))


def test_a_ranking_is_stored_best_first_and_malformed_ones_are_refused(tmp_path: Path) -> None:
    round_, store = asking(tmp_path, "ranking", 3)
    with store:
        pages = server.app(round_, tmp_path / "round", store, KEY)
        client = TestClient(pages, follow_redirects=False)
        client.post("/join", data={"token": invite(store, "Ann")})
        form = hidden(client.get("/").text, 'id="vote"')
        for ranks in ([], ["1", "2"], ["1", "1", "2"], ["0", "1", "2"], ["1", "2", "4"], ["x"] * 3):
            assert client.post("/vote", data={**form, "rank": ranks}).status_code == 400
        assert client.post("/vote", data={**form, "rank": ["3", "1", "2"]}).status_code == 303
        (vote,) = votes.effective_votes(store)
        assert vote.answer == tuple(vote.shown[place] for place in (1, 2, 0))


def test_ratings_and_comments_out_of_range_are_refused(site: Site) -> None:
    ann = site.rater()
    while (hand := site.held("Ann")) and hand.item.question != "real":
        site.work(ann, "Ann", 1)
    form = hidden(ann.get("/").text, 'id="vote"')
    for wrong in ("0", "6", "-1", "4.5", "tie", "", "٣"):
        assert ann.post("/vote", data={**form, "answer": wrong}).status_code == 400
    assert ann.post("/vote", data={**form, "answer": "5", "comment": "x"}).status_code == 400
    assert ann.post("/vote", data={**form, "answer": "5"}).status_code == 303


def test_a_comment_is_kept_with_its_vote_and_undone_with_it(site: Site) -> None:
    ann = site.rater()
    page = ann.get("/").text
    for wrong in ("x" * 1001, "a\0b", "a\x1b[31m"):
        form = {**hidden(page, 'id="vote"'), "answer": "0", "comment": wrong}
        refused = ann.post("/vote", data=form)
        assert refused.status_code == 400
        assert "<h1>This comment is too long, or holds control characters." in refused.text
    said = "=1+1\r\n<script>alert(1)</script> \U0001f600"
    site.work(ann, "Ann", 1, comment=said)
    (vote,) = votes.effective_votes(site.store)
    assert vote.comment == said.replace("\r\n", "\n")
    site.work(ann, "Ann", 1)
    row = votes.exported(site.store, [vote])[0]
    assert "'=1+1" in votes.rows_as([row], ".csv").decode()
    ann.post("/undo", data=hidden(ann.get("/").text, 'action="/undo"'))
    ann.post("/undo", data=hidden(ann.get("/").text, 'action="/undo"'))
    assert votes.effective_votes(site.store) == []
    site.work(ann, "Ann", 1)
    assert [v.comment for v in votes.effective_votes(site.store)] == [""]


@pytest.mark.parametrize(
    "said",
    [
        "\u4e8c\u3000\u5339", "deux\u00a0!", "\u2640\u200d\u2642", "\u06cc\u200c\u062e",
        "\u200f\u05d0", "two\ttails",
    ],
)  # fmt: skip
def test_a_comment_may_hold_what_keyboards_type(site: Site, said: str) -> None:
    site.work(site.rater(), "Ann", 1, comment=said)
    assert [vote.comment for vote in votes.effective_votes(site.store)] == [said]


# ---- who to look at, and the admin


@pytest.mark.parametrize("others", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_of_several_raters_the_careless_one_is_warned_and_flagged(
    others: int, tmp_path: Path
) -> None:
    made = Site(tmp_path, votes_per_item=20, answers="answers = 10")
    with made.store:
        for n in range(others):
            made.work(made.rater(f"rater {n}"), f"rater {n}")
        dan = made.rater("Dan")
        for _ in range(11):
            hand = made.held("Dan")
            assert hand is not None
            said = "tie" if hand.item.question == "better" else "5"
            made.work(dan, "Dan", 1, answer=said, milliseconds="150")
        page = dan.get("/").text
        assert "Please take your time" in page
        assert "Please look closely" in page
        given = votes.effective_votes(made.store)
        lines = list(report(made.round, given, Progress(0, 0)))
        flagged = [line.partition(":")[0] for line in lines if "too fast" in line]
        assert flagged == ["Dan"]
        assert [line for line in lines if "fails known answers" in line] == [
            line for line in lines if line.startswith("Dan: ")
        ]
        admin = made.client()
        admin.post("/join", data={"token": invite_as(made.store)})
        overview = admin.get("/admin").text
        assert overview.count('class="flag"') == 2
        assert overview.count("<small>finished</small>") == others


def test_the_admin_browses_items_by_disagreement_and_takes_the_export(site: Site) -> None:
    ann, admin = site.rater(), site.client()
    site.work(ann, "Ann", 4, comment="<i>two</i>")
    admin.post("/join", data={"token": invite_as(site.store)})
    page = admin.get("/admin/items").text
    assert "&lt;i&gt;two" in page
    assert "<i>two" not in page
    for query in ("order=votes", "order=comments", "order=name", "question=real"):
        assert admin.get(f"/admin/items?{query}").status_code == 200
    for query in ("order=x", "question=x", "page=9", "page=-1", "page=x", "question=%00"):
        assert admin.get(f"/admin/items?{query}").status_code in (400, 404)
    item = site.round.items[0]
    shown = admin.get(f"/admin/picture/{item.id}/1")
    assert shown.content == (site.folder / item.images[1]).read_bytes()
    for path in (f"/admin/picture/{item.id}/2", "/admin/picture/..%2fround.json/0"):
        assert admin.get(path).status_code in (400, 404)
    table = admin.get("/admin/export.csv")
    assert table.headers["content-disposition"] == 'attachment; filename="labels.csv"'
    given = len(votes.effective_votes(site.store))
    assert len(list(csv.DictReader(io.StringIO(table.text)))) == given
    assert len(admin.get("/admin/export.json").json()) == given
    for path in ("/admin/items", f"/admin/picture/{item.id}/0", "/admin/export.csv"):
        assert ann.get(path).status_code == 403
        assert site.client().get(path).status_code == 401


# ---- what becomes of it


def vote_on(store: LabelStore, name: str, *answers: Answer) -> None:
    """One rater's answers to the items in their order."""
    rater = find_rater(store, token=invite(store, name))
    given = {item.id: said for item, said in zip(store.round.items, answers, strict=False)}
    while rater and (hand := hand_out(store, rater.id)):
        said = given.get(hand.item.id)
        votes.cast_vote(store, rater.id, hand.id, said, 5, hand.step)


def test_a_scale_becomes_steps_above_its_middle_and_rankings_what_they_beat(tmp_path: Path) -> None:
    round_, store = asking(tmp_path / "scale", "scale", scale="1-5")
    with store:
        vote_on(store, "x", 5, 1, 3)
        vote_on(store, "y", 4, 1)
        scores = agreement.scores(round_.parts[0], votes.effective_votes(store))
    # (2 + 1) / 2 and (-2 - 2) / 2; 3 is the middle; nobody judged the last
    assert scores[0].tolist() == [1.5, -2]
    assert str(scores[1].tolist()) == "[0.0, nan]"
    round_, store = asking(tmp_path / "ranking", "ranking", 3)
    with store:
        vote_on(store, "x", (2, 0, 1), (0, 1, 2))
        vote_on(store, "y", (2, 1, 0))
        given = votes.effective_votes(store)
    assert agreement.scores(round_.parts[0], given).tolist() == [[0.5, 0.5, 2], [2, 1, 0]]
    # places of image 0: 1 and 2, of 1: 2 and 1, of 2: 0 and 0; of two places, at most 2 apart
    assert agreement.disagreement(round_.parts[0], given) == {"00000.ranking": pytest.approx(1 / 3)}


def test_alpha_of_a_scale_is_ordinal(tmp_path: Path) -> None:
    import krippendorff

    round_, store = asking(tmp_path, "scale")
    with store:
        vote_on(store, "x", 1, 2, 4, 5)
        vote_on(store, "y", 2, 2, 5, 5)
        alpha = agreement.alpha(round_.parts[0], votes.effective_votes(store))
    expected = krippendorff.alpha([[1, 2, 4, 5], [2, 2, 5, 5]], level_of_measurement="ordinal")
    # of the five steps, one was not used: the package counts those that were
    assert alpha == pytest.approx(expected)


@pytest.mark.parametrize("suffix", [".csv", pytest.param(".json", marks=pytest.mark.slow)])
def test_the_export_of_a_study_is_read_question_by_question(site: Site, suffix: str) -> None:
    site.work(site.rater(), "Ann")
    table = site.folder / f"labels{suffix}"
    votes.export(site.store, table)
    with pytest.raises(UserError, match=r"several questions, such as .*Choose one with --question"):
        dataset.read(table)
    with pytest.raises(UserError, match="has no question 'x', but"):
        dataset.read(table, question="x")
    for part in site.round.parts:
        read = dataset.read(table, question=part.question.name)
        assert read.judged == part.question.judged
        scores = agreement.scores(part, part.of(votes.effective_votes(site.store)))
        images = [Path(name).name for group in site.round.groups for name in group.images]
        expected = dict(zip(images, scores.flatten().tolist(), strict=True))
        found = {
            picture.name: score  # type: ignore[union-attr]  # all are files
            for group in read.groups
            for picture, score in zip(group.pictures, group.scores, strict=True)
        }
        assert found == expected


# ---- the file


FAULTS = {
    "[[question]": "is not TOML",
    'x = 1\n[[question]]\nname = "better"\nkind = "pairs"\n': "x: extra inputs are not permitted",
    '[[question]]\nname = "a"\nkind = "grid"\n': "question[0].kind: input should be one of tags",
    '[[question]]\nname = "A b"\nkind = "tags"\n': "question[0].name: string should match pattern",
    '[[question]]\nname = "a"\nkind = "tags"\n': "the question a has no text",
    '[[question]]\nname = "a"\nkind = "scale"\ntext = "x"\nscale = "5-1"\n': "2 to 10 steps",
    '[[question]]\nname = "a"\nkind = "scale"\ntext = {fr = "x"}\n': "question[0].text",
    "answers = 0\n" + '[[question]]\nname = "better"\nkind = "pairs"\n': "answers: input should be",
    2 * '[[question]]\nname = "better"\nkind = "pairs"\n': "each question needs a name of its own",
    '[[question]]\nname = "better"\nkind = "pairs"\n[[gold]]\nquestion = "x"\npictures = ["a"]\n'
    'answer = "a"\n': "gold[0]: there is no question 'x'",
    '[[question]]\nname = "better"\nkind = "pairs"\n[[gold]]\nquestion = "better"\n'
    'pictures = ["a"]\nanswer = "a"\n': "gold[0]: better is asked of 2 pictures, not of 1",
    '[[question]]\nname = "better"\nkind = "pairs"\n[[practice]]\nquestion = "better"\n'
    'pictures = ["a", "b"]\nanswer = "c"\n': "practice[0]: an answer is one of a, b, tie, bad",
    '[[question]]\nname = "better"\nkind = "pairs"\n[platform]\ncode = "a b"\n': "platform.code",
    '[[question]]\nname = "better"\nkind = "pairs"\n[platform]\ncode = "a"\nback = "http://a"\n':
        "platform.back: give an address that begins with https://",
}  # fmt: skip
"""A study -> what is said of it."""


def test_a_malformed_study_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    for text, said in FAULTS.items():
        file.write_text(text)
        with pytest.raises(UserError) as refused:
            read_study(file)
        assert said in str(refused.value), str(refused.value)
        assert str(refused.value).startswith(str(file))
        assert "\n" not in str(refused.value)


def test_a_study_is_read_as_it_was_written_and_its_pictures_are_checked(site: Site) -> None:
    assert Round.read(site.folder).study == site.round.study
    known = json.loads((site.folder / "round.json").read_text())["study"]
    (site.folder / known["gold"][0]["pictures"][0]).unlink()
    with pytest.raises(UserError, match="there is no such file"):
        Round.read(site.folder)
