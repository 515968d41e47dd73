"""The nouns that pass between stages. Imports nothing of ours.

Shape letters used throughout:

    P prompts              K images per prompt        T denoising steps
    M rows (update units)  N items of a micro-batch   C, H, W latent
    L, E text tokens and their width                  h, w image pixels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

    from d3po_bench.diffusion.policy import Policy

Metrics = dict[str, "Tensor"]
"""Name -> scalar tensor, a mean over the items of a micro-batch."""

Reference = Literal["pretrained", "sampling"]
"""What a method compares with: the pretrained model, or the policy that drew the round's images."""


@dataclass(frozen=True)
class Rollout:
    """K images for each of P prompts, with every latent on the way. All tensors float32."""

    prompts: Sequence[str]
    """P prompts."""
    text: Tensor
    """[P, L, E] prompt embeddings."""
    latents: Tensor
    """[P, K, T+1, C, H, W]; index 0 is pure noise, index T the final latent."""
    means: Tensor
    """[P, K, T, C, H, W]; mean of each step under the policy that sampled it."""
    timesteps: Tensor
    """[T] int64, descending."""
    scores: Tensor
    """[P, K]; larger is better (the objective's sign is already applied)."""
    reference: Tensor | None = None
    """[P, K, T, C, H, W]; mean of each step under the method's reference, where it has one."""
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Scores of each prompt in earlier rounds, oldest first; the last 64 at most."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What a method keeps from round to round. It may change this; it is part of a checkpoint."""

    def advantages(self, buffer: int = 16, minimum: int = 16) -> Tensor:
        """Scores in standard deviations above the mean of their prompt, [P, K].

        Statistics are those of a prompt's last `buffer` scores, this round's included, or of
        this whole round while it has fewer than `minimum` (Black et al. 2023, appendix). With
        `buffer` 0 they are those of the round for every prompt.
        """
        import torch

        scores = self.scores.double()
        kept = {prompt: list(self.history.get(prompt, ())) for prompt in set(self.prompts)}
        for prompt, values in zip(self.prompts, scores.tolist(), strict=True):
            kept[prompt] += values
        rows = []
        for prompt, values in zip(self.prompts, scores, strict=True):
            own = torch.tensor(kept[prompt][-buffer:], dtype=torch.float64)
            seen = own if buffer and len(own) >= minimum else scores.flatten()
            rows.append((values - seen.mean()) / (seen.std(correction=0) + 1e-6))
        return torch.stack(rows).float()


@dataclass(frozen=True)
class Rows:
    """Update units. Subclasses name the tensors that a loss reads, each of shape [M, T, ...].

    A unit is one pair (D3PO) or one image (DDPO) with all its T steps; an item is one step of
    one unit. Fields are views where possible: `expand` costs no memory.
    """

    def __len__(self) -> int:
        """Number of units, M."""
        return len(getattr(self, fields(self)[0].name))

    @property
    def steps(self) -> int:
        """Steps per unit, T."""
        return int(getattr(self, fields(self)[0].name).shape[1])

    def take(self, unit: Tensor, step: Tensor) -> Self:
        """The N items (unit[i], step[i]): every field becomes [N, ...]."""
        picked = {f.name: getattr(self, f.name)[unit, step] for f in fields(self)}
        return type(self)(**picked)


@dataclass(frozen=True)
class ImageRows(Rows):
    """One row is one image with its steps, as methods that learn from single images need it."""

    x_t: Tensor
    """[M, T, C, H, W]."""
    x_next: Tensor
    """[M, T, C, H, W]."""
    sampled: Tensor
    """[M, T, C, H, W] means under the policy that sampled the image."""
    t: Tensor
    """[M, T]."""
    text: Tensor
    """[M, T, L, E]."""

    @staticmethod
    def of(rollout: Rollout) -> ImageRows:
        """All images of a rollout, those of a prompt next to each other."""
        images, steps = rollout.scores.shape[1], len(rollout.timesteps)
        latents = rollout.latents.flatten(0, 1)
        text = rollout.text.repeat_interleave(images, 0).unsqueeze(1)
        return ImageRows(
            x_t=latents[:, :-1],
            x_next=latents[:, 1:],
            sampled=rollout.means.flatten(0, 1),
            t=rollout.timesteps.expand(len(latents), steps),
            text=text.expand(-1, steps, -1, -1),
        )


R = TypeVar("R", bound=Rows)


class Method(Protocol[R]):
    """How to learn from a rollout. Options are the fields of the frozen dataclass behind it."""

    @property
    def images_per_prompt(self) -> int:
        """K, unless the run's config says otherwise."""

    @property
    def shared_noise(self) -> bool:
        """Whether the K images of a prompt start from the same noise."""

    @property
    def reference(self) -> Reference | None:
        """The policy whose step means the rollout must carry, if any."""

    def rows(self, rollout: Rollout, rng: Generator) -> R:
        """What to learn from: the round's update units."""

    def loss(self, policy: Policy, items: R) -> tuple[Tensor, Metrics]:
        """How to learn from it: scalar mean over the N items, and diagnostics."""


@runtime_checkable
class Choosy(Protocol):
    """A method that learns from some images of a round alone: only they need a reference."""

    def learnt(self, rollout: Rollout) -> Tensor:
        """Which images, [P, K] bool."""


@runtime_checkable
class Model(Protocol):
    """A latent text-to-image diffusion model with a trainable part."""

    latent_shape: tuple[int, int, int]
    alphas_cumprod: Tensor
    prediction: Literal["epsilon", "v_prediction"]
    device: torch.device

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [P, L, E]."""

    def noise(self, x_t: Tensor, t: Tensor, text: Tensor, *, frozen: bool = False) -> Tensor:
        """The network's output [N, C, H, W] in float32; `frozen`: of the pretrained network."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, h, w] uint8, rounded, of latents [N, C, H, W]."""

    def trainable(self) -> dict[str, Tensor]:
        """Name -> trainable parameter, in a fixed order."""


class Scorer(Protocol):
    """A number for each picture. Takes uint8, so that every scorer sees the same rounding."""

    unit: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8."""


@runtime_checkable
class Several(Protocol):
    """A scorer that says more than one number of a picture; calling it gives the first."""

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Column name -> scores [N]."""


@dataclass(frozen=True)
class Objective:
    """Which prompts, whose score, and whether larger (+1) or smaller (-1) is better."""

    prompts: str
    scorer: str
    sign: Literal[-1, 1]
