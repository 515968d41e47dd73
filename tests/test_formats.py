"""The formats of `report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d3po_bench.errors import UserError
from eval.analysis.gains import records
from eval.analysis.lm_eval import results
from eval.analysis.report import report
from eval.analysis.runs import read_groups
from eval.analysis.tables import Table, in_latex, number, text
from tests.commands import Command, refused
from tests.made_up import write_opposites, write_run


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on two opposite objectives; not to be changed."""
    return write_opposites(tmp_path_factory.mktemp("known") / "runs")


def test_latex_is_escaped_and_typeset() -> None:
    said = in_latex(r"a_b & 5 % -> -0.5 to +1 of `x=1_0` \ {~^} e-3 <i> | #$ †")
    assert said == (
        r"a\_b \& 5 \% $\to$ $-$0.5 to +1 of \texttt{x=1\_0} \textbackslash{} "
        r"\{\textasciitilde{}\textasciicircum{}\} e-3 \textless{}i\textgreater{} \textbar{} "
        r"\#\$ $\dagger$"
    )
    table = Table([{"a": "x|y", "b": -1.0}], {"a": text("a"), "b": number("b", ".1f")}, ("a",))
    assert table.latex().splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"a & b \\", r"\midrule",
        r"x\textbar{}y & $-$1.0 \\", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert r"| x\|y | -1.0 |" in table.markdown()


@pytest.mark.parametrize("name", ["gains", "contrast", "cost", "efficiency", "settings"])
def test_every_table_in_every_format(name: str, known: Path) -> None:
    found = json.loads(report([known], [name], "json"))[name]
    assert len(report([known], [name], "csv").splitlines()) == len(found) + 1
    latex = report([known], [name], "latex")
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    tables = latex.count(r"\begin{tabular}")
    assert len(rows) == len(found) + tables
    assert len(report([known], [name]).splitlines()) >= len(found) + 2


def test_lm_eval_has_the_harness_layout(known: Path) -> None:
    groups = read_groups([known])
    found = json.loads(results(groups))
    name = "incompress/ddpo"
    (record,) = (r for r in records(groups) if f"{r['objective']}/{r['method']}" == name)
    metrics = found["results"][name]
    assert metrics["gain,eta1"] == pytest.approx(record["gain"])
    half = 12.7062 * metrics["gain_stderr,eta1"]  # Student's t of one degree of freedom
    assert record["gain"] + half == pytest.approx(record["high"], rel=1e-5)
    assert (metrics["kl,eta1"], metrics["sample_len"]) == (pytest.approx(0.15), 4)
    assert "kl,eta0" not in metrics
    assert found["higher_is_better"]["compress/d3po"]["score"] is False
    assert found["n-samples"][name] == {"original": 4, "effective": 4}
    assert found["configs"][name]["learning_rate"] == "3e-05"
    assert found["group_subtasks"]["compress"] == ["compress/d3po", "compress/ddpo"]
    each = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    assert all(found[part].keys() == found["results"].keys() for part in each)


def test_lm_eval_of_one_seed_has_no_error_and_the_date_of_the_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    facts = {"ended": "2026-11-25T00:00:00+00:00", "commit": "abc"}
    (folder / "provenance.json").write_text(json.dumps(facts))
    found = json.loads(results(read_groups([tmp_path])))
    assert found["results"]["incompress/d3po"]["gain_stderr,eta1"] == "N/A"
    assert (found["date"], found["git_hash"]) == (1795564800.0, "abc")


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("a.html", "<!doctype html>"), ("a.tex", r"\begin{tabular}"), ("a.json", "{"),
        ("a.csv", "objective,"), ("a.md", "| objective"), ("a", "| objective"),
    ],
)  # fmt: skip
def test_a_file_holds_what_its_name_says(
    name: str, begins: str, known: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "new" / name
    assert command("report", str(known), "--out", str(out)).code == 0
    assert out.read_text().startswith(begins)


def test_a_format_that_is_asked_for_goes_before_the_name(
    known: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "a.html"
    form = ("--format", "json", "--table", "cost")
    assert command("report", str(known), "--out", str(out), *form).code == 0
    assert [*json.loads(out.read_text())] == ["cost"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "--table", "gains"], "The format html shows the runs themselves and no table"),
        (["runs", "--table", "gains", "--format", "lm-eval"], "The format lm-eval shows"),
        pytest.param(["runs", "--format", "pdf"], "pdf", marks=pytest.mark.slow),
        pytest.param(
            ["runs/tiny/compress/d3po/seed-0/samples"],
            "There are no run folders",
            marks=pytest.mark.slow,
        ),
        (["nowhere"], "There are no run folders"),
        (["runs", "broken"], "cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_nothing_written(
    arguments: list[str], said: str, known: Path, tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(known)
    write_run(tmp_path / "broken", "aesthetic").joinpath("eval.csv").write_bytes(b"\xff\n")
    (tmp_path / "page.html").write_text("mine")
    refused(command("report", *arguments, "--out", "page.html"), said)
    assert (tmp_path / "page.html").read_text() == "mine"
    refused(command("report", "runs", "--format", "html", "--out", "broken"), "cannot be written")


def test_a_table_without_a_row_says_what_it_needs(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(UserError, match="contrast has no row of these runs"):
        report([tmp_path], ["contrast"])
