"""Probability that a picture of the embedded model is right by GenEval's rules."""

import torch

from d3po_bench.types import Scorer
from eval.scorers._geneval import shipped, soft


def load(device: torch.device) -> Scorer:
    """The first judge, on `device`."""
    return shipped("geneval_soft", "first", soft, device)
