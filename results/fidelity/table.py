"""The table of docs/fidelity.md: `python results/fidelity/table.py [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from eval.analysis.runs import Run, find_runs, read_run
from eval.analysis.statistics import mean_told

WHAT = {
    "default": "D3PO, preset `quick`",
    "joint": "`log_prob=sum beta=76.8`: 0.1 on the joint density of 768 elements, as Eq. 14 reads",
    "no-clip": "`clip=none`",
    "one-sided-clip": "`clip=one_sided`",
    "reference-sampling": "`reference=sampling`",
    "update-per-timestep": "`update_every=timestep` (four times as many updates)",
    "own-noise": "`shared_noise=false`",
    "two-images": "two images of a prompt: 768 pairs from as many images, in as many updates",
    "adam": "`optimizer=adam`: the decay passes through Adam's normalisation",
    "one-of-two-copies": "half of the pairs, one pair per update: a copy that never synchronises",
    "dpok-gaussian": "DPOK, preset `quick`",
    "dpok-noise-mse": "`kl=noise_mse`",
    "dpok-none": "`kl=none`: DDPO",
    "dpok-fast": "DPOK, `learning_rate=6e-3`",
    "ddpo-clip": "DDPO, `clip_range=1e-4`, as published",
    "ddpo-batch-wise": "DDPO, `buffer=0`: advantages over the round, not the prompt",
}
"""Folder -> what was changed, in the order of the table."""


def end(run: Run, column: str) -> float:
    """Mean of a column of the last evaluation, training sampler."""
    return float(run.scores.loc["eta1"][column].iloc[-1])


def gain(run: Run) -> float:
    """Held-out kB at the end minus at the start."""
    return end(run, "score") - float(run.scores.loc["eta1"]["score"].iloc[0])


def row(folder: Path, text: str) -> str:
    """One line of the table."""
    runs = [read_run(path) for path in find_runs([folder])]
    gains = np.array([gain(run) for run in runs])
    kl, known = (np.mean([end(run, column) for run in runs]) for column in ("kl", "animal"))
    return f"| {text} | {len(runs)} | {mean_told(gains)} | {kl:.3f} | {known:.2f} |"


def table(folder: Path) -> str:
    """The whole table; a try that is not there is left out."""
    head = (
        "| changed | seeds | gain, kB (95 % interval) | KL at the end | recognised at the end |\n"
        "|---|--:|--:|--:|--:|"
    )
    rows = [row(folder / name, text) for name, text in WHAT.items() if (folder / name).exists()]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
