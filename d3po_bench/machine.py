"""What of a machine decides bytes, for provenance."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch


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


def digest(text: str) -> str:
    """Twelve hex digits that name a text, such as the changes to a commit."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
