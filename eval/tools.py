"""What a run needs of `eval`, as one object that the command line hands in."""

from __future__ import annotations

from pathlib import Path

from d3po_bench.config import RunConfig
from d3po_bench.training.tools import Tools
from eval import golden
from eval.measure import evaluate


def command(config: RunConfig, folder: Path) -> str:
    """The command line that makes that run."""
    from eval.analysis.tries import command as made  # which loads pandas

    return made(config, folder)


TOOLS = Tools(
    scorer=golden.checked_scorer,
    evaluate=evaluate,
    fingerprint=golden.fingerprint,
    unchecked=golden.unchecked,
    note=golden.note,
    command=command,
)
