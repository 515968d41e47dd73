"""Versions, machine and commit of a run."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from d3po_bench import machine
from d3po_bench.digests import short
from d3po_bench.runs.files import Row

PACKAGES = (
    "d3po-bench", "torch", "diffusers", "transformers", "peft", "numpy", "pillow", "safetensors",
)  # fmt: skip


CODE = ("d3po_bench", "baselines", "eval")
"""Folders whose files decide what a run does, and where a method or scorer is found by its file."""


def environment() -> Row:
    """Versions, machine and commit, for provenance.json."""
    return {
        "started": now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        **machine.processors(),
        "packages": packages(),
        **_commit(),
    }


def packages() -> dict[str, str | None]:
    """Installed versions of what numbers depend on; None for what is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> Row:
    """The commit this code runs from and whether it is changed; nothing for an installed wheel."""
    home = Path(__file__).resolve().parent.parent.parent
    try:
        top, head = _git(home, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        # What a run writes into the checkout is not a change of its code.
        known = _git(home, "status", "--porcelain", "--untracked-files=no")
        changes = known + _untracked(home)
        diff = short(changes + _git(home, "diff", "HEAD")) if changes.strip() else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    # An environment inside somebody's repository is not that repository.
    if Path(top) != home:
        return {}
    return {"commit": head, "dirty": diff is not None, **({"diff": diff} if diff else {})}


def _untracked(home: Path) -> str:
    """Names and digests of files of the code that git does not know: a method can be one."""
    known = _git(home, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
    paths = [home / name for name in sorted(known.split("\0")) if name]
    digests = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}
    return "".join(f"{path.relative_to(home)} {digests.get(path)}\n" for path in paths)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    # A changed file need not be UTF-8.
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="backslashreplace", check=True,
        timeout=10,
    ).stdout  # fmt: skip


def now() -> str:
    """The present time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
