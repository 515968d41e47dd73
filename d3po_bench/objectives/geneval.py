"""Alignment on GenEval's six kinds of captions: right or wrong by an exact judge."""

from d3po_bench.types import Objective

OBJECTIVE = Objective(prompts="geneval", scorer="geneval", sign=1)
