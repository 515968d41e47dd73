"""The tries behind normalcy's settings: `python results/search/feedback/table.py`.

`options` of tries.csv are those of `results/feedback/rounds.py normalcy`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def table(path: Path) -> str:
    """A row for each try: the rate of every round."""
    lines = ["| options | seed | normalcy rate, round 0, 1, ... |", "|---|--:|---|"]
    tries = pd.read_csv(path).groupby(["options", "seed"], sort=False)["good"]
    for (options, seed), good in tries:
        lines.append(f"| `{options}` | {seed} | {' '.join(f'{rate:.3f}' for rate in good)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(__file__).parent / "tries.csv"))
