"""Bytes that a model takes of a card, counted on the meta device: no weights, no card, seconds.

Counted: weights in the precision that they lie in; the LoRA, its gradients and the optimizer's
moments in float32; and the most bytes that are alive at a time in a forward and backward pass, in
a pass without gradients and in decoding, as torch allocates them. A batch takes as much for each.
What a round keeps, such as its chains, lies in host memory.
Attention is counted as the fused kernels of a card compute it, which keep no matrix of tokens by
tokens.

Not counted, and left room for by `ROOM` and `SHARE`: what the allocator cannot fill, workspaces
of cuBLAS and cuDNN, what `compile` keeps beside, scorers. Text encoders leave the card when the
prompts are encoded. Full training is counted as if it computed in float32, which is more than it
takes under autocast.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d3po_bench.models.adapters import DTYPES, DiffusersModel
from d3po_bench.types import Conditions

META = torch.device("meta")

ROOM = 3 * 10**9
"""Bytes that are left free: libraries' workspaces, and a scorer."""

SHARE = 0.9
"""Of the rest, the allocator fills so much."""

FEW = 2
"""Latents that are counted at a time: a batch of one spares copies that others need."""

WIDEST = 256
"""Channels of a head that flash attention takes."""


@contextmanager
def _fused() -> Iterator[None]:
    """Let the meta device compute attention as a card does: on its own it takes the slow way.

    A mode of torch functions would not reach what gradient checkpointing computes again.
    """
    usual, aten = functional.scaled_dot_product_attention, torch.ops.aten

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Any:
        if q.device != META:
            return usual(q, k, v, *args, **more)
        mask = args[0] if args else more.get("attn_mask")
        if q.dtype == torch.float32 or mask is not None or q.shape[-1] > WIDEST:
            return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most, but for those known before."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {t.untyped_storage()._cdata for t in known}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        self._known.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, name, size)

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def alive(work: Callable[[], Any], model: DiffusersModel) -> tuple[int, int]:
    """Bytes that some work leaves, in what it returns and what that holds, and the most on the way.

    Args:
        work: on any device.
        model: its weights were there before, and gradients of them.
    """
    tensors = [t for part in (model.network, model.vae) for t in part.state_dict().values()]
    tensors += [weight.grad for weight in model.trainable().values() if weight.grad is not None]
    with _Alive(tensors) as counted, _fused():
        made = work()
    left = counted.now
    del made
    return left, counted.most


def shadow(model: DiffusersModel, *, checkpointing: bool = False) -> DiffusersModel:
    """A model of the same shapes without weights, with what trains installed.

    Args:
        model: without a LoRA, or with one; it stays as it is.
        checkpointing: whether the shadow computes activations again in its backward pass.
    """
    found, t = copy.copy(model), model.training
    for name, value in vars(model).items():
        if isinstance(value, Tensor):
            setattr(found, name, value.to(META))
    with META:
        found.network, found.vae = (
            type(part).from_config(part.config).to(part.dtype).requires_grad_(False).eval()
            for part in (model.network, model.vae)
        )
    found.device, found._called = META, found.network
    found.training = replace(t, compile=False, dtype="fp32" if t.full else t.dtype)
    found.network.requires_grad_(t.full)
    if checkpointing:
        found.network.enable_gradient_checkpointing()
    found.add_adapter(0)
    return found


def forward(model: DiffusersModel, conditions: Conditions, count: int) -> Tensor:
    """The network's output in float32 for so many empty latents."""
    device = next(model.network.parameters()).device
    dtype = DTYPES[model.training.dtype]
    x = torch.empty(count, *model.latent_shape, device=device, dtype=dtype)
    text = conditions.to(device).to(dtype).repeat(count)
    return model._call(x, torch.empty(count, device=device), text).float()


def backward(model: DiffusersModel, conditions: Conditions, count: int) -> None:
    """Forward and backward of so many latents, beside gradients that are there."""
    for weight in model.trainable().values():
        weight.grad = torch.empty_like(weight)
    forward(model, conditions, count).square().mean().backward()


class Needs:
    """Bytes that a model takes; each is counted when it is first asked for."""

    def __init__(self, model: DiffusersModel, conditions: Conditions) -> None:
        """What to count.

        Args:
            model: on any device; it stays as it is.
            conditions: of one prompt.
        """
        self._model, self._conditions = model, conditions
        self._shadow = shadow(model)

    @cached_property
    def weights(self) -> int:
        """Of network, LoRA and VAE, and of the pretrained network beside a full training."""
        parts = (self._shadow.network, self._shadow.vae)
        found = sum(_size(t) for part in parts for t in part.state_dict().values())
        return found + (self._trainable if self._shadow.training.full else 0)

    @cached_property
    def optimizer(self) -> int:
        """Of gradients, the optimizer's moments, and what its step takes for a moment."""
        return 5 * self._trainable

    @property
    def _trainable(self) -> int:
        return sum(_size(t) for t in self._shadow.trainable().values())

    @property
    def latent(self) -> int:
        """Of a latent in float32."""
        return 4 * math.prod(self._shadow.latent_shape)

    @property
    def prompt(self) -> int:
        """Of the conditions of a prompt in float32."""
        return sum(4 * t[0].numel() for t in self._conditions.tensors.values())

    @cached_property
    def update(self) -> int:
        """Of a latent that goes forward and backward; a pair under guidance is four."""
        return self._most(lambda: backward(self._shadow, self._conditions, FEW))

    @cached_property
    def checkpointed(self) -> int:
        """The same with gradient checkpointing."""
        careful = shadow(self._model, checkpointing=True)
        return self._most(lambda: backward(careful, self._conditions, FEW), careful)

    @cached_property
    def sampling(self) -> int:
        """Of a latent in a pass without gradients; an image under guidance is two."""
        with torch.no_grad():
            return self._most(lambda: forward(self._shadow, self._conditions, FEW))

    @cached_property
    def decoding(self) -> int:
        """Of a picture."""
        latents = torch.empty(FEW, *self._shadow.latent_shape, device=META)
        vae = self._shadow.vae
        with torch.no_grad():
            return self._most(lambda: vae.decode(latents, return_dict=False)[0])

    def _most(self, work: Callable[[], Any], model: DiffusersModel | None = None) -> int:
        return alive(work, model or self._shadow)[1] // FEW


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
