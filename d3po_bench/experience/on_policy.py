"""Images that the policy in training draws, scored by a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, pictures, sample
from d3po_bench.diffusion.seeding import stream
from d3po_bench.experience import Stage
from d3po_bench.scoring import apart, require_scores
from d3po_bench.types import Objective, Rollout, Scorer


@dataclass(kw_only=True)
class OnPolicy:
    """Random prompts, K images each; implements `Experience`."""

    prompts: Sequence[str]
    objective: Objective
    scorer: Scorer
    seed: int
    prompts_per_round: int
    images_per_prompt: int
    shared_noise: bool
    """Whether the images of a prompt start from one noise."""
    batch: int
    """Images drawn side by side."""
    decode_batch: int = 16
    counts: dict[str, int] = field(default_factory=lambda: {"images": 0, "scorer_calls": 0})
    part_means: Mapping[str, float] = field(default_factory=dict)
    initial: Mapping[str, Tensor] | None = None

    def collect(
        self, policy: Policy, round_: int, stage: Stage, progress: Callable[[float], None]
    ) -> Rollout:
        """Draw and score; see `Experience`.

        Raises:
            RunError: a latent or a score is not finite.
        """
        with stage("sample"):
            rng = stream(self.seed, "prompts", round_)
            drawn = torch.randint(len(self.prompts), (self.prompts_per_round,), generator=rng)
            rollout = sample(
                policy,
                [self.prompts[i] for i in drawn],
                Draws(seed=self.seed, round=round_),
                images_per_prompt=self.images_per_prompt,
                shared_noise=self.shared_noise,
                batch=self.batch,
                progress=progress,
            )
        with stage("score"):
            return self._scored(policy, rollout)

    def _scored(self, policy: Policy, rollout: Rollout) -> Rollout:
        p, k = rollout.scores.shape
        latents = rollout.latents[:, :, -1].flatten(0, 1)
        images = pictures(policy.model, latents, self.decode_batch)
        prompts = [prompt for prompt in rollout.prompts for _ in range(k)]
        # By one rank, at once: of many scorers the bits depend on what is scored together.
        scores, parts = parallel.tell(lambda: apart(self.scorer, images, prompts))
        require_scores(self.scorer, scores)
        self.part_means = {name: float(found.mean()) for name, found in parts.items()}
        self.counts["images"] += p * k
        self.counts["scorer_calls"] += p * k
        return replace(rollout, scores=scores.view(p, k) * self.objective.sign)
