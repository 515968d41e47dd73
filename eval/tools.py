"""What a run needs of `eval`, as one object that the command line hands in."""

from __future__ import annotations

from d3po_bench.training.tools import Tools
from eval import selfcheck
from eval.measure import evaluate

TOOLS = Tools(
    scorer=selfcheck.checked_scorer,
    evaluate=evaluate,
    fingerprint=selfcheck.fingerprint,
    unchecked=selfcheck.unchecked,
    note=selfcheck.note,
)
