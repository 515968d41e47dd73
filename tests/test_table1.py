"""Table 1: trained or taken, paired with the base model, marked where the judge was the teacher."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from d3po_bench import cli
from d3po_bench.errors import UserError
from d3po_bench.feedback import comparisons
from d3po_bench.feedback.rounds import Pool
from eval.analysis import table1

PAPERS = Path(__file__).parent.parent / "results" / "paper.csv"


def write_rows(out: Path, name: str, clip: float, reward: float, prompts: str = "ab") -> None:
    """Two prompts, both samplers; the second prompt scores 1 more."""
    lines = ["steps,guidance,size,sampler,prompt,index,clip,image_reward,kl,weights"]
    for sampler in ("eta1", "eta0"):
        for number, prompt in enumerate(prompts):
            other = 50 * (sampler == "eta0")
            lines.append(
                f"10,5.0,32x32,{sampler},{prompt},0,{clip + number + other},{reward},0.1,x"
            )
    path = out / "rows" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_rows(tmp_path, "no-fine-tune", 30, 0)
    write_rows(tmp_path, "d3po-0", 32, 0.5)
    write_rows(tmp_path, "d3po-1", 33, 0.7)
    write_rows(tmp_path, "ddpo-0", 29, 0.1)
    signal = {"objective": "image_reward", "column": "image_reward"}
    (tmp_path / "signal.json").write_text(json.dumps(signal))
    return tmp_path


def test_the_table_by_hand(out: Path) -> None:
    text = table1.write(out)
    with (out / "table1.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["no fine-tune", "d3po", "ddpo"]
    # base 30 and 31: mean 30.5; seeds end 32.5 and 33.5, so 2 and 3 more: +- 12.7062 * 0.5
    assert rows["no fine-tune"]["clip"] == "30.500"
    assert rows["d3po"]["clip"] == "33.000 (+2.500, -3.853 to +8.853)"
    assert rows["d3po"]["image_reward"].endswith("†")
    assert not rows["d3po"]["clip"].endswith("†")
    assert not rows["no fine-tune"]["image_reward"].endswith("†")
    assert rows["ddpo"]["clip"] == "29.500 (-1.000)"
    assert rows["d3po"]["clip, paper"] == "31.9"
    assert rows["ddpo"]["clip, paper"] == ""
    assert rows["d3po"]["seeds"] == "2"
    assert "Trained on the objective image_reward" in text
    assert (out / "table1.md").read_text() == text + "\n"
    tex = (out / "table1.tex").read_text()
    assert tex.startswith("\\begin{tabular}{l")
    assert tex.count("\\\\") == 4
    assert "image\\_reward" in tex


def test_the_judge_that_gave_the_reward_is_marked_and_its_kinds_are_left_out(out: Path) -> None:
    """A kind's score is there for its own prompts alone."""
    for path in (out / "rows").glob("*.csv"):
        head, *lines = path.read_text().splitlines()
        more = ("0.5,,0.5", "1,1,0.25")
        rows = [f"{line},{more[i % 2]}" for i, line in enumerate(lines)]
        named = "geneval,geneval_counting,geneval_second"
        path.write_text("\n".join([f"{head},{named}", *rows]) + "\n")
    signal = {"objective": "geneval_soft", "column": "geneval_soft"}
    (out / "signal.json").write_text(json.dumps(signal))
    found = written(out)["d3po"]
    assert "geneval_counting" not in found
    assert found["geneval"].endswith("†")
    assert not found["geneval_second"].endswith("†")


def test_rows_of_any_other_method_follow_the_papers(out: Path) -> None:
    write_rows(out, "awm-0", 31, 0.2)
    write_rows(out, "d3po_best_of_k-0", 32, 0.5)
    assert list(written(out)) == ["no fine-tune", "d3po", "ddpo", "awm", "d3po_best_of_k"]


# ---- raters' first choices


def write_shares(
    out: Path, seed: int, shares: dict[str, float], raters: Pool = "people", tail: str = ""
) -> Path:
    """A file as `feedback choices --out` writes it, of pictures drawn by each model."""
    path = out / "choices" / f"seed-{seed}.csv"
    rows = [
        comparisons.Share(source=f"d3po/drawn/{m}{tail}/pictures/eta1", share=s, low=0, high=1,
                   raters=raters)
        for m, s in shares.items()
    ]  # fmt: skip
    comparisons.write_choices(path, rows)
    return path


def written(out: Path) -> dict[str, dict[str, str]]:
    """The table's cells by row and column."""
    table1.write(out)
    with (out / "table1.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_first_choices_are_means_over_files(out: Path) -> None:
    write_shares(out, 0, {"no-fine-tune": 0.3, "d3po": 0.7}, tail="-0")
    write_shares(out, 1, {"d3po": 0.5, "no-fine-tune": 0.5}, tail="-1")
    rows = written(out)
    # two seeds, so t = 12.7062, times 10, cut where shares end
    assert rows["d3po"]["first choices"] == "60.0 % (0.0 to 100.0)"
    assert rows["no fine-tune"]["first choices"] == "40.0 % (0.0 to 100.0)"
    assert rows["ddpo"]["first choices"] == ""
    names = list(rows["d3po"])
    assert names[-2:] == ["first choices", "preferred by people, paper"]
    assert "how often people preferred" in (out / "table1.md").read_text()
    assert "| 60.0 % (0.0 to 100.0) | 55.7 % |" in (out / "table1.md").read_text()
    assert "60.0 \\% (0.0 to 100.0) & 55.7 \\%" in (out / "table1.tex").read_text()


def test_the_heading_says_that_raters_are_simulated(out: Path) -> None:
    write_shares(out, 0, {"no-fine-tune": 0.25, "ddpo": 0.75}, "simulated")
    rows = written(out)
    assert rows["ddpo"]["first choices, simulated raters"] == "75.0 %"
    assert rows["d3po"]["first choices, simulated raters"] == ""  # though all lies below d3po/
    for name in ("table1.md", "table1.tex"):
        assert "first choices, simulated raters" in (out / name).read_text()
    assert "simulated raters, not people," in (out / "table1.md").read_text()


def test_without_choices_there_is_no_column(out: Path) -> None:
    before = written(out)
    (out / "choices").mkdir()
    assert written(out) == before
    assert not [name for name in before["d3po"] if "choices" in name]


TWO = {"no-fine-tune": 0.4, "d3po": 0.6}


def test_choices_that_cannot_be_one_column_are_refused(out: Path) -> None:
    write_shares(out, 0, TWO)
    write_shares(out, 1, TWO, "simulated")
    with pytest.raises(UserError, match="mix raters: "):
        table1.write(out)
    write_shares(out, 1, {"no-fine-tune": 0.4, "ddpo": 0.6})
    with pytest.raises(UserError, match=r"compare different models: no-fine-tune, ddpo"):
        table1.write(out)
    (out / "choices" / "seed-1.csv").unlink()
    write_shares(out, 0, {"no-fine-tune": 0.4, "dpok": 0.6})
    with pytest.raises(UserError, match=r"name dpok, which is not in the table"):
        table1.write(out)
    path = write_shares(out, 0, TWO)
    path.write_text(path.read_text().replace("no-fine-tune/", "d3po-1/"))
    with pytest.raises(UserError, match=r"names d3po twice"):
        table1.write(out)


def test_malformed_choices_stop_before_training(out: Path) -> None:
    path = write_shares(out, 0, TWO)
    path.write_text(path.read_text().replace("0.6", "1.6"))
    done = CliRunner().invoke(cli.cli, ["table1", "--out", str(out)])
    assert isinstance(done.exception, UserError)
    assert "is not from 0 to 1" in str(done.exception)
    assert not (out / "runs").exists()


def test_held_out_prompts_that_would_be_learned_stop_before_training(tmp_path: Path) -> None:
    arguments = ["table1", "--set", "prompts=captions-held-out", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.cli, arguments)
    assert "so they are not held out" in str(done.exception)
    assert not [*tmp_path.iterdir()]


def test_redrawing_gives_the_same_bytes(out: Path) -> None:
    table1.write(out)
    names = ("table1.csv", "table1.md", "table1.tex")
    before = [(out / name).read_bytes() for name in names]
    done = CliRunner().invoke(cli.cli, ["table1", "--redraw", "--out", str(out)])
    assert done.exit_code == 0
    assert [(out / name).read_bytes() for name in names] == before


def test_other_prompts_are_not_compared(out: Path) -> None:
    write_rows(out, "dpok-0", 29, 0.1, prompts="ac")
    with pytest.raises(UserError, match=r"rows of dpok-0 .* are of other prompts"):
        table1.write(out)


def test_a_table_needs_the_base_model(tmp_path: Path) -> None:
    (tmp_path / "signal.json").write_text("{}")
    with pytest.raises(UserError, match="has no rows of no-fine-tune"):
        table1.write(tmp_path)


def test_the_papers_numbers_are_the_papers() -> None:
    printed = pd.read_csv(PAPERS)
    printed = printed[printed["source"] == "Table 1"]
    names = {"no fine-tune": "No fine-tune", "preferred_images": "Preferred images",
             "reward_weighted": "Reward Weighted", "d3po": "D3PO"}  # fmt: skip
    for name, numbers in table1.PAPER.items():
        rows = printed[printed["item"] == names[name]]
        assert tuple(float(v) for v in rows["value"]) == numbers
    assert len(printed) == 16


def test_end_to_end_trains_scores_and_goes_on(micro: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\n")
    arguments = [
        "table1", "--model", str(micro), "--preset", "quick", "--objective", "incompress",
        "--scorers", "jpeg_size", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    for change in (f"prompts={prompts}", "rounds=1", "sampling_steps=3", "skip_steps=0",
                   "prompts_per_round=2", "images_per_prompt=2", "units_per_update=2",
                   "eval_every=0"):  # fmt: skip
        arguments += ["--set", change]
    done = CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    out = tmp_path / "out"
    stamp = {p: p.stat().st_mtime_ns for p in out.glob("scoring/*/pieces/*.csv")}
    assert len(list(out.glob("rows/*.csv"))) == 6
    assert len(stamp) == 6  # that of training alone
    assert "| preferred_images | 1 |" in (out / "table1.md").read_text()
    assert "†" in (out / "table1.md").read_text()
    again = CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)
    assert again.output.endswith(done.output[-200:])
    assert {p: p.stat().st_mtime_ns for p in stamp} == stamp
    taken = CliRunner().invoke(
        cli.cli,
        ["table1", str(out / "runs"), "--model", str(micro), "--objective", "compress",
         "--out", str(tmp_path / "other")],
    )  # fmt: skip
    assert isinstance(taken.exception, UserError)
    assert "is a run of" in str(taken.exception)
