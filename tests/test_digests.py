"""Checksums of files, and short names of texts."""

from __future__ import annotations

from pathlib import Path

from d3po_bench.digests import sha256_of, short


def test_a_text_has_a_short_name() -> None:
    assert short("a") != short("b")
    assert len(short("a")) == 12


def test_a_file_that_changes_has_another_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    empty = sha256_of(path)
    assert empty == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    path.write_bytes(b"one more byte")
    assert sha256_of(path) != empty
