"""Weights: found by checksum, fetched over a real (local) connection, clear when absent."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from d3po_bench.errors import RunError, UserError
from eval import weights
from eval.weights import WEIGHTS, File, Weights

CONTENT = bytes(range(256)) * 4000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT with byte ranges, counting what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.stop_after: int | None = None
        self.ranges = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.stop_after])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with the network allowed."""
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


def offer(monkeypatch: pytest.MonkeyPatch, server: Server, sha256: str = SHA) -> Path:
    """Make `toy` a known name, whose file the server has; where its file will lie."""
    url = f"http://127.0.0.1:{server.server_port}/toy.bin"
    file = File(name="toy.bin", url=url, sha256=sha256, size=len(CONTENT))
    monkeypatch.setitem(WEIGHTS, "toy", Weights(summary="", licence="MIT", files=(file,)))
    return weights.home() / "toy" / "toy.bin"


def test_every_entry_is_complete() -> None:
    for name, entry in WEIGHTS.items():
        assert all((entry.summary, entry.licence, entry.files)), name
        for file in entry.files:
            assert file.url.startswith("https://"), file
            assert re.fullmatch(r"([0-9a-f]{64})?", file.sha256), file


def test_fetched_then_found(monkeypatch: pytest.MonkeyPatch, server: Server, here: Path) -> None:
    path = offer(monkeypatch, server)
    told: list[tuple[str, int, int]] = []
    assert weights.fetch("toy", lambda *now: told.append(now)) == path.parent
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("toy.bin", len(CONTENT), len(CONTENT))
    assert weights.find("toy") == path.parent
    assert weights.state("toy") == "present"
    weights.fetch("toy")
    assert server.asked == [None], "what is there is not fetched again"


def test_a_broken_download_goes_on(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path
) -> None:
    path = offer(monkeypatch, server)
    server.stop_after = 100_000
    with pytest.raises(RunError, match=r"ended early.*run it again to go on"):
        weights.fetch("toy")
    assert not path.exists()
    assert weights.state("toy") == "absent"
    server.stop_after = None
    weights.fetch("toy")
    assert server.asked == [None, "bytes=100000-"]
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path
) -> None:
    path = offer(monkeypatch, server)
    path.parent.mkdir()
    path.with_name("toy.bin.part").write_bytes(b"x" * 500)
    server.ranges = False
    weights.fetch("toy")
    assert path.read_bytes() == CONTENT


def test_a_whole_part_file_is_only_checked(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path
) -> None:
    path = offer(monkeypatch, server)
    path.parent.mkdir()
    path.with_name("toy.bin.part").write_bytes(CONTENT)
    weights.fetch("toy")
    assert path.read_bytes() == CONTENT


def test_another_file_is_refused_and_thrown_away(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path
) -> None:
    path = offer(monkeypatch, server, "0" * 64)
    with pytest.raises(UserError, match=f"Expected sha256 0000.*got {SHA}"):
        weights.fetch("toy")
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:5] + b"!" + CONTENT[6:]])
def test_a_damaged_file_is_refused_at_use(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path, damage: bytes
) -> None:
    path = offer(monkeypatch, server)
    weights.fetch("toy")
    path.write_bytes(damage)
    with pytest.raises(UserError, match="damaged or another"):
        weights.find("toy")
    with pytest.raises(UserError, match="damaged or another"):
        weights.fetch("toy")
    assert "damaged" in weights.state("toy")


def test_without_a_published_checksum_that_of_the_first_fetch_holds(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path
) -> None:
    path = offer(monkeypatch, server, "")
    weights.fetch("toy")
    assert (path.parent / "toy.bin.sha256").read_text() == SHA + "\n"
    assert weights.find("toy") == path.parent
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="damaged or another"):
        weights.find("toy")
    (path.parent / "toy.bin.sha256").unlink()
    with pytest.raises(UserError, match=r"none is published\. If you trust this file"):
        weights.find("toy")


def test_offline_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, server: Server, here: Path
) -> None:
    offer(monkeypatch, server)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"Expected http.*HF_HUB_OFFLINE.*by hand"):
        weights.fetch("toy")
    assert server.asked == []


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    file = File(name="x", url=url, sha256=SHA, size=0)
    monkeypatch.setitem(WEIGHTS, "toy", Weights(summary="", licence="MIT", files=(file,)))
    with pytest.raises(UserError, match="refused"):
        weights.fetch("toy")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", "/a/b")
    assert weights.home() == Path("/a/b")
    monkeypatch.delenv("D3PO_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert weights.home() == Path("/c/d3po-bench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.home() == Path.home() / ".cache" / "d3po-bench"


@pytest.mark.parametrize(("size", "text"), [(5, "5 B"), (231_508, "231.5 kB"), (17e8, "1.7 GB")])
def test_sizes_are_readable(size: int, text: str) -> None:
    assert weights.readable(size) == text
