"""A layer with a LoRA as one operation, against peft's own layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from d3po_bench.models.low_rank import NARROW, OneProduct, quicken


def computed(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, and gradients of the inputs and of both matrices of the LoRA."""
    x = x.clone().requires_grad_()
    for weight in layer.parameters():
        weight.grad = None
    # A slice of something larger, as the picture's tokens are of those of picture and text.
    y = layer(x[:, 1:])
    (y.float() ** 2).sum().backward()
    found = [y, x.grad, *(w.grad for w in layer.parameters() if w.requires_grad)]
    return [tensor.detach() for tensor in found if tensor is not None]


@pytest.mark.parametrize("width", [16, NARROW + 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 1e-3)]
)
def test_a_layer_computes_as_that_of_peft(dtype: str, tolerance: float, width: int) -> None:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    network = nn.Sequential(nn.Linear(width, width + 8)).to(kind).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    layer: Any = inject_adapter_in_model(config, network)[0]
    for weight in layer.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape) / 10
    x = torch.randn(2, 5, width, dtype=kind)
    assert type(layer) is Linear
    theirs = computed(layer, x)
    quicken(network)
    assert type(layer) is OneProduct
    ours = computed(layer, x)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs] == [kind] * 2 + [torch.float32] * 2
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).float().norm() <= tolerance * other.float().norm()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("other", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_layers_stay_as_they_are(other: dict[str, bool]) -> None:
    config = LoraConfig(r=2, target_modules=["0"], **other)
    network = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)))
    quicken(network)
    assert type(network[0]) is Linear
