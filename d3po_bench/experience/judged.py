"""Stored images that people have judged: a round of `d3po-bench feedback` as experience."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.transfer import HOST
from d3po_bench.experience import Stage
from d3po_bench.types import Model, Objective, Rollout, Scorer


class Stored(Protocol):
    """A drawn round: its prompts, and what was kept of every image."""

    @property
    def content(self) -> str:
        """What names the pictures that were judged."""

    @property
    def image_prompts(self) -> Sequence[str]:
        """The prompt of each of its P groups of images."""

    def stored(self, rows: Tensor, model: Model) -> dict[str, Tensor]:
        """`latents` and `means` of some groups, shaped as in a rollout, or final latents alone.

        Args:
            rows: numbers of the groups.
            model: in training, which may encode pictures.
        """


class Votes:
    """Stands where a run has its scorer: people have scored already."""

    unit = "votes"

    def __init__(self, scores: Tensor, content: str) -> None:
        """`scores`: [P, K], of what `content` names."""
        given = scores.numpy().tobytes() + content.encode()
        self.digest = hashlib.sha256(given).hexdigest()[:12]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Not possible.

        Raises:
            TypeError: always.
        """
        raise TypeError("people score these images, not a program")


@dataclass(kw_only=True)
class Judged:
    """Parts of one judged round, all of them once a pass; implements `Experience`."""

    drawn: Stored
    scores: Tensor
    """[P, K]; NaN where nobody judged."""
    seed: int
    prompts_per_round: int
    initial: Mapping[str, Tensor] | None
    """The weights that drew the images; None for the pretrained model."""
    counts: dict[str, int] = field(default_factory=lambda: {"images": 0, "scorer_calls": 0})
    part_means: Mapping[str, float] = field(default_factory=dict)
    objective: Objective = field(default=Objective(prompts="", scorer="votes", sign=1), init=False)

    def __post_init__(self) -> None:
        """Find out what was judged."""
        self.scorer: Scorer = Votes(self.scores, self.drawn.content)
        self.judged = self.scores.isfinite().all(1).nonzero().squeeze(1)
        """Numbers of the prompts that somebody judged, ascending."""
        named = (self.drawn.image_prompts[i] for i in self.judged.tolist())
        self.prompts: Sequence[str] = list(dict.fromkeys(named))

    @property
    def parts(self) -> int:
        """Rounds that make a pass."""
        return -(-len(self.judged) // self.prompts_per_round)

    def collect(
        self, policy: Policy, round_: int, stage: Stage, progress: Callable[[float], None]
    ) -> Rollout:
        """The part of this round; see `Experience`."""
        with stage("sample"):
            passed, part = divmod(round_, self.parts)
            order = torch.randperm(len(self.judged), generator=stream(self.seed, "prompts", passed))
            start = part * self.prompts_per_round
            rows = self.judged[order[start : start + self.prompts_per_round].sort().values]
            prompts = [self.drawn.image_prompts[i] for i in rows.tolist()]
            stored = self.drawn.stored(rows, policy.model)
            rollout = Rollout(
                prompts=prompts,
                conditions=policy.model.encode(prompts).to(HOST),
                latents=stored["latents"].to(HOST),
                means=stored["means"].to(HOST),
                levels=policy.levels,
                training_levels=policy.model.process.training_levels,
                scores=self.scores[rows],
            )
        with stage("score"):
            if round_ < self.parts:  # later passes look at the same images again
                self.counts["images"] += rollout.scores.numel()
        return rollout
