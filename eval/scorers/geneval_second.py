"""GenEval by a second judge, never a reward: its gap to the first shows what fools that."""

import torch

from d3po_bench.types import Scorer
from eval.scorers import _geneval


def load(device: torch.device) -> Scorer:
    """The second judge, on `device`."""
    return _geneval.shipped("geneval_second", "second", _geneval.hard, device)
