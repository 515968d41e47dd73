"""The independent judge of the embedded model: which of the 45 animals is in the picture?

Trained on renders alone, never on samples, and never used as a reward by default.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d3po_bench.errors import UserError

WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        """Fresh weights for `width` channels."""
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Of [N, width, h, w], the same shape."""
        change: Tensor = self.two(F.silu(self.norm(self.one(F.silu(x)))))
        return x + change


class Classifier(nn.Module):
    """A convolutional network of 0.5M parameters on 32 px pictures in [-1, 1]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            Residual(64),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
            Residual(96),
            nn.GroupNorm(8, 96),
            nn.SiLU(),
        )
        self.head = nn.Linear(96 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pictures [N, 3, 32, 32]."""
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, [N, 1536]."""
        return F.adaptive_avg_pool2d(self.body(x), 4).flatten(1)


def load(classes: int, device: torch.device) -> Classifier:
    """The classifier that ships with the embedded model.

    Raises:
        UserError: its weights are not there.
    """
    from safetensors.torch import load_file

    if not WEIGHTS.exists():
        raise UserError(
            f"There is no classifier at {WEIGHTS}. Install the package again, or rebuild it: "
            "python -m d3po_bench.models.embedded.recipe all."
        )
    network = Classifier(classes)
    network.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS).items()})
    return network.to(device).eval()


def pictures(images: Tensor, device: torch.device, side: int = 32) -> Tensor:
    """Images [N, 3, h, w] uint8 as judges take them: [N, 3, side, side] in [-1, 1]."""
    x = images.to(device).float().div(127.5).sub(1)
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return x
