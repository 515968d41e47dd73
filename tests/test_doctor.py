"""`doctor` and `weights`: honest about what is here, quick and clear about what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from d3po_bench import cli
from d3po_bench.errors import UserError
from eval import doctor, golden
from tests.commands import Command, refused


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path / "cache"))


def said(*arguments: str) -> str:
    found = CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)
    assert found.exit_code == 0
    return found.output


def test_doctor_says_what_is_here_and_what_is_not(tmp_path: Path) -> None:
    text = said("doctor")
    assert "torch" in text
    assert str(tmp_path / "cache") in text
    assert "absent (`d3po-bench weights fetch clip`)" in text
    for name in ("jpeg_size", "clip:tiny", "aesthetic:tiny"):
        assert re.search(rf"^  {name} +gives its golden scores", text, re.MULTILINE)
    assert "missing: pip install" not in text, "the tests need every package"
    assert "weights fetch clip laion_aesthetic" in text


def test_record_writes_golden_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "golden.json"
    path.write_text("{}")
    monkeypatch.setattr(golden, "GOLDEN", path)
    golden.recorded.cache_clear()
    text = said("doctor", "--record")
    golden.recorded.cache_clear()
    assert "jpeg_size: recorded for code" in text
    assert "clip:official: not recorded. Missing: config.json" in text
    assert '"jpeg_size"' in path.read_text()
    path.write_text(before := path.read_text().replace("1", "2"))
    golden.recorded.cache_clear()
    again = said("doctor", "--record")
    golden.recorded.cache_clear()
    assert "jpeg_size: on record for code" in again
    assert json.loads(path.read_text())["jpeg_size"] == json.loads(before)["jpeg_size"]


def test_weights_list_names_addresses_and_checksums() -> None:
    text = said("weights", "list")
    assert "https://huggingface.co/openai/clip-vit-large-patch14/resolve/" in text
    assert "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0" in text


def test_fetch_offline_and_fetch_unknown() -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        said("weights", "fetch", "laion_aesthetic")
    with pytest.raises(UserError, match=r"No checkpoint is called 'clipp'\. Did you mean"):
        said("weights", "fetch", "clipp")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--method", "d3po", "--objective", "aesthetic", "--model", "sd15"],
        ["evaluate", "tiny", "--scorers", "clip:official"],
    ],
)
def test_a_machine_without_weights_is_told_in_one_line(
    arguments: list[str], command: Command
) -> None:
    done = command(*arguments, "--out", "out")
    refused(done, "GB", "d3po-bench weights fetch clip")
    assert not list(Path().glob("out/**/*.jsonl"))


def test_only_scorers_are_checked_each_with_the_weights_that_it_has() -> None:
    names = doctor.checkable()
    assert not [name for name in names if name.startswith("_")]
    assert {"animal:tiny", "animal:tiny2", "clip:tiny2", "clip:official"} <= {*names}
    assert "animal:official" not in names
