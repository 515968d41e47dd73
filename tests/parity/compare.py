"""Our scorers on what `tests.parity.oracle` wrote: the largest difference of each column.

    python -m tests.parity.compare FOLDER

Exits 1 if one is above 1e-5.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.scorers import blip, image_reward
from tests.parity import inputs

LIMIT = 1e-5
CPU = torch.device("cpu")

Columns = Callable[[Tensor, tuple[str, ...]], dict[str, Tensor]]


def ours(scorer: str, checkpoint: Path, vocabulary: Path) -> Columns:
    """Our scorer with an official checkpoint, as columns [N] of images and prompts."""
    if scorer == "blip":
        return blip.official(checkpoint, vocabulary, CPU).columns
    reward = image_reward.official(checkpoint, vocabulary, CPU)
    return lambda images, prompts: {"image_reward": reward(images, prompts)}


def differences(case: dict[str, Any], columns: Columns) -> dict[str, float]:
    """Column -> largest absolute difference to the official scores, over all sizes of images."""
    worst: dict[str, float] = {}
    for item in case["sets"]:
        found = columns(inputs.images(*item["size"]), inputs.PROMPTS)
        for name, values in item["scores"].items():
            gap = (found[name].double() - torch.tensor(values, dtype=torch.float64)).abs().max()
            worst[name] = max(worst.get(name, 0.0), gap.item())
    return worst


def spread(case: dict[str, Any], column: str) -> float:
    """Standard deviation of the official scores, to hold the differences against."""
    values = [v for item in case["sets"] for v in item["scores"][column]]
    return torch.tensor(values).std().item()


def main(folder: Path) -> int:
    """Print a line for each case and column; 1 if a difference is too large."""
    failed = 0
    for path in sorted(folder.glob("*.json")):
        case = json.loads(path.read_text(encoding="utf-8"))
        if case.get("scorer") not in ("blip", "image_reward"):
            continue
        columns = ours(case["scorer"], folder / case["checkpoint"], folder / case["vocabulary"])
        for column, gap in differences(case, columns).items():
            failed |= not gap <= LIMIT
            verdict = "equal" if gap <= LIMIT else f"ABOVE {LIMIT}"
            deviation = spread(case, column)
            print(
                f"{path.stem:18} {column:15} {gap:.1e}  of a spread of {deviation:.3f}  {verdict}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
