"""Pictures as latents: a VAE's way in, for pictures that its model did not draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encoded(vae: Any, unscaled: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Latents [N, C, H, W] in float32 of pictures [N, 3, h, w] uint8.

    Args:
        vae: whose encoder; of a distribution the mean is taken.
        unscaled: what the model does to latents before its decoder, an affine map of each channel,
            which is undone here.
        pictures: on the VAE's device.
    """
    found = vae.encode(pictures.float() / 127.5 - 1)
    known: Tensor = found.latents if hasattr(found, "latents") else found.latent_dist.mean
    zero = unscaled(torch.zeros_like(known[:1]))
    scale = unscaled(torch.ones_like(known[:1])) - zero
    return ((known - zero) / scale).float()
