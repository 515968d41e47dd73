"""Aesthetic: animals that the LAION aesthetic predictor likes (arXiv:2311.13231, section 5.1)."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="animals", scorer="aesthetic", sign=1)
