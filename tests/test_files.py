"""Files and folders that are whole or as they were, whatever happens while they are written."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from d3po_bench.errors import RunError, UserError
from d3po_bench.runs.files import csv_bytes, write_atomically, write_folder, write_output, writing
from tests.damage import failing, listed

# ---- a file


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    for data in (b"one", b"2"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert listed(tmp_path) == ["a", "a/b.txt"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize(
    ("problem", "kind", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError, 1, "the disk is full"),
        (OSError(errno.EDQUOT, "Quota exceeded"), RunError, 1, "the disk quota is used up"),
        (OSError(errno.EFBIG, "File too large"), RunError, 1, "a limit on the size of files"),
        (OSError(errno.EIO, "Input/output error"), RunError, 1, "has an input/output error"),
        (OSError(errno.EROFS, "Read-only file system"), UserError, 2, "Read-only file system"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: bytes | None,
    problem: OSError, kind: type[UserError], code: int, said: str,
) -> None:  # fmt: skip
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(problem))
        with pytest.raises(UserError) as raised:
            write_atomically(path, b"new")
    assert type(raised.value) is kind
    assert raised.value.exit_code == code
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert listed(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_ctrl_c_in_a_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert listed(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_part_left_by_a_kill_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"half of a longer file")
    write_atomically(tmp_path / "file", b"new")
    assert listed(tmp_path) == ["file"]


def test_a_full_disk_in_somebody_elses_writer() -> None:
    problem = SafetensorError("Error while serializing: I/O error: No space left on device")
    with pytest.raises(RunError, match="the disk is full"), writing(Path("lora")):
        raise problem
    with pytest.raises(UserError, match="cannot be written: odd"), writing(Path("lora")):
        raise SafetensorError("odd")


# ---- the folder of the final weights


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "lora"

    def save(text: str) -> Callable[[Path], None]:
        def fill(part: Path) -> None:
            part.mkdir()
            (part / text).write_text(text)
            if text == "broken":
                raise OSError(errno.ENOSPC, "No space left on device")

        return fill

    with pytest.raises(RunError, match=r"lora cannot be written: the disk is full"):
        write_folder(folder, save("broken"))
    assert listed(tmp_path) == []
    (tmp_path / "lora.part").mkdir()  # as a kill leaves it
    (tmp_path / "lora.part" / "old").touch()
    write_folder(folder, save("one"))
    assert listed(tmp_path) == ["lora", "lora/one"]
    write_folder(folder, save("two"))
    assert listed(tmp_path) == ["lora", "lora/two"]


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", 'a"b', "a,b", "\r", "", "a\u2028b"])
def test_a_table_is_read_as_it_was_written(text: str) -> None:
    rows = [{"prompt": text, "kl": "1"}, {"prompt": "b", "kl": "2"}]
    written = csv_bytes(rows).decode()
    assert written.startswith("prompt,kl\n")
    assert list(csv.DictReader(io.StringIO(written, newline=""))) == rows


def test_an_output_replaces_its_like_alone(tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    for data in (b"prompt,rater\na,1\n", b"prompt,rater\nb,2\n"):
        write_output(path, data)
        assert path.read_bytes() == data
    for other in (b"SQLite format 3\0", b'{\n "kind": "pairs"\n}\n', b"my,own\n1,2\n"):
        path.write_bytes(other)
        with pytest.raises(
            UserError, match=r"votes\.csv is there already and holds something else"
        ):
            write_output(path, b"prompt,rater\n")
        assert path.read_bytes() == other
