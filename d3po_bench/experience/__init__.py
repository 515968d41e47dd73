"""Where rollouts come from: the policy in training, or rounds that people have judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from d3po_bench.diffusion.policy import Policy
    from d3po_bench.types import Objective, Rollout, Scorer

Stage = Callable[[str], AbstractContextManager[None]]
"""`with stage("sample"):` counts the seconds of that part of a round."""


class Experience(Protocol):
    """What a run learns from, round by round."""

    prompts: Sequence[str]
    """All that it can ask for."""
    objective: Objective
    scorer: Scorer
    """Where its scores come from."""
    counts: dict[str, int]
    """`images` and `scorer_calls` so far; part of a checkpoint."""
    part_means: Mapping[str, float]
    """Mean score in the last round by each part of an objective that is a sum."""
    initial: Mapping[str, Tensor] | None
    """Trained weights to start from; None for the pretrained model."""

    def collect(
        self, policy: Policy, round_: int, stage: Stage, progress: Callable[[float], None]
    ) -> Rollout:
        """The rollout of a round, with rewards: scores with the objective's sign.

        Args:
            policy: in training.
            round_: number of the round, from 0.
            stage: to count seconds with.
            progress: called with the share of images drawn.
        """
