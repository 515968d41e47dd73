"""Deterministic kernels, and what provenance says of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from d3po_bench import machine
from d3po_bench.cli import main
from d3po_bench.runs.store import RunStore
from tests.commands import run_of, seed_folder, written


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("device", "wanted", "on"),
    [("cpu", "auto", True), ("cuda", "auto", False), ("mps", "auto", False), ("cpu", "off", False),
     ("cpu", "on", True), ("cuda", "on", True)],
)  # fmt: skip
def test_kernels_are_deterministic_by_default_on_a_cpu(
    device: str, wanted: str, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cudnn.allow_tf32 = True
    assert machine.determine(torch.device(device), wanted) is on
    assert torch.are_deterministic_algorithms_enabled() is on
    assert torch.backends.cudnn.deterministic is on
    assert torch.backends.cudnn.allow_tf32 is False
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is (on and device == "cuda")


def test_the_switch_is_recorded_and_changes_no_byte_on_a_cpu(micro: Path, tmp_path: Path) -> None:
    flags = {"auto": (), "off": ("--no-deterministic",), "on": ("--deterministic",)}
    runs = {name: seed_folder(tmp_path / name, micro) for name in flags}
    for name, flag in flags.items():
        main(run_of(micro, "--out", tmp_path / name, *flag, rounds=1, eval_every=1))
    told = {name: RunStore(run).provenance() for name, run in runs.items()}
    recorded = {name: facts["deterministic"] for name, facts in told.items()}
    assert recorded == {"auto": True, "off": False, "on": True}
    assert written(runs["auto"]) == written(runs["off"]) == written(runs["on"])
    assert torch.backends.cpu.get_cpu_capability() in told["auto"]["cpu"]
