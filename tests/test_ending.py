"""What `run` and `sweep` say when their runs have ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval.analysis.ending import ending
from eval.analysis.report import report
from tests.commands import ROOT, Command, run_of, seed_folder
from tests.made_up import add_columns, write_run


def rows(table: str, gap: str) -> list[list[str]]:
    """The cells of a table whose columns are that far apart."""
    return [[cell.strip() for cell in line.strip("| ").split(gap) if cell.strip()]
            for line in table.splitlines() if "---" not in line]  # fmt: skip


def folders(out: Path, *methods: str, seeds: int = 3, **settings: object) -> list[Path]:
    made = [write_run(out, method=m, seed=s, **settings)  # type: ignore[arg-type]
            for m in methods for s in range(seeds)]  # fmt: skip
    for folder in made:
        add_columns(folder, {}, drift="0.02")
    return made


def test_the_table_shows_the_numbers_of_report(tmp_path: Path) -> None:
    table, _ = ending(folders(tmp_path, "d3po", "ddpo"), tmp_path)
    head, *body = rows(table, "  ")
    assert head == ["method", "objective", "unit", "seeds", "base", "end", "gain (95 % interval)",
                    "drift", "recognised", "images", "seconds a seed"]  # fmt: skip
    assert body[0] == ["d3po", "incompress", "kB, larger is better", "3", "7.100",
                       "8.100", "+1.000 (+1.000 to +1.000)", "0.0200", "0.80 -> 0.80",
                       "640", "30"]  # fmt: skip
    shown = report([tmp_path]).split("\n\n")
    for line in (dict(zip(head, row, strict=True)) for row in body):
        for printed in shown:
            names, *cells = rows(printed, "|")
            same = next(c for c in cells if {line["method"], line["objective"]} <= {*c})
            for name in set(head) & set(names) - {"diversity"}:
                assert line[name] in same


def test_the_lines_say_where_things_are_and_what_is_next(tmp_path: Path) -> None:
    _, lines = ending(folders(tmp_path, "d3po"), tmp_path)
    place = tmp_path / "tiny" / "incompress"
    assert lines == [
        f"The LoRA of each run is in {place}/d3po/seed-N/lora",
        f"Tables, curves and pictures on one page: d3po-bench report {tmp_path} --out report.html",
        f"Runs are in {tmp_path}. Draw them: d3po-bench plot {tmp_path}",
    ]
    both = [*(place / "d3po").iterdir(), *folders(tmp_path, "ddpo")]
    _, lines = ending(both, tmp_path)
    assert lines[:2] == [
        f"The LoRA of each run is in {place}/METHOD/seed-N/lora",
        f"Is one better? d3po-bench compare {place}/d3po {place}/ddpo",
    ]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    (folder,) = folders(tmp_path / "a folder", "d3po", seeds=1)
    table, lines = ending([folder], tmp_path / "a folder")
    assert "+1.000 " in table
    assert "to" not in table.splitlines()[1].split()
    assert lines[0] == f"The LoRA is in {folder}/lora"
    assert "One seed has no interval." in lines[1]
    assert lines[-1].endswith(f"d3po-bench plot '{tmp_path}/a folder'")


def test_runs_without_a_table_have_ended_well(tmp_path: Path) -> None:
    made = folders(tmp_path / "other-images", "d3po", "ddpo", seeds=1)
    evaluation = made[1] / "eval.csv"
    evaluation.write_text(evaluation.read_text().replace("sea horse", "dog"))
    table, lines = ending(made, tmp_path)
    assert table == ""
    assert "not evaluated on the same images" in lines[0]
    (alone,) = folders(tmp_path / "alone", "d3po", seeds=1, eval_every=0)
    (alone / "eval.csv").unlink()
    table, lines = ending([alone], tmp_path)
    assert table == ""
    assert "eval_every=0" in lines[0]
    assert lines[1:] == [f"The LoRA is in {alone}/lora"]  # `report` and `plot` would refuse it


def test_a_run_ends_with_its_table_on_stdout(command: Command, micro: Path) -> None:
    done = command(*run_of(micro, rounds=1, eval_every=1))
    assert [row[:4] for row in rows(done.out, "  ")] == [
        ["method", "objective", "unit", "seeds"],
        ["d3po", "incompress", "kB, larger is better", "1"],
    ]
    assert f"The LoRA is in {seed_folder(Path('runs'), micro)}/lora" in done.err.splitlines()


LATE = """
import sys
from d3po_bench.launch import grid, launch
from eval.tools import TOOLS
print(*({"pandas", "matplotlib"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_pandas_and_matplotlib_come_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "\n"
