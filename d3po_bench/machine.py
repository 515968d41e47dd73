"""What of a machine decides bytes, for provenance."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torch.utils.deterministic

from d3po_bench.errors import UserError


def processors() -> dict[str, str]:
    """CPU and GPU by name; the CPU with the vector instructions that torch takes there."""
    kinds = {"cpu": f"{_cpu()} ({torch.backends.cpu.get_cpu_capability()})"}
    if torch.cuda.is_available():
        kinds["gpu"] = torch.cuda.get_device_name()
    return kinds


def _cpu() -> str:
    """The model's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def determine(device: torch.device, wanted: str) -> bool:
    """Switch the deterministic kernels of torch on or off, for this process.

    On CUDA, what has no such kernel ends in an error that names it, and cuBLAS takes a workspace
    of fixed size: it reads the variable at its first call, so this comes before any other work.

    Args:
        device: where the run computes.
        wanted: auto, on or off; auto is on for a CPU alone.

    Returns:
        Whether they are on.
    """
    on = wanted == "on" or (wanted == "auto" and device.type == "cpu")
    if on and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    # Filling fresh memory only helps to find reads of it, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False
    # What was sampled and what is learned would differ by more than rounding.
    torch.backends.cudnn.allow_tf32 = False
    return on


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
            f"torch cannot use the device {name!r} here. Leave --device out to take what there is."
        ) from problem
