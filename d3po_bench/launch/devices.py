"""The device and number of threads of a run."""

from __future__ import annotations

import torch

from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import UserError


def device_of(name: str) -> torch.device:
    """The device of that name; auto takes the first accelerator there is.

    Raises:
        UserError: torch cannot use it here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as problem:
        raise UserError(
            f"Expected a device that torch can use, got {name!r}. Give --device auto, cpu or cuda."
        ) from problem


def threads_of(config: RunConfig, execution: Execution) -> int:
    """CPU threads of a run: two of the embedded model beat one on two threads."""
    if execution.threads:
        return execution.threads
    return 1 if config.model == "tiny" else torch.get_num_threads()
