"""A reward behind an address: the server of docs/own-reward.md, and answers that are none."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench import registry
from d3po_bench.errors import RunError, UserError
from d3po_bench.rewards import http
from d3po_bench.runs.run import RunFolder
from tests.commands import ROOT, Command, refused, run_of
from tests.conftest import CPU

GUIDE = (ROOT / "docs" / "own-reward.md").read_text(encoding="utf-8")
RED = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(40, 3, 4, 4)

Serve = Callable[[type[BaseHTTPRequestHandler]], str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server, and return the address of its scores; retries wait for nothing."""
    monkeypatch.setattr(http, "PAUSE", 0.0)
    servers: list[HTTPServer] = []

    def start(kind: type[BaseHTTPRequestHandler]) -> str:
        kind.log_message = lambda *given: None  # type: ignore[method-assign]
        servers.append(HTTPServer(("localhost", 0), kind))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://localhost:{servers[-1].server_port}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Answers(BaseHTTPRequestHandler):
    """Answers every request with what `replies` gives for its pictures."""

    replies: Callable[[int], tuple[int, bytes]]
    asked: list[dict[str, Any]]
    headers_seen: list[Any]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(asked)
        self.headers_seen.append(self.headers)
        status, body = type(self).replies(len(asked["images"]))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://localhost:1/")
        self.end_headers()
        self.wfile.write(body)


def answering(*replies: tuple[int, object]) -> type[Answers]:
    """A handler that gives each reply once, then the last; of an int, so many zeros."""
    left = list(replies)

    def reply(count: int) -> tuple[int, bytes]:
        status, body = left.pop(0) if len(left) > 1 else left[0]
        known = body if isinstance(body, str) else json.dumps([0.5] * count)
        return status, known.encode()

    return type("Own", (Answers,), {
        "replies": staticmethod(reply), "asked": [], "headers_seen": [],
    })  # fmt: skip


GOOD = (200, None)


def test_the_guides_server_trains_a_run(
    serve: Serve, command: Command, micro: Path, tmp_path: Path
) -> None:
    (text,) = re.findall(r"<!-- example: server.py -->\n```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "server"}
    exec(compile(text, "server.py", "exec"), names)
    address = serve(names["Redness"])
    assert command(*run_of(micro, "--objective", address, rounds=1)).code == 0
    (path,) = tmp_path.rglob("config.json")
    made = RunFolder(path.parent)
    assert made.config.objective == address.removeprefix("http://").replace(":", "-").replace(
        "/", "-"
    )
    assert made.facts["score"] == {"scorer": made.config.objective, "unit": "points", "sign": 1}
    found = registry.load_scorer(address, CPU)(RED, ["cat"] * 40)
    assert found.tolist() == [1.0] * 40


def test_pictures_are_sent_in_batches_with_the_token(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(http.TOKEN, "abc")
    kind = answering(GOOD)
    scorer = registry.load_scorer(serve(kind), CPU)
    assert scorer(RED, ["cat"] * 40).tolist() == [0.5] * 40
    assert [len(asked["images"]) for asked in kind.asked] == [1, 32, 8]
    assert {headers["Authorization"] for headers in kind.headers_seen} == {"Bearer abc"}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, "scores"), "'scores', which is not JSON"),
        ((200, "[0.5, 0.5]"), "2 numbers for 1 pictures"),
        ((200, "[]"), "0 numbers for 1 pictures"),
        ((200, "[NaN]"), "[NaN] instead of a list of numbers"),
        ((200, "[1e999]"), "[Infinity] instead of a list"),
        ((200, f"[1{'0' * 400}]"), "instead of a list of numbers"),
        ((200, "[null]"), "[null] instead of"),
        ((200, "[true]"), "[true] instead of"),
        ((200, '["0.5"]'), '["0.5"] instead of'),
        ((200, "0.5"), "0.5 instead of"),
        ((200, '{"score": [0.5]}'), "instead of a list of numbers"),
        ((200, "[" * 100_000), "which is not JSON"),
        ((201, "[0.5]"), "status 201"),
        ((302, "[0.5]"), "status 302"),
        ((404, "[0.5]"), "status 404"),
        ((500, "[0.5]"), "status 500"),
        ((503, "[0.5]"), "status 503"),
    ],
)
def test_what_is_no_score_is_an_error_and_never_0(
    reply: tuple[int, object], said: str, serve: Serve, command: Command, micro: Path
) -> None:
    address = serve(answering(reply))
    refused(command(*run_of(micro, "--objective", address)), said)
    assert not Path("runs").exists()
    scorer = registry.load_scorer(serve(answering(GOOD, reply)), CPU)
    with pytest.raises(RunError) as caught:
        scorer(RED[:1], ["cat"])
    assert said in str(caught.value)
    assert type(caught.value) is RunError


def test_a_busy_server_is_asked_again(serve: Serve) -> None:
    kind = answering(GOOD, (503, ""), (429, ""), (502, ""), GOOD)
    scorer = registry.load_scorer(serve(kind), CPU)
    assert scorer(RED[:1], ["cat"]).tolist() == [0.5]
    assert len(kind.asked) == 5


def test_what_a_server_or_a_file_says_of_its_scores(serve: Serve, tmp_path: Path) -> None:
    facts = {"scores": [1], "unit": "kg", "direction": -1, "version": "2"}
    address = serve(answering((200, json.dumps(facts))))
    assert registry.objective(address).sign == -1
    assert registry.load_scorer(address, CPU).unit == "kg"
    path = tmp_path / "weight.py"
    path.write_text(f'reward = "{address}"\nunit = "tons"\n')
    assert (registry.load_scorer(str(path), CPU).unit, registry.objective(str(path)).sign) == (
        "tons", -1,
    )  # fmt: skip
    assert registry.name_of("objective", str(path)) == "weight"
    first = http.server(address).digest
    other = serve(answering((200, json.dumps(facts | {"version": "3"}))))
    assert http.Server(other).digest != first


def test_a_direction_that_is_none_is_refused(serve: Serve) -> None:
    address = serve(answering((200, '{"scores": [1], "direction": 0}')))
    with pytest.raises(UserError, match="has 0 as its direction"):
        registry.objective(address)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://localhost:8000/score", "localhost-8000-score"),
        ("https://rewards.example.org/v2/a~b/", "rewards.example.org-v2-a-b"),
        ("http://[::1]:80/x", "1-80-x"),
        ("http://host/reward.py", "host-reward-py"),
    ],
)
def test_addresses_give_names_that_folders_can_have(address: str, name: str) -> None:
    assert registry.name_of("objective", address) == name
