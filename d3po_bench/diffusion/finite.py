"""Stop a run at the first NaN or infinity, with the name of the tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from d3po_bench.errors import RunError

REMEDY = "Lower learning_rate, or use dtype fp32. What was written before this round is kept."


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a NaN or an infinity; empty if all are finite."""
    fine = [torch.isfinite(tensor).all() for tensor in tensors.values()]
    if not fine or bool(torch.stack(fine).all()):
        return ""
    return next(name for name, holds in zip(tensors, fine, strict=True) if not holds)


def require_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Stop before weights with a NaN or an infinity are used or saved.

    Raises:
        RunError: with the name of the tensor.
    """
    name = first_not_finite(weights)
    if name:
        require_finite(f"weights {name} after an optimizer step", weights[name])


def require_finite(name: str, values: Tensor) -> None:
    """Stop before NaN or infinity is scored or trained on.

    Args:
        name: what people call the tensor.
        values: of any shape.

    Raises:
        RunError: with the name, and how many are not finite.
    """
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise RunError(
            f"NaN or infinity in the {name}: {wrong} of {values.numel()} numbers. {REMEDY}"
        )
