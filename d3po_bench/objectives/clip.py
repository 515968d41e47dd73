"""Alignment by CLIP: compositional captions, 100 x cosine."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="captions", scorer="clip", sign=1)
