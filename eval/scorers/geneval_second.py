"""GenEval by a second judge, never a reward: its gap to the first shows what fools that."""

import torch

from d3po_bench.types import Scorer
from eval.scorers._geneval import hard, shipped


def load(device: torch.device) -> Scorer:
    """The second judge, on `device`."""
    return shipped("geneval_second", "second", hard, device)
