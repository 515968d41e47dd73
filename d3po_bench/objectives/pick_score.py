"""What people would choose by PickScore: compositional captions (arXiv:2305.01569)."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="captions", scorer="pick_score", sign=1)
