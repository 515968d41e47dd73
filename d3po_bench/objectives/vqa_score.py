"""Alignment by a vision-language model's yes: compositional captions (arXiv:2404.01291)."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="captions", scorer="vqa_score", sign=1)
