"""Published runs made again, two minutes each: `pytest -m slow tests/test_published.py`.

On the machine that made them they come out with the published bytes. On another processor, whose
rounding differs, their ends must lie where `d3po-bench verify --rerun` allows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from d3po_bench.cli import main
from d3po_bench.runs.run import RunFolder
from eval.verify.rerun import judge
from tests.commands import TINY

METHODS = ("d3po", "ddpo", "dpok", "preferred_images", "reward_weighted")
CELLS = [("incompress", m) for m in METHODS] + [("compress", "d3po"), ("aesthetic", "d3po")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("objective", "method"), CELLS)
def test_a_published_run_comes_out_again(
    objective: str, method: str, seed: int, tmp_path: Path
) -> None:
    main(
        ["run", "--method", method, "--objective", objective, "--seed-start", str(seed),
         "--out", str(tmp_path)]
    )  # fmt: skip
    place = Path(objective, method, f"seed-{seed}")
    verdict = judge(RunFolder(TINY / place), RunFolder(tmp_path / "tiny" / place), str(place))
    assert verdict.reproduced, verdict
