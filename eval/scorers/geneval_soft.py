"""Probability that a picture of the embedded model is right by GenEval's rules."""

import torch

from d3po_bench.types import Scorer
from eval.scorers import _geneval


def load(device: torch.device) -> Scorer:
    """The first judge, on `device`."""
    return _geneval.shipped("geneval_soft", "first", _geneval.soft, device)
