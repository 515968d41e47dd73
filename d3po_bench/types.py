"""The nouns that pass between stages. Imports nothing of ours.

Shape letters used throughout:

    P prompts              K images per prompt        T denoising steps
    M rows (update units)  N items of a micro-batch   C, H, W latent
    h, w image pixels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Generator, Tensor

Metrics = dict[str, "Tensor"]
"""Name -> scalar tensor, a mean over the items of a micro-batch."""

Reference = Literal["pretrained", "sampling"]
"""What a method compares with: the pretrained model, or the policy that drew the round's images."""

Prediction = Literal["epsilon", "v_prediction", "flow"]
"""What a network's output is: the noise, Salimans and Ho's velocity, or noise minus image."""

Weights = Literal["current", "base"]
"""Which weights answer: those in training, or the pretrained ones."""


# ---- what a network is asked


@dataclass(frozen=True)
class Conditions:
    """What a network sees beside the latent: named tensors, batch first, such as `text` [N, L, E].

    SDXL and SD3 add `pooled` [N, F].
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Entries in the batch."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.tensors[name]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return Conditions({name: change(tensor) for name, tensor in self.tensors.items()})

    def take(self, index: Tensor | slice) -> Conditions:
        """The entries at `index`."""
        return self._each(lambda tensor: tensor[index])

    def repeat(self, times: int) -> Conditions:
        """Each entry `times` times, copies next to each other."""
        return self._each(lambda tensor: tensor.repeat_interleave(times, 0))

    def expand(self, count: int) -> Conditions:
        """The only entry `count` times, as views."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def cat(self, other: Conditions) -> Conditions:
        """These entries, then those of `other`."""
        import torch

        return Conditions({n: torch.cat([t, other[n]]) for n, t in self.tensors.items()})

    def to(self, place: torch.device | torch.dtype) -> Conditions:
        """On that device, or in that precision."""
        return self._each(lambda tensor: tensor.to(place))

    def pooled(self) -> Tensor:
        """[N, F]: every tensor's mean over its tokens, side by side."""
        import torch

        every = self.tensors.values()
        return torch.cat([t.flatten(1, -2).mean(1) if t.ndim > 2 else t for t in every], 1)


class Process(Protocol):
    """How images and noise mix at each level, without any network.

    A level s is a timestep for variance-preserving noise, the share of noise for a flow.
    """

    @property
    def training_levels(self) -> Tensor:
        """[L] the levels that the network was trained on."""

    def levels(self, steps: int) -> Tensor:
        """[T + 1] the levels of a sampler of `steps` steps, descending, the final one last."""

    def ends(self, steps: int) -> Tensor:
        """[T] the level that each step is taken to: the next, in some schedules beside it."""

    def alpha(self, s: Tensor) -> Tensor:
        """Coefficient of the image at each level, float64."""

    def sigma(self, s: Tensor) -> Tensor:
        """Coefficient of the noise at each level, float64."""

    def squares(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """alpha^2 and sigma^2, without the rounding of a root."""

    def posterior_std(self, s: Tensor, s_next: Tensor) -> Tensor:
        """Std of the latent at `s_next`, given that at `s` and x_0: DDIM's noise with eta 1."""

    def network_time(self, s: Tensor) -> Tensor:
        """What the network takes as its timestep."""


@runtime_checkable
class Model(Protocol):
    """A latent text-to-image model with a trainable part: what its network outputs, no loop."""

    latent_shape: tuple[int, ...]
    process: Process
    prediction: Prediction
    device: torch.device
    forwards: int
    """Network forwards so far, in latents with one conditioning each."""
    backwards: int
    commit: str | None
    """Of the hub repository that it was loaded from, if it was."""

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of P prompts."""

    def unconditional(self) -> Conditions:
        """The one entry that guidance steers away from."""

    def output(
        self, x: Tensor, s: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Tensor:
        """The network's output in float32, shaped as the latents `x` [N, ...] at levels `s` [N]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 3, h, w] uint8, rounded, on the CPU, of latents [N, ...]."""

    def add_adapter(self, seed: int) -> None:
        """Make it trainable; it still equals the pretrained model."""

    def trainable(self) -> dict[str, Tensor]:
        """Name -> trainable parameter, in a fixed order."""

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into the trainable parameters."""

    def save(self, folder: Path) -> None:
        """Write what was trained."""

    def load_saved(self, folder: Path) -> None:
        """Put on what `save` wrote."""


# ---- rollouts and what is learned from them


@dataclass(frozen=True)
class Rollout:
    """K images for each of P prompts, with every latent on the way: float32, in host memory."""

    prompts: Sequence[str]
    """P prompts."""
    conditions: Conditions
    """Of the P prompts."""
    latents: Tensor
    """[P, K, T+1, C, H, W]; index 0 is pure noise, index T the final latent."""
    means: Tensor
    """[P, K, T, C, H, W]; mean of each step under the policy that sampled it."""
    levels: Tensor
    """[T+1] noise levels of the latents, descending."""
    training_levels: Tensor
    """[L] the levels that a denoising loss draws from."""
    scores: Tensor
    """[P, K]; larger is better (the objective's sign is already applied)."""
    reference: Tensor | None = None
    """[P, K, T, C, H, W]; mean of each step under the method's reference, where it has one."""
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Scores of each prompt in earlier rounds, oldest first; the last 64 at most."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What a method keeps from round to round. It may change this; it is part of a checkpoint."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.levels) - 1


@dataclass(frozen=True)
class Rows:
    """Update units. Subclasses name what a loss reads: tensors [M, T, ...], or Conditions of M.

    A unit is one pair (D3PO) or one image (DDPO) with all its T steps; an item is one step of
    one unit. Fields are views where possible: `expand` costs no memory. The first is a tensor.
    """

    def __len__(self) -> int:
        """Number of units, M."""
        return len(getattr(self, fields(self)[0].name))

    @property
    def steps(self) -> int:
        """Steps per unit, T."""
        return int(getattr(self, fields(self)[0].name).shape[1])

    def take(self, unit: Tensor, step: Tensor) -> Self:
        """The N items (unit[i], step[i]): every tensor becomes [N, ...]."""
        picked = {}
        for f in fields(self):
            value = getattr(self, f.name)
            whole = isinstance(value, Conditions)  # the same at every step
            picked[f.name] = value.take(unit) if whole else value[unit, step]
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
    step: Tensor
    """[M, T] number of each denoising step, 0 to T-1."""
    conditions: Conditions

    @staticmethod
    def of(rollout: Rollout) -> ImageRows:
        """All images of a rollout, those of a prompt next to each other."""
        latents = rollout.latents.flatten(0, 1)
        return ImageRows(
            x_t=latents[:, :-1],
            x_next=latents[:, 1:],
            sampled=rollout.means.flatten(0, 1),
            step=step_numbers(rollout, len(latents)),
            conditions=rollout.conditions.repeat(rollout.scores.shape[1]),
        )


def step_numbers(rollout: Rollout, count: int) -> Tensor:
    """[count, T]: 0 to T-1 for each of so many rows, on the latents' device."""
    import torch

    return torch.arange(rollout.steps, device=rollout.latents.device).expand(count, -1)


@dataclass(frozen=True)
class NoisedRows(Rows):
    """One row is one final image with T draws of a level and noise, for a denoising loss."""

    x_0: Tensor
    """[M, T, C, H, W]."""
    noise: Tensor
    """[M, T, C, H, W]."""
    level: Tensor
    """[M, T]."""
    conditions: Conditions

    @staticmethod
    def of(
        rollout: Rollout, prompt: Tensor, image: Tensor, rng: Generator,
        draw_from: Literal["all", "sampler"],
    ) -> NoisedRows:  # fmt: skip
        """The images (prompt[i], image[i]) of a rollout, for [M] numbers of each.

        `draw_from` says whether levels are those of training, or of the sampler's T.
        """
        import torch

        x_0 = rollout.latents[prompt, image, -1]
        known, steps = rollout.training_levels.cpu(), rollout.steps
        drawn = torch.randint(len(known), (len(x_0), steps), generator=rng)
        level = known[drawn] if draw_from == "all" else rollout.levels.cpu()[drawn % steps]
        noise = torch.randn((len(x_0), steps, *x_0.shape[1:]), generator=rng)
        return NoisedRows(
            x_0=x_0.unsqueeze(1).expand(noise.shape),
            noise=noise.to(x_0.device),
            level=level.to(x_0.device),
            conditions=rollout.conditions.take(prompt.to(x_0.device)),
        )


# ---- methods


class Step(Protocol):
    """One denoising step as a Gaussian; densities in nats per latent element."""

    @property
    def mean(self) -> Tensor:
        """[N, C, H, W]."""

    @property
    def std(self) -> Tensor:
        """[N]."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of `x`, [N]."""

    def log_ratio(self, other_mean: Tensor, x: Tensor) -> Tensor:
        """Log density of `x` here minus that under `other_mean` and the same std, [N]."""

    def kl(self, other_mean: Tensor) -> Tensor:
        """KL divergence to the Gaussian of `other_mean` and the same std, [N]."""


class Policy(Protocol):
    """What a loss asks of the model in training."""

    def step(
        self, x_t: Tensor, step: Tensor, conditions: Conditions, *, weights: Weights = "current"
    ) -> Step:
        """The distribution of the next latent after latents [N, C, H, W] at steps [N]."""

    def output_gap(self, step: Step, other_mean: Tensor, number: Tensor) -> Tensor:
        """Squared difference of the network outputs behind two means of a step, [N]."""

    def denoise(
        self, x_0: Tensor, level: Tensor, noise: Tensor, conditions: Conditions, *,
        guided: bool = False, weights: Weights = "current",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What the network sees in `x_0` noised to `level`, and what is there, [N, C, H, W] each.

        Noise for a variance-preserving model, noise minus image for a flow.
        """


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
class UsesSomeImages(Protocol):
    """A method that learns from some images of a round alone: only they need a reference."""

    def images_used(self, rollout: Rollout) -> Tensor:
        """Which images, [P, K] bool."""


# ---- scores


class Scorer(Protocol):
    """A number for each picture. Takes uint8, so that every scorer sees the same rounding."""

    unit: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, h, w] uint8."""


@runtime_checkable
class ScorerWithColumns(Protocol):
    """A scorer that gives more than one number for a picture; calling it gives the first."""

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Column name -> scores [N]."""


@dataclass(frozen=True)
class Objective:
    """Which prompts, whose score, and whether larger (+1) or smaller (-1) is better."""

    prompts: str
    scorer: str | Scorer
    """A name, a file, package.module:NAME, an address, or from Python what scores."""
    sign: Literal[-1, 1]
