"""What a run needs of `eval`, as one object that the command line hands in."""

from __future__ import annotations

from d3po_bench.training.tools import Tools
from eval import golden
from eval.measure import evaluate

TOOLS = Tools(
    scorer=golden.checked_scorer,
    evaluate=evaluate,
    fingerprint=golden.fingerprint,
    unchecked=golden.unchecked,
    note=golden.note,
)
