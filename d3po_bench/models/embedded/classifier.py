"""The independent judge of the embedded model: which of the 45 animals is in the picture?

Trained on renders alone, never on samples, and never used as a reward by default.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
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
            _Residual(64),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
            _Residual(96),
            nn.GroupNorm(8, 96),
            nn.SiLU(),
        )
        self.head = nn.Linear(96 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pictures [N, 3, 32, 32]."""
        return self.head(F.adaptive_avg_pool2d(self.body(x), 4).flatten(1))  # type: ignore[no-any-return]
