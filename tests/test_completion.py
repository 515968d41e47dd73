"""What the shell offers after Tab, in the way in which bash asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from d3po_bench.cli import cli
from tests.commands import ROOT

ASK = """
import sys
from d3po_bench.cli import main
try:
    main([])
except SystemExit:
    print("torch" in sys.modules)
"""


def offered(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words, or `file` where the shell is to complete a path."""
    from click.shell_completion import BashComplete

    words = line.split(" ")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    text = BashComplete(cli, {}, "d3po-bench", "_D3PO_BENCH_COMPLETE").complete()
    kinds = [entry.split(",", 1) for entry in text.splitlines()]
    return [kind if kind == "file" else value for kind, value in kinds]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("d3po-bench ru", ["run"]),
        ("d3po-bench run --method dd", ["ddpo", "ddpo_kl"]),
        ("d3po-bench run --method grpo --set cl", ["clip_range="]),
        ("d3po-bench run --objective c", ["clip", "compress"]),
        ("d3po-bench run --objective ./my", ["file"]),
        ("d3po-bench run --model sd", ["sd15"]),
        ("d3po-bench run --preset q", ["quick"]),
        ("d3po-bench run --prompts an", ["animals"]),
        ("d3po-bench run --set learning", ["learning_rate="]),
        ("d3po-bench run --set micro", ["micro_batch="]),
        ("d3po-bench run --method dpok --set kl", ["kl=", "kl_weight="]),
        ("d3po-bench run --method nowhere --set be", []),
        ("d3po-bench run --set obj", []),
        ("d3po-bench evaluate x --scorers clip,an", ["clip,animal"]),
        ("d3po-bench table1 --objective im", ["image_reward"]),
    ],
)
def test_names_are_offered(line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(line, monkeypatch) == expected


def test_tab_is_quick_and_the_shells_script_is_there() -> None:
    def ran(how: str) -> str:
        env = {"COMP_WORDS": "d3po-bench run --set le", "COMP_CWORD": "3", "PYTHONPATH": str(ROOT),
               "_D3PO_BENCH_COMPLETE": how, "PATH": "/usr/bin:/bin"}  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, check=True, env=env
        ).stdout

    assert ran("bash_complete").split() == ["plain,learning_rate=", "False"]
    assert "_D3PO_BENCH_COMPLETE=zsh_complete d3po-bench" in ran("zsh_source")
