"""Held-out evaluation during a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d3po_bench import registry
from d3po_bench.errors import RunError, UserError
from d3po_bench.runs.store import RunStore
from d3po_bench.training.trainer import Trainer
from d3po_bench.types import Scorer

SHOWN = 10
"""Prompts whose evaluation images are kept as PNG files."""


class Evaluation:
    """The evaluations of one run; their passes do not count as the run's cost."""

    def __init__(self, trainer: Trainer) -> None:
        """Load the further scorers."""
        c = trainer.config
        self.trainer = trainer
        self.evaluator: Any = registry.evaluator()
        self.scorers: dict[str, Scorer] = {"score": trainer.scorer}
        for name in c.eval_scorers:
            self.scorers[name] = self._further(name)
        self.what = self.evaluator.EvaluationSet(
            prompts=self.evaluator.spread(trainer.prompts, c.eval_prompts),
            images=c.eval_images,
            steps=c.sampling_steps,
            guidance=c.guidance,
            batch=trainer.execution.sample_batch,
        )

    def _further(self, name: str) -> Scorer:
        """A scorer that the objective does not need, so that a run can do without it."""
        try:
            return registry.scorer(name, self.trainer.device, self.trainer.weights)
        except UserError as problem:
            others = ",".join(s for s in self.trainer.config.eval_scorers if s != name)
            raise UserError(f"{problem} Or leave it out: --set eval_scorers={others}") from problem

    def named(self) -> dict[str, Scorer]:
        """The scorers by the names that they have on the command line."""
        objective = self.trainer.objective.scorer
        return {objective if name == "score" else name: s for name, s in self.scorers.items()}

    def fingerprints(self) -> dict[str, str]:
        """Scorer -> what names its weights."""
        selfcheck: Any = registry.selfcheck()
        return {name: selfcheck.fingerprint(scorer) for name, scorer in self.named().items()}

    def unchecked(self) -> list[str]:
        """Scorers without golden scores for their weights; people's votes are no such scorer."""
        known = registry.names("scorer")
        named = {n: s for n, s in self.named().items() if n.partition(":")[0] in known}
        found: list[str] = registry.selfcheck().unchecked(named)
        return found

    def due(self) -> bool:
        """Whether to evaluate now: at the start, every `eval_every` rounds, and at the end."""
        c, done = self.trainer.config, self.trainer.round
        return c.eval_every > 0 and (done % c.eval_every == 0 or done == c.rounds)

    def run(self, store: RunStore) -> float:
        """Draw, score and write; returns the mean score with the training sampler."""
        model = self.trainer.model
        spent = model.forwards, model.backwards
        try:
            rows, pictures = self.evaluator.evaluate(model, self.what, self.scorers)
        except RunError as problem:
            where = f"Evaluation after round {self.trainer.round}, seed {self.trainer.config.seed}"
            raise RunError(f"{where}: {problem}") from problem
        model.forwards, model.backwards = spent
        store.log_evaluation([{"round": self.trainer.round, **row} for row in rows])
        self._save_samples(store, pictures["eta0"])
        scores = [row["score"] for row in rows if row["sampler"] == "eta1"]
        return float(sum(scores) / len(scores))

    def _save_samples(self, store: RunStore, images: Tensor) -> None:
        """The first image of some evenly spread prompts, deployment sampler, as PNG."""
        prompts = list(self.what.prompts)
        for prompt in self.evaluator.spread(prompts, SHOWN):
            image = images[prompts.index(prompt) * self.what.images]
            store.save_sample(self.trainer.round, prompt, image)
