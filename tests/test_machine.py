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
    assert machine.determine(torch.device(device), wanted) is on
    assert torch.are_deterministic_algorithms_enabled() is on
    assert torch.backends.cudnn.deterministic is on
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is (on and device == "cuda")


def test_the_switch_is_recorded_and_changes_no_byte_on_a_cpu(micro: Path, tmp_path: Path) -> None:
    settings = ("prompts_per_round=2", "sampling_steps=3", "dtype=fp32", "eval_prompts=2")
    bytes_of, told = {}, {}
    for name in ("auto", "--no-deterministic", "--deterministic"):
        main(
            ["run", "--method", "d3po", "--objective", "incompress", "--model", str(micro),
             "--preset", "official_code", "--rounds", "1", "--device", "cpu",
             *(f"--set={s}" for s in settings), *([] if name == "auto" else [name]),
             "--out", str(tmp_path / name)]
        )  # fmt: skip
        (run,) = (tmp_path / name).rglob("seed-0")
        told[name] = RunStore(run).provenance()
        written = ("metrics.jsonl", "eval.csv", "lora/pytorch_lora_weights.safetensors")
        bytes_of[name] = [(run / file).read_bytes() for file in written]
    assert {name: facts["deterministic"] for name, facts in told.items()} == {
        "auto": True, "--no-deterministic": False, "--deterministic": True
    }  # fmt: skip
    assert bytes_of["auto"] == bytes_of["--no-deterministic"] == bytes_of["--deterministic"]
    assert torch.backends.cpu.get_cpu_capability() in told["auto"]["cpu"]
