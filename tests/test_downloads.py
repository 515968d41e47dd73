"""Weights: found by checksum, fetched over a real (local) connection, clear when absent."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from d3po_bench import cache
from d3po_bench.errors import RunError, UserError
from eval import downloads
from eval.downloads import Weights

CONTENT = bytes(range(256)) * 4000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT with byte ranges as the weights `toy`, and notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.stops: list[int] = []
        """Bytes after which each of the next answers breaks off."""
        self.ranges = True
        self.path = cache.home() / "toy" / "toy.bin"
        self.part = self.path.with_name("toy.bin.part")
        self.path.parent.mkdir()
        self.offer(SHA)

    def offer(self, sha256: str) -> None:
        address, files = f"http://127.0.0.1:{self.server_port}/", {"toy.bin": (sha256, 0)}
        downloads.known()["toy"] = Weights(summary="", licence="", address=address, files=files)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = self.server.stops.pop(0) if self.server.stops else None
        self.wfile.write(CONTENT[start:][:stop])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is allowed, for a server on this machine."""
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    del downloads.known()["toy"]


# ---- what can be fetched


def test_every_entry_is_complete() -> None:
    for name, entry in downloads.known().items():
        assert all((entry.summary, entry.licence, entry.files)), name
        for file, (sha256, _) in entry.files.items():
            assert entry.url(file).startswith("https://"), file
            assert re.fullmatch(r"([0-9a-f]{64})?", sha256), file


def test_weights_are_listed_without_loading_torch() -> None:
    code = "import sys; from eval import downloads as d; print(*d.known(), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    *names, loaded = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == "False"
    assert set(names) == {
        "clip", "clip-words", "laion_aesthetic", "blip", "blip_base", "image_reward", "pick_score",
        "hps_v2_1", "vqa_score", "bert-base-uncased", "prompts-anime",
        "prompts-image-reward",
    }  # fmt: skip


@pytest.mark.parametrize(("size", "text"), [(5, "5 B"), (231_508, "231.5 kB"), (17e8, "1.7 GB")])
def test_sizes_are_readable(size: int, text: str) -> None:
    assert downloads.readable(size) == text


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", "/a/b")
    assert cache.home() == Path("/a/b")
    monkeypatch.delenv("D3PO_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache.home() == Path("/c/d3po-bench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.home() == Path.home() / ".cache" / "d3po-bench"


# ---- found


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        downloads.find("image_reward", "bert-base-uncased")
    said = str(error.value)
    assert f"ImageReward.pt in {tmp_path / 'image_reward'} (image_reward, 1.8 GB)" in said
    assert f"vocab.txt in {tmp_path / 'bert-base-uncased'} (bert-base-uncased, 231.5 kB)" in said
    assert "`d3po-bench weights fetch image_reward bert-base-uncased`" in said


def test_half_of_the_files_are_not_enough(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "vocab.json").touch()
    with pytest.raises(UserError, match=r"Missing: config\.json, .*tokenizer_config\.json, merges"):
        downloads.find("clip")
    assert "Missing" in downloads.state("clip")


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:5] + b"!" + CONTENT[6:]])
def test_a_damaged_file_is_refused_at_use_and_fetched_again(server: Server, damage: bytes) -> None:
    server.path.write_bytes(damage)
    with pytest.raises(UserError, match=f"damaged .* should be {SHA}"):
        downloads.find("toy")
    assert "damaged" in downloads.state("toy")
    downloads.fetch("toy")
    assert downloads.find("toy") == [server.path]


# ---- fetched


def test_fetched_once_then_found(server: Server) -> None:
    assert downloads.state("toy") == "absent"
    assert downloads.fetch("toy") == server.path.parent
    assert server.path.read_bytes() == CONTENT
    assert downloads.find("toy") == [server.path]
    assert downloads.state("toy") == "present"
    downloads.fetch("toy")
    assert server.asked == ["bytes=0-"], "what is there is not fetched again"
    assert list(server.path.parent.iterdir()) == [server.path]


def test_a_broken_download_is_resumed_by_the_next_command(server: Server) -> None:
    server.stops = [downloads.CHUNK + 5000]
    with pytest.raises(RunError, match=r"toy\.bin broke off \(IncompleteRead.*resumes from .*part"):
        downloads.fetch("toy", retries=0)
    assert downloads.state("toy") == "absent"
    downloads.fetch("toy", retries=0)
    assert server.asked == ["bytes=0-", f"bytes={downloads.CHUNK}-"]
    assert server.path.read_bytes() == CONTENT


def test_a_broken_download_is_resumed_by_itself(server: Server) -> None:
    chunk = downloads.CHUNK
    server.stops = [chunk, 2 * chunk]
    downloads.fetch("toy")
    assert server.asked == ["bytes=0-", f"bytes={chunk}-", f"bytes={3 * chunk}-"]
    assert server.path.read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [SHA, ""], ids=["published", "unpublished"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_cannot_be_resumed_is_fetched_anew(
    server: Server, ranges: bool, sha256: str
) -> None:
    server.offer(sha256)
    server.ranges = ranges
    server.part.write_bytes(CONTENT if ranges else b"x" * 500)
    downloads.fetch("toy")
    assert server.path.read_bytes() == CONTENT


@pytest.mark.parametrize("begun", [b"", b"x" * 500])
def test_another_file_is_refused_and_thrown_away(server: Server, begun: bytes) -> None:
    server.offer("0" * 64)
    server.part.write_bytes(begun)
    with pytest.raises(UserError, match=r"does not match the known hash: expected 0000.* but got"):
        downloads.fetch("toy", retries=0)
    assert list(server.path.parent.iterdir()) == []


def test_without_a_published_checksum_that_of_the_first_fetch_holds(server: Server) -> None:
    server.offer("")
    downloads.fetch("toy")
    note = server.path.with_name("toy.bin.sha256")
    assert note.read_text() == SHA + "\n"
    assert downloads.find("toy") == [server.path]
    server.path.write_bytes(b"other")
    with pytest.raises(UserError, match="damaged or another"):
        downloads.find("toy")
    downloads.fetch("toy")
    assert server.path.read_bytes() == CONTENT
    note.unlink()
    for use in (downloads.find, downloads.fetch):
        with pytest.raises(UserError, match=f"If you trust this file, write {SHA} to {note}"):
            use("toy")


def test_offline_nothing_is_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*toy\.bin.*by hand"):
        downloads.fetch("toy")
    assert server.asked == []


def test_nobody_answers(server: Server) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(
        UserError, match=r"toy\.bin cannot be fetched \(Connection refused\)\. Check"
    ):
        downloads.fetch("toy", retries=0)
