"""What training did to GenEval's share right, and what a gradient's signal is, by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from results import alignment, gradients
from tests.made_up import write_run

GAINS = {
    "d3po": (0.1, 0.2, 0.15), "ddpo": (0.1, 0.2, 0.15), "d3po_best_of_k": (0.1, -0.1, 0.05),
}  # fmt: skip
UNSEEN = """\
method,seed,sampler,geneval,geneval_second,vendi
no fine-tune,,eta1,0.5,0.6,1.5
no fine-tune,,eta0,0.4,0.5,1.4
"""


def add_rewards(folder: Path, reward: float) -> None:
    """The same mean reward in every round, and what a round cost."""
    for name, more in (
        ("metrics", {"score_mean": reward, "scorer_calls": 64, "unet_forwards": 7,
                     "unet_backwards": 3}),
        ("timing", {"cpu": 2.0}),
    ):  # fmt: skip
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) | more for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def _published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three seeds of two methods; with eta 0 twice the gain, by the second judge half of it."""
    rows = []
    for method, gains in GAINS.items():
        for seed, gain in enumerate(gains):
            folder = write_run(tmp_path, "geneval_soft", method, seed, model="tiny2")
            lines = (folder / "eval.csv").read_text().splitlines()
            text = [f"{lines[0]},geneval,geneval_second,drift"]
            for line in lines[1:]:
                number, sampler, *_ = line.split(",")
                share = 0.3 + gain * (number == "10") * (2 if sampler == "eta0" else 1)
                text.append(f"{line},{share},{0.3 + (share - 0.3) / 2},0.01")
            (folder / "eval.csv").write_text("\n".join(text) + "\n")
            add_rewards(folder, 0.4 + gain)
            rows += [
                f"{method},{seed},eta1,{0.5 + gain},0.6,1.5",
                f"{method},{seed},eta0,0.4,0.5,1",
            ]
    base = [f"{seed},{n},0.4" for seed in range(3) for n in range(5, 11)]
    (tmp_path / "rewards.csv").write_text("\n".join(["seed,round,base", *base]) + "\n")
    monkeypatch.setattr(alignment, "REWARDS", tmp_path / "rewards.csv")
    (tmp_path / "unseen.csv").write_text(UNSEEN + "\n".join(rows) + "\n")
    monkeypatch.setattr(alignment, "HOME", tmp_path)
    monkeypatch.setattr(alignment, "UNSEEN", tmp_path / "unseen.csv")
    alignment.runs.cache_clear()
    yield
    alignment.runs.cache_clear()


@pytest.mark.usefixtures("_published")
def test_gains_by_hand() -> None:
    table = alignment.table()
    rows = [{name: show(r) for name, show in table.columns.items()} for r in table.records]
    assert [(r["captions"], r["sampler"], r["method"]) for r in rows[:2]] == [
        ("held out", "eta 1", "d3po"), ("held out", "eta 1", "d3po_best_of_k"),
    ]  # fmt: skip
    assert rows[2]["right"] == "0.300 -> 0.450"
    test = ttest_1samp(GAINS["ddpo"], 0)
    low, high = test.confidence_interval()
    assert rows[2]["gain (95 % interval)"] == f"+0.150 ({low:+.3f} to {high:+.3f})"
    # both samplers have this p, and of four tests and of two it is the smallest
    assert [r["p, Holm"] for r in (rows[2], rows[0])] == [f"{n * test.pvalue:.2g}" for n in (4, 2)]
    # both captions gain alike, so captions add nothing to the interval
    assert rows[2]["gain on other captions (95 % interval)"] == rows[2]["gain (95 % interval)"]
    assert rows[5]["right"] == "0.300 -> 0.600"
    assert rows[5]["gain by the second judge (95 % interval)"].startswith("+0.150 (")
    assert rows[5]["first judge minus second (95 % interval)"].startswith("+0.150 (")
    assert (rows[8]["right"], rows[8]["p, Holm"]) == ("0.500 -> 0.650", "")
    assert rows[8]["gain on other captions (95 % interval)"] == ""
    assert rows[11]["right"] == "0.400 -> 0.400"
    (eta1, eta0) = alignment.claims().splitlines()
    assert eta1.startswith("- **eta 1:** Not shown to change: d3po, d3po_best_of_k, ddpo (p at ")
    assert eta0.startswith("- **eta 0:** Not shown to change: d3po, d3po_best_of_k, ddpo (p at ")

    (_, ours, theirs) = alignment.cost().records
    assert ours["least"] == pytest.approx(-0.1)
    assert (theirs["reward_before"], theirs["reward"]) == pytest.approx((0.4, 0.55))
    assert (theirs["drift"], theirs["vendi_before"]) == (0.01, 1.5)


def test_how_far_gradients_agree_by_hand() -> None:
    noise, signal = torch.eye(4), torch.ones(4, 1)
    assert gradients.agreement(noise) == 0
    assert gradients.agreement(signal) == 1
    # A common part of length 1 and one of its own of length 1: half of the squared length.
    assert gradients.agreement(torch.cat([noise, signal], 1)) == 0.5
    assert gradients.agreement(torch.tensor([[1.0, 0], [-1, 0]])) == -1


def test_table_1_is_compared_with_the_rival_seed_by_seed_where_seeds_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3PO has seeds of its own, and DDPO those of the rival."""
    scores = {
        "no-fine-tune": (0, 0), "d3po_best_of_k-0": (1, 2), "d3po_best_of_k-1": (2, 4),
        "ddpo-0": (2, 3.5), "ddpo-1": (2.5, 5), "d3po-5": (1, 0), "d3po-6": (0, 2),
    }  # fmt: skip
    (tmp_path / "rows").mkdir()
    for name, pair in scores.items():
        rows = [f"eta1,p,{i},{score}" for i, score in enumerate(pair)]
        (tmp_path / "rows" / f"{name}.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    monkeypatch.setattr(alignment, "TABLE1", tmp_path)
    found = alignment.compared()
    paired = ttest_rel([2.75, 3.75], [1.5, 3.0])
    apart = ttest_ind([0.5, 1.0], [1.5, 3.0], equal_var=False)
    for method, test, mean in (("ddpo", paired, 1.0), ("d3po", apart, -1.5)):
        got = found[method, "clip"]
        assert (got.mean, got.p) == pytest.approx((mean, test.pvalue))
    assert alignment.to_rival().cells()[0] == ["method", "clip"]


HEAD = "sampler,prompt,index,clip"
