"""Held-out evaluation during a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from d3po_bench import own, registry
from d3po_bench.config import Execution, RunConfig
from d3po_bench.diffusion import parallel
from d3po_bench.digests import short
from d3po_bench.errors import RunError, UserError
from d3po_bench.experience import Experience
from d3po_bench.models.sources import model_source
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import Row, write_atomically, writing
from d3po_bench.runs.tensors import packed, read_tensors
from d3po_bench.scoring import Sum
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
            UserError: one cannot be loaded, or would say nothing.
        """
        self.config, self.tools = config, tools
        self.from_base = experience.initial is None and not config.lora
        self.kept: BaseEvaluation | None = None
        """Where the base model's evaluation is shared with other runs, if it is."""
        self.scorers: dict[str, Scorer] = {"score": experience.scorer}
        self.texts: dict[str, str] = {}
        """What stands for each scorer, by its name."""
        self.named = self._of_objective(experience)
        """The scorers, a sum's parts among them, by their names."""
        for text in config.eval_scorers:
            name = registry.name_of("scorer", text)
            if isinstance(experience.scorer, Sum) and name in experience.scorer.parts:
                continue  # a column already
            try:
                weights = model_source(config.model).scorers
                self.named[name] = self.scorers[name] = tools.scorer(text, device, weights)
            except UserError as problem:
                others = ",".join(s for s in config.eval_scorers if s != text)
                raise UserError(
                    f"{problem} Or leave it out: --set eval_scorers={others}"
                ) from problem
            self.texts[name] = text
        self._require_several()
        prompts = read_prompts(config.eval_list) if config.eval_list else experience.prompts
        self.what = EvaluationSet(
            prompts=spread(prompts, config.eval_prompts),
            images=config.eval_images,
            steps=config.sampling_steps,
            guidance=config.guidance,
            sampler=config.sampler,
            eta=config.eta,
            noise=config.eval_noise,
            timestep_spacing=config.timestep_spacing,
            batch=execution.sample_batch,
            decode_batch=execution.decode_batch,
        )

    def _require_several(self) -> None:
        """Refuse scorers that compare the pictures of a prompt where there is one of each.

        Raises:
            UserError: naming them.
        """
        comparing = [n for n, scorer in self.named.items() if getattr(scorer, "compares", False)]
        if comparing and self.config.eval_images == 1 and self.config.eval_every:
            raise UserError(
                f"{', '.join(comparing)} would say nothing: pictures of a prompt are compared, and "
                "eval_images=1 draws one. Add --set eval_images=2, or leave it out."
            )

    def _of_objective(self, experience: Experience) -> dict[str, Scorer]:
        text, scorer = str(experience.objective.scorer), experience.scorer
        if isinstance(scorer, Sum):
            self.texts |= {name: part for name, (part, _) in registry.summands(text).items()}
            return dict(scorer.parts)
        name = registry.name_of("scorer", text)
        self.texts[name] = text
        return {name: scorer}

    def try_out(self, model: Model) -> None:
        """Let scorers of the user's own score a picture or two, before anything is written.

        Raises:
            UserError: one fails.
        """
        prompts = list(self.what.prompts[:2])
        for name, text in self.texts.items():
            if registry.is_own("scorer", text):
                latents = torch.zeros(len(prompts), *model.latent_shape, device=model.device)
                try:
                    self.named[name](model.decode(latents), prompts)
                except UserError as problem:
                    raise UserError(str(problem)) from problem
                except Exception as problem:  # its author's code may raise anything
                    raise UserError(
                        f"{text} fails: {own.said(problem, text)}. Correct it."
                    ) from problem

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
        untrained = round_ == 0 and self.from_base
        kept = self.kept if untrained else None
        found = parallel.tell(kept.read) if kept else None
        drawn = found is None
        if found is None:
            found = self._drawn(model, round_, replace(self.what, untrained=untrained), working)
            if kept:
                parallel.lead(partial(kept.write, *found))
        return Evaluated(*found, self.what.prompts, self.what.images, drawn)

    def _drawn(
        self, model: Model, round_: int, what: EvaluationSet, working: Callable[[float], None]
    ) -> tuple[list[Row], dict[str, Tensor]]:
        spent = model.forwards, model.backwards
        try:
            with parallel.at("evaluation"):
                found = self.tools.evaluate(model, what, self.scorers, working)
        except RunError as problem:
            where = f"Evaluation after round {round_}, seed {self.config.seed}"
            raise RunError(f"{where}: {problem}") from problem
        model.forwards, model.backwards = spent
        return found


class BaseEvaluation:
    """The evaluation of a base model, in a file that runs with all the same facts share."""

    def __init__(self, folder: Path, facts: Row) -> None:
        """Name the file.

        Args:
            folder: of the run, two levels below the file.
            facts: all that the evaluation depends on.
        """
        self.facts: Row = json.loads(json.dumps(facts))
        name = short(json.dumps(self.facts, sort_keys=True))
        self.own = folder / f"base-evaluation-{name}.safetensors"
        self.path = folder.parents[1] / self.own.name

    def read(self) -> tuple[list[Row], dict[str, Tensor]] | None:
        """Rows and pictures as `tools.Tools.evaluate` gives them; None where there are none."""
        try:
            pictures, known = read_tensors(self.path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            return None
        return (known["rows"], pictures) if known["of"] == self.facts else None

    def write(self, rows: Sequence[Row], pictures: Mapping[str, Tensor]) -> None:
        """Keep what was found, for the next run.

        Several runs may write it at the same time. Each does so in its own folder, which is locked.
        """
        data = packed(pictures, {"of": self.facts, "rows": rows})
        write_atomically(self.own, data)
        with writing(self.path):
            self.own.replace(self.path)
