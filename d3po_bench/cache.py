"""The folder of what can be fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The cache: D3PO_BENCH_CACHE, or d3po-bench/ in the user's cache folder."""
    if own := os.environ.get("D3PO_BENCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d3po-bench"
