"""GenEval of the embedded model's pictures: whether all that the caption asks for is there."""

import torch

from d3po_bench.types import Scorer
from eval.scorers import _geneval


def load(device: torch.device) -> Scorer:
    """The first judge, on `device`."""
    return _geneval.shipped("geneval", "first", _geneval.hard, device)
