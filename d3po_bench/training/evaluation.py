"""Held-out evaluation during a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import RunError, UserError
from d3po_bench.experience import Experience
from d3po_bench.models.sources import model_source
from d3po_bench.training.listeners import Evaluated
from d3po_bench.training.tools import EvaluationSet, Tools, spread
from d3po_bench.types import Model, Scorer


class Evaluation:
    """The evaluations of one run; their passes do not count as the run's cost."""

    def __init__(
        self,
        config: RunConfig,
        execution: Execution,
        experience: Experience,
        tools: Tools,
        device: torch.device,
    ) -> None:
        """Load the scorers that the objective does not need.

        Raises:
            UserError: one cannot be loaded.
        """
        self.config, self.tools = config, tools
        self.scorers: dict[str, Scorer] = {"score": experience.scorer}
        for name in config.eval_scorers:
            try:
                weights = model_source(config.model).scorers
                self.scorers[name] = tools.scorer(name, device, weights)
            except UserError as problem:
                others = ",".join(s for s in config.eval_scorers if s != name)
                raise UserError(
                    f"{problem} Or leave it out: --set eval_scorers={others}"
                ) from problem
        self.named = {
            experience.objective.scorer if name == "score" else name: scorer
            for name, scorer in self.scorers.items()
        }
        """The scorers by the names that they have on the command line."""
        self.what = EvaluationSet(
            prompts=spread(experience.prompts, config.eval_prompts),
            images=config.eval_images,
            steps=config.sampling_steps,
            guidance=config.guidance,
            sampler=config.sampler,
            eta=config.eta,
            batch=execution.sample_batch,
        )

    def due(self, round_: int) -> bool:
        """Whether to evaluate after so many rounds: at the start, at intervals, at the end."""
        c = self.config
        return c.eval_every > 0 and (round_ % c.eval_every == 0 or round_ == c.rounds)

    def __call__(
        self, model: Model, round_: int, working: Callable[[float], None] = lambda share: None
    ) -> Evaluated:
        """Draw and score.

        Args:
            model: as it is after that round.
            round_: number of rounds done.
            working: called with the share of the evaluation that is done.

        Raises:
            RunError: a latent, the score, or the drift is not finite.
        """
        spent = model.forwards, model.backwards
        try:
            rows, pictures = self.tools.evaluate(model, self.what, self.scorers, working)
        except RunError as problem:
            where = f"Evaluation after round {round_}, seed {self.config.seed}"
            raise RunError(f"{where}: {problem}") from problem
        model.forwards, model.backwards = spent
        return Evaluated(rows, pictures, self.what.prompts, self.what.images)
