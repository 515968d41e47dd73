"""GenEval of the embedded model's pictures: whether all that the caption asks for is there."""

import torch

from d3po_bench.types import Scorer
from eval.scorers._geneval import hard, shipped


def load(device: torch.device) -> Scorer:
    """The first judge, on `device`."""
    return shipped("geneval", "first", hard, device)
