"""Incompressibility: animals whose JPEG is as large as possible (arXiv:2305.13301)."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="animals", scorer="jpeg_size", sign=1)
