"""Alignment by BLIP: compositional captions, the raw image-text match logit."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="captions", scorer="blip", sign=1)
