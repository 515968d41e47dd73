"""d3po-bench: fine-tune text-to-image diffusion models from preferences and rewards.

    import d3po_bench as db

    runs = db.run(method="d3po", objective="incompress", seeds=2)
    runs.table()

See docs/python.md. What is listed in `__all__` is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3po_bench.api import Runs, load_pipeline, load_runs, run
    from d3po_bench.errors import RunError, UserError
    from d3po_bench.types import Method, Objective, Scorer

__version__ = "0.1.0"
__all__ = [
    "Method", "Objective", "RunError", "Runs", "Scorer", "UserError", "load_pipeline", "load_runs",
    "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What the package offers, from where it is."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from d3po_bench import api

    return getattr(api, name)
