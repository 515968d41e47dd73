"""Many raters at once against the real server, and a server that is killed while they vote.

    python -m tests.feedback_load                      16 raters x 200 votes
    python -m tests.feedback_load --kill 20            the same, with 20 kill -9
    python -m tests.feedback_load --kind study --kill 20    a study, with consent and comments

One vote in twenty is undone and given again. Prints votes lost, votes and undos doubled, and
items seen twice (all must be 0) and how long a vote took; exits with 1 if a count is not 0.
Raters think before they answer: `--think 0` measures a server that is never idle.
"""

from __future__ import annotations

import argparse
import html
import http.client
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode

from d3po_bench.feedback import comparisons
from d3po_bench.feedback.invitations import invite
from d3po_bench.feedback.page.server import serve
from d3po_bench.feedback.page.sessions import Limits
from d3po_bench.feedback.questions import Answer, Kind
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.schema import read_study
from d3po_bench.feedback.store import HandoutSettings, LabelStore, default_url
from tests.feedback_round import new_round, new_source, new_study

PATIENCE = 300.0
"""Seconds that a rater keeps trying, on a machine that is busy."""
UNDONE = 0.05
"""Probability that a vote is undone."""
UNLIMITED = Limits(votes=(10**9, 1.0), pages=(10**9, 1.0))


@dataclass
class Page:
    """What a rater reads off the page."""

    hand: int
    step: int
    csrf: str
    kind: str
    places: int
    comments: bool
    last: int


@dataclass
class Person:
    """One rater in a thread, over HTTP as a browser would."""

    name: str
    token: str
    port: int
    think: float
    cookie: str = ""
    acknowledged: dict[int, str] = field(default_factory=dict)
    """Hand -> the places or the choice that were sent, and not undone since."""
    undos: int = 0
    seen: set[int] = field(default_factory=set)
    """Hands of which a page was shown."""
    milliseconds: list[float] = field(default_factory=list)

    def work(self, votes: int) -> None:
        """Sign in and vote so many times, or until there is nothing left."""
        self.sign_in()
        rng = random.Random(self.name)
        while len(self.acknowledged) < votes:
            page = self.look()
            if page is None:
                return
            self.seen.add(page.hand)
            time.sleep(self.think * rng.uniform(0.5, 1.5))
            self.vote(page, rng)
            if rng.random() < UNDONE:
                self.undo(page.hand)

    def sign_in(self) -> None:
        status, headers, _ = self.ask("POST", "/join", {"token": self.token})
        if status != 303:
            raise RuntimeError(f"{self.name} was not let in: {status}")
        self.cookie = headers["set-cookie"].split(";")[0]
        for path, agreed in (("/agree", {"agree": "yes"}), ("/begin", {})):
            _, _, text = self.ask("GET", "/")
            csrf = re.search(r'name="csrf" value="(\w+)"', text)
            if path in text and csrf:
                self.ask("POST", path, {"csrf": csrf[1], **agreed})

    def look(self) -> Page | None:
        status, _, text = self.ask("GET", "/")
        if status != 200:
            raise RuntimeError(f"no page for {self.name}: {status}")
        if 'name="hand"' not in text:
            return None

        def read(pattern: str) -> str:
            found = re.search(pattern, text)
            if found is None:
                raise RuntimeError(f"{pattern} is not on the page")
            return html.unescape(found[1])

        return Page(
            hand=int(read(r'name="hand" value="(\d+)"')),
            step=int(read(r'name="step" value="(\d+)"')),
            csrf=read(r'name="csrf" value="(\w+)"'),
            kind=read(r'<main class="(\w+)'),
            places=text.count("<img "),
            comments='name="comment"' in text,
            last=int(read(r'name="last" value="(\d+)"')),
        )

    def vote(self, page: Page, rng: random.Random) -> None:
        """Answer, again and again until it is acknowledged; 409 says that it was stored before."""
        fields: dict[str, object] = {"hand": page.hand, "step": page.step, "csrf": page.csrf}
        if page.kind == "tags":
            chosen = sorted(rng.sample(range(page.places), rng.randint(0, page.places)))
            fields["tag"] = chosen
            answer = " ".join(map(str, chosen))
        elif page.kind == "scale":
            fields["answer"] = answer = rng.choice("12345")
        else:
            fields["answer"] = answer = rng.choice(("0", "1", "tie", "bad"))
            if page.comments:
                comment = f"{answer}, said {self.name}"
                fields["comment"] = comment
                answer += comment
        fields["milliseconds"] = int(1000 * self.think)
        begun = time.perf_counter()
        status, _, _ = self.ask("POST", "/vote", fields)
        if status not in (303, 409):
            raise RuntimeError(f"a vote of {self.name} was refused: {status}")
        self.milliseconds.append(1000 * (time.perf_counter() - begun))
        self.acknowledged[page.hand] = answer

    def undo(self, hand: int) -> None:
        """Take the last vote back, as often as it takes; 409 says that it was undone before."""
        page = self.look()
        if page is None:
            return
        status, _, _ = self.ask("POST", "/undo", {"csrf": page.csrf, "last": page.last})
        if status not in (303, 409):
            raise RuntimeError(f"an undo of {self.name} was refused: {status}")
        del self.acknowledged[hand]
        self.undos += 1

    def ask(
        self, method: str, path: str, fields: dict[str, object] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """One request, sent again while the server is away."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self.once(method, path, fields)
            except (OSError, http.client.HTTPException):
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def once(
        self, method: str, path: str, fields: dict[str, object] | None
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"cookie": self.cookie}
        if fields is not None:
            headers["content-type"] = "application/x-www-form-urlencoded"
        try:
            body = None if fields is None else urlencode(fields, doseq=True)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read().decode()
        finally:
            connection.close()


class Server:
    """The real server in a process of its own, on one port through all restarts."""

    def __init__(self, folder: Path, settings: HandoutSettings, *, unlimited: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._command = [
            sys.executable, "-m", "tests.feedback_load", "--serve", str(folder),
            "--port", str(self.port), "--k", str(settings.votes_per_item),
            "--repeat-every", str(settings.repeat_every), "--gold-every", str(settings.gold_every),
            *(["--unlimited"] if unlimited else []),
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end."""
        self.process.terminate()
        self.process.wait()


@dataclass(frozen=True)
class Outcome:
    """What went wrong, and how long votes took."""

    acknowledged: int
    stored: int
    lost: int
    """Acknowledged, but not stored as sent."""
    doubled: int
    """Votes beyond one for each hand, and undos beyond those acknowledged."""
    seen_twice: int
    """Items shown to a rater under two hands, declared repeats aside."""
    milliseconds: list[float]

    def __str__(self) -> str:
        cuts = statistics.quantiles(self.milliseconds, n=100)
        return (
            f"acknowledged {self.acknowledged}, stored {self.stored}, lost {self.lost}, doubled "
            f"{self.doubled}, seen twice {self.seen_twice}; ms of a vote: p50 {cuts[49]:.0f}, "
            f"p95 {cuts[94]:.0f}, max {max(self.milliseconds):.0f}"
        )


def run(
    folder: Path, raters: int, votes: int, kills: int, *, kind: Kind | Literal["study"] = "tags",
    think: float = 0.25, every: float = 1.0,
) -> Outcome:  # fmt: skip
    """Let `raters` vote `votes` times each, killing the server `kills` times on the way."""
    settings = HandoutSettings(votes_per_item=min(raters, 5), repeat_every=10)
    # enough items for everybody, repeats and gold included
    number = -(-raters * votes // settings.votes_per_item) + votes
    if kind == "study":
        study = read_study(new_study(folder.parent / "study", answers=f"answers = {votes}"))
        sources = [new_source(folder.parent / str(n), number, size=2) for n in range(2)]
        round_ = comparisons.take(folder, sources, study, folder.parent / "study")
    else:
        gold: Answer = (0,) if kind == "tags" else "a"
        round_ = new_round(folder, kind, number, images=2, size=2, gold={3: gold})
    with LabelStore(default_url(folder), round_, settings) as store:
        tokens = {f"rater {n}": invite(store, f"rater {n}") for n in range(raters)}
    server = Server(folder, settings, unlimited=think < 0.2)
    try:
        people = [Person(name, token, server.port, think) for name, token in tokens.items()]
        threads = [threading.Thread(target=person.work, args=(votes,)) for person in people]
        for thread in threads:
            thread.start()
        for _ in range(kills):
            time.sleep(every)
            server.kill()
            server.start()
        for thread in threads:
            thread.join()
    finally:
        server.stop()
    return compare(folder, round_, people)


def compare(folder: Path, round_: Round, people: list[Person]) -> Outcome:
    """What is in the database against what raters were told."""
    import sqlalchemy as sql

    from d3po_bench.feedback.store import HANDS, NOTES, RATERS, VOTES

    engine = sql.create_engine(default_url(folder))
    query = sql.select(VOTES, RATERS.c.name).join(RATERS, RATERS.c.id == VOTES.c.rater)
    written = sql.select(NOTES).where(NOTES.c.kind == "comment")
    with engine.connect() as connection:
        every = connection.execute(query).mappings().all()
        undone = {(row["hand"], row["step"] - 1) for row in every if row["kind"] == "undo"}
        rows = [r for r in every if r["kind"] == "vote" and (r["hand"], r["step"]) not in undone]
        first = sql.select(HANDS.c.id, HANDS.c.item).where(HANDS.c.repeat == 0)
        items = {row.id: row.item for row in connection.execute(first)}
        said = {(n.hand, n.step): n.text for n in connection.execute(written)}
    engine.dispose()
    stored = Counter(
        (row["name"], row["hand"], _places(row) + said.get((row["hand"], row["step"]), ""))
        for row in rows
    )
    sent = Counter((p.name, h, answer) for p in people for h, answer in p.acknowledged.items())
    return Outcome(
        acknowledged=sent.total(),
        stored=len(rows),
        lost=(sent - stored).total(),
        doubled=len(rows)
        - len({(row["name"], row["hand"]) for row in rows})
        + abs(len(undone) - sum(person.undos for person in people)),
        seen_twice=sum(_seen_twice(person, items) for person in people),
        milliseconds=[ms for person in people for ms in person.milliseconds],
    )


def _places(row: object) -> str:
    """The stored answer as the page sent it."""
    import json

    values = dict(row)  # type: ignore[call-overload]
    shown, answer = json.loads(values["shown"]), json.loads(values["answer"])
    if isinstance(answer, list):
        return " ".join(str(place) for place in range(len(shown)) if shown[place] in answer)
    return str(shown.index("ab".index(answer))) if answer in ("a", "b") else str(answer)


def _seen_twice(person: Person, items: dict[int, str]) -> int:
    shown = Counter(items[hand] for hand in person.seen if hand in items)
    return sum(count > 1 for count in shown.values())


def main() -> None:
    """Run one of the two: the server of a test, or the test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--raters", type=int, default=16)
    parser.add_argument("--votes", type=int, default=200, help="of each rater")
    parser.add_argument("--kill", type=int, default=0, help="times")
    parser.add_argument("--kind", choices=("tags", "pairs", "study"), default="tags")
    parser.add_argument("--think", type=float, default=0.25, help="mean seconds before a vote")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--repeat-every", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gold-every", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--unlimited", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        limits = UNLIMITED if given.unlimited else None
        settings = HandoutSettings(given.k, given.gold_every, given.repeat_every)
        serve(given.serve, port=given.port, settings=settings, limits=limits)
        return
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(
            Path(folder) / "round", given.raters, given.votes, given.kill,
            kind=given.kind, think=given.think, every=2.0,
        )  # fmt: skip
    print(outcome)
    if outcome.lost or outcome.doubled or outcome.seen_twice:
        sys.exit(1)


if __name__ == "__main__":
    main()
