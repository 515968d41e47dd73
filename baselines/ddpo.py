"""DDPO: policy gradient over denoising steps (Black et al. 2023, arXiv:2305.13301).

Every denoising step of an image is an action, its reward that of the finished image (their
Eq. 4 with advantages, and Eq. 5, the importance-sampled form, with PPO's clip). Same loss as
kvablack/ddpo-pytorch and yk7333/d3po; `score_function` is their Eq. 4, which neither has. With
advantages against the images of one draw, `grpo`, it is Flow-GRPO's loss (Liu et al. 2025,
2505.05470) without its KL penalty, from one noise for the images of a prompt, as DanceGRPO draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor

from d3po_bench.diffusion.advantages import (
    Against,
    ComparesScores,
    advantages,
    known_statistics,
    ppo_loss,
)
from d3po_bench.errors import UserError
from d3po_bench.types import ImageRows, Method, Metrics, Policy, Reference, Rollout


@dataclass(frozen=True)
class Advantages(ImageRows):
    """One row is one image."""

    advantage: Tensor
    """[M, T]; standard deviations above the mean, the same for all steps of an image."""


@dataclass(frozen=True)
class DDPO(ComparesScores):
    """Defaults are the published code's."""

    loss_form: Literal["importance", "score_function"] = "importance"
    """PPO, or -A log p: then set units_per_update so that a round is one optimizer step."""
    clip_range: float = 1e-4
    """PPO's: how far the probability ratio of a step may move from 1 and still count."""
    advantage_clip: float = 5.0
    """Advantages are cut here, in standard deviations."""
    advantage: Against = "prompt"
    """Against the last scores of the prompt, or against the images of this draw alone (GRPO)."""
    buffer: int = 16
    """Scores of a prompt that its advantage is taken over; 0: over the round, for all prompts."""
    minimum: int = 16
    """Scores that a prompt needs before its own statistics count."""
    shared_noise: bool = False
    """Start the images of a prompt from the same noise."""

    images_per_prompt: ClassVar[int] = 1
    reference: ClassVar[Reference | None] = None

    def __post_init__(self) -> None:
        """Refuse options without a meaning.

        Raises:
            UserError: naming them.
        """
        known = 0 < self.clip_range < 1 and self.advantage_clip > 0
        if not (known and known_statistics(self.buffer, self.minimum)):
            raise UserError(
                "DDPO needs clip_range between 0 and 1, advantage_clip above 0, minimum at least 0 "
                "and buffer 0 or from minimum to 64; these are "
                f"{self.clip_range}, {self.advantage_clip}, {self.minimum} "
                f"and {self.buffer}. Change them with --set."
            )

    @property
    def search(self) -> dict[str, Any]:
        """See `launch.space`."""
        return {"clip_range": (1e-3, 0.5)}

    def rows(self, rollout: Rollout, rng: Generator) -> Advantages:
        """All images, each with its advantage."""
        images = ImageRows.of(rollout)
        found = advantages(rollout, self.buffer, self.minimum, self.advantage)
        advantage = found.flatten().to(images.x_t.device)
        clipped = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        return Advantages(**vars(images), advantage=clipped.unsqueeze(1).expand(images.step.shape))

    def loss(self, policy: Policy, items: Advantages) -> tuple[Tensor, Metrics]:
        r"""Mean loss of the items' steps.

        $$
        L = \max\bigl(-A\, \rho,\; -A\, \mathrm{clip}(\rho,\, 1 - \epsilon,\, 1 + \epsilon)\bigr),
        \qquad
        \rho = \frac{\pi_\theta(x_{t-1} \mid x_t, c)}{\pi_\mathrm{old}(x_{t-1} \mid x_t, c)}
        $$

        A is the image's advantage, epsilon `clip_range`, and old the policy that drew the image.
        """
        step = policy.step(items.x_t, items.step, items.conditions)
        log_ratio = step.log_ratio(items.sampled, items.x_next)
        if self.loss_form == "score_function":
            loss = -items.advantage * step.log_prob(items.x_next)
        else:
            loss = ppo_loss(log_ratio, items.advantage, self.clip_range)
        moved = log_ratio.detach()
        return loss.mean(), {
            "abs_log_ratio": moved.abs().mean(),
            "clipped": ((moved.exp() - 1).abs() > self.clip_range).float().mean(),
        }


VARIANTS = {"grpo": {"advantage": "group", "shared_noise": True, "images_per_prompt": 8}}

METHOD: type[Method[Advantages]] = DDPO
