"""Alignment on GenEval's six kinds of captions: the judge's probability."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="geneval", scorer="geneval_soft", sign=1)
