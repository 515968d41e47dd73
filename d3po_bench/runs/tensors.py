"""A checkpoint as a file: its tensors and facts, and the checksum of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from d3po_bench.runs.files import Row


def digest_of(tensors: Mapping[str, Tensor], facts: str) -> str:
    """SHA-256 of everything that a checkpoint holds; the tensors are contiguous, on the CPU."""
    whole = hashlib.sha256(facts.encode())
    for name, t in sorted(tensors.items()):
        whole.update(f"\0{name} {t.dtype} {tuple(t.shape)}\0".encode())
        whole.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def packed(tensors: Mapping[str, Tensor], facts: Row) -> bytes:
    """A file of tensors and facts, as `read_tensors` reads it."""
    from safetensors.torch import save

    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(facts)
    known = {"facts": text, "sha256": digest_of(contiguous, text)}
    # One entry: safetensors writes several in an order that differs from call to call.
    return save(contiguous, metadata={"checkpoint": json.dumps(known)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Row]:
    """Tensors and facts of a checkpoint.

    Raises:
        ValueError: the file is not what was written; its readers raise others.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        known = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if known["sha256"] != digest_of(tensors, known["facts"]):
        raise ValueError("its checksum is another or is missing")
    facts: Row = json.loads(known["facts"])
    return tensors, facts
