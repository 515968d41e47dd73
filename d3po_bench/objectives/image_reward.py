"""Alignment by ImageReward: compositional captions (arXiv:2304.05977)."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="captions", scorer="image_reward", sign=1)
