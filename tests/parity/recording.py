"""The committed scores of the official packages, with the weights that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity import inputs

RECORDED = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Recording:
    """A case of `tests.parity.oracle`, its checkpoint drawn again from the seed."""

    checkpoint: Path
    vocabulary: Path
    sets: list[dict[str, Any]]

    def gaps(self, column: str, score: Callable[[Tensor, tuple[str, ...]], Tensor]) -> Tensor:
        """Absolute differences [sizes, prompts] of `score(images, prompts)` to the official."""
        rows = []
        for item in self.sets:
            found = score(inputs.images(*item["size"]), inputs.PROMPTS)
            rows.append((found - torch.tensor(item["scores"][column])).abs())
        return torch.stack(rows)


def regenerated(name: str, folder: Path) -> Recording:
    """Write the official-format checkpoint and vocabulary of a committed case into `folder`."""
    case = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    state = inputs.tensors(case["shapes"], case["seed"])
    if inputs.digest(state) != case["digest"]:
        raise ValueError(
            f"Expected the tensors that {name} was recorded with, got others from the same seed. "
            "Record it again: see tests/parity/oracle.py."
        )
    # What training leaves in published files, and no scorer needs.
    extra = {"temp": torch.tensor(0.07), "text_encoder.embeddings.position_ids": torch.arange(512)}
    checkpoint = folder / case["checkpoint"]
    torch.save({"model": state | extra, "epoch": 5}, checkpoint)
    vocabulary = inputs.bert_vocabulary(folder / "vocab.txt", case["words"])
    return Recording(checkpoint, vocabulary, case["sets"])
