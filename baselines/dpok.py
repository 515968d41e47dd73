"""DPOK: policy gradient with a KL penalty to the pretrained model (Fan et al. 2023, 2305.16381).

Their Eq. 8: reward-weighted log-probabilities plus beta times the KL divergence of every
denoising step to the pretrained model. Between steps of equal variance that KL is exact.
Differences: yk7333/d3po's "KL" is one between categorical distributions over the batch, which
is zero for one image (`kl=none` is the same as that code); google-research/dpok penalises the
squared difference of the noises (`noise_mse`), clamps the ratio without PPO's maximum
(`hard_clamp`), and subtracts a learned value from the reward (`value=reward`; theirs is fitted to
the last 1000 transitions, ours to those of the round). All three are the variant `dpok_value`; the
default is DDPO with the penalty, which `ddpo_kl` says by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from d3po_bench.diffusion.advantages import (
    Against,
    ComparesScores,
    advantages,
    known_statistics,
    ppo_loss,
    ratio_of,
)
from d3po_bench.errors import UserError
from d3po_bench.types import ImageRows, Method, Metrics, Policy, Reference, Rollout, Step


@dataclass(frozen=True)
class Regularised(ImageRows):
    """One row is one image."""

    advantage: Tensor
    """[M, T]."""
    pretrained: Tensor
    """[M, T, C, H, W] means of the pretrained model; the sampled ones where there is no penalty."""


@dataclass(frozen=True)
class DPOK(ComparesScores):
    """Advantage and ratio default to DDPO's, so that the penalty is all that differs."""

    kl: Literal["gaussian", "noise_mse", "none"] = "gaussian"
    """The penalty: exact, that of the DPOK authors' code, or none, which D3PO's code amounts to."""
    kl_weight: float = 0.01
    """The penalty's weight, beta in their Eq. 8."""
    ratio: Literal["ppo", "hard_clamp"] = "ppo"
    """PPO's clipped loss, as in DDPO, or the cut ratio of the DPOK authors' code."""
    value: Literal["off", "on", "reward"] = "off"
    """Subtract a value that a small network learns for every latent on the way: from the
    advantage, or, as published, from the reward as it is."""
    value_rate: float = 1e-4
    """Learning rate of the value, the DPOK authors'; theirs learns for thousands of rounds."""
    value_steps: int = 5
    """Steps of learning in a round, of 256 latents each."""
    clip_range: float = 1e-4
    """How far the probability ratio of a step may move from 1, as in DDPO."""
    advantage_clip: float = 5.0
    """Advantages are cut here, in standard deviations; `value=reward` has none to count in."""
    advantage: Against = "prompt"
    """Against the last scores of the prompt, or against the images of this draw alone (GRPO)."""
    buffer: int = 16
    """Scores of a prompt that its advantage is taken over; 0: over the round, for all prompts."""
    minimum: int = 16
    """Scores that a prompt needs before its own statistics count."""
    shared_noise: bool = False
    """Start the images of a prompt from the same noise."""

    images_per_prompt: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse options without a meaning.

        Raises:
            UserError: naming them.
        """
        known = 0 < self.clip_range < 1 and self.kl_weight >= 0 and self.advantage_clip > 0
        learns = self.value_rate > 0 and 1 <= self.value_steps <= 10**4
        if not (known and learns and known_statistics(self.buffer, self.minimum)):
            raise UserError(
                "DPOK needs clip_range between 0 and 1, kl_weight and minimum of at least 0, "
                "advantage_clip and value_rate above 0, buffer 0 or from minimum to 64 and "
                f"value_steps from 1 to 10000; these are {self.clip_range}, {self.kl_weight}, "
                f"{self.minimum}, {self.advantage_clip}, {self.value_rate}, {self.buffer} "
                f"and {self.value_steps}. Change them with --set."
            )

    @property
    def search(self) -> dict[str, Any]:
        """See `launch.space`."""
        weight = {} if self.kl == "none" else {"kl_weight": (1e-3, 1.0)}
        rate = {} if self.value == "off" else {"value_rate": (1e-4, 1e-2)}
        return {"clip_range": (1e-3, 0.5), **weight, **rate}

    @property
    def reference(self) -> Reference | None:
        """The pretrained model, unless there is no penalty."""
        return None if self.kl == "none" else "pretrained"

    def rows(self, rollout: Rollout, rng: Generator) -> Regularised:
        """All images, each with its advantage and what the pretrained model would have done."""
        images = ImageRows.of(rollout)
        means = rollout.means if rollout.reference is None else rollout.reference
        found = advantages(rollout, self.buffer, self.minimum, self.advantage)
        gained = (rollout.scores if self.value == "reward" else found).flatten().unsqueeze(1)
        advantage = gained.to(images.x_t.device).expand(images.step.shape)
        if self.value != "off":
            advantage = advantage - self.learned_value(images, advantage, rollout.memory, rng)
        if self.value != "reward":  # whose unit is the score's
            advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        return Regularised(**vars(images), advantage=advantage, pretrained=means.flatten(0, 1))

    def loss(self, policy: Policy, items: Regularised) -> tuple[Tensor, Metrics]:
        r"""Mean over the items of the clipped policy gradient and the weighted penalty.

        $$
        L = \max\bigl(-A\, \rho,\; -A\, \mathrm{clip}(\rho,\, 1 - \epsilon,\, 1 + \epsilon)\bigr)
        + \beta\, \mathrm{KL}\bigl(\pi_\theta(x_{t-1} \mid x_t, c) \,\|\,
        \pi_\mathrm{pre}(x_{t-1} \mid x_t, c)\bigr)
        $$

        A and the ratio are DDPO's, epsilon is `clip_range`, beta `kl_weight`, and pre the
        pretrained model.
        """
        step = policy.step(items.x_t, items.step, items.conditions)
        log_ratio = step.log_ratio(items.sampled, items.x_next)
        if self.ratio == "ppo":
            loss = ppo_loss(log_ratio, items.advantage, self.clip_range)
        else:
            cut = ratio_of(log_ratio).clamp(1 - self.clip_range, 1 + self.clip_range)
            loss = -items.advantage * cut
        metrics = {"abs_log_ratio": log_ratio.detach().abs().mean()}
        if self.kl != "none":
            penalty = self.penalty(policy, step, items)
            loss = loss + self.kl_weight * penalty
            metrics["penalty"] = penalty.detach().mean()
        return loss.mean(), metrics

    def penalty(self, policy: Policy, step: Step, items: Regularised) -> Tensor:
        """Distance of each step to the pretrained model's, [N]; nats or squared noise."""
        if self.kl == "noise_mse":
            return policy.output_gap(step, items.pretrained, items.step)
        return step.kl(items.pretrained)

    def learned_value(
        self, images: ImageRows, target: Tensor, memory: dict[str, Tensor], rng: Generator
    ) -> Tensor:
        """Values [M, T] of every latent, before some steps of learning from `target` [M, T].

        Batches of 256 transitions, AdamW; the weights and moments live in `memory`.
        """
        pooled = images.conditions.pooled().unsqueeze(1).expand(-1, images.steps, -1)
        features = torch.cat([images.x_t.flatten(2), pooled], 2).flatten(0, 1)
        step = torch.arange(images.steps, device=features.device).repeat(len(images))
        goal = target.flatten()
        network, optimizer = _recall(features, images.steps, self.value_rate, memory, rng)
        with torch.no_grad():
            values: Tensor = network(features, step)
        for _ in range(self.value_steps):
            batch = torch.randperm(len(goal), generator=rng)[:256].to(features.device)
            optimizer.zero_grad()
            (network(features[batch], step[batch]) - goal[batch]).square().mean().backward()
            optimizer.step()
        for name, p in network.named_parameters():
            memory[f"value.{name}"] = p.detach().clone()
            memory.update({f"{k}.{name}": optimizer.state[p][k].clone() for k in MOMENTS})
        return values.view(target.shape)


class Value(nn.Module):
    """The reward to expect from a latent: three layers, scaled by an embedding of the step."""

    def __init__(self, inputs: int, steps: int, width: int = 256) -> None:
        super().__init__()
        sizes = [inputs, width, width, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.scales = nn.ModuleList(nn.Embedding(steps, width) for _ in range(3))
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Values [N] of features [N, F] at steps [N]."""
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = torch.relu(layer(x) * (1 + scale(step)))
        values: Tensor = self.last(x)
        return values.squeeze(1)


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _recall(
    features: Tensor, steps: int, rate: float, memory: dict[str, Tensor], rng: Generator
) -> tuple[Value, torch.optim.Optimizer]:
    """The value network and its optimizer as the last round left them, or fresh ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        network = Value(features.shape[1], steps).to(features.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    if memory:
        for name, p in network.named_parameters():
            p.data.copy_(memory[f"value.{name}"])
            optimizer.state[p] = {k: memory[f"{k}.{name}"].to(p.device) for k in MOMENTS}
            optimizer.state[p]["step"] = memory[f"step.{name}"].cpu()
    return network, optimizer


VARIANTS = {
    "ddpo_kl": {"kl": "gaussian"},
    "dpok_value": {"value": "reward", "kl": "noise_mse", "ratio": "hard_clamp"},
}

METHOD: type[Method[Regularised]] = DPOK
