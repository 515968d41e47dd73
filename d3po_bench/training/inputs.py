"""Digests of what a run starts from: model, prompts and scorers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from d3po_bench import registry
from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.models.sources import fingerprint, model_source
from d3po_bench.prompts import digest, read_prompts
from d3po_bench.runs.files import Row
from d3po_bench.runs.store import RunStore
from d3po_bench.training.evaluation import Evaluation
from d3po_bench.training.progress import Progress, Report, label
from d3po_bench.training.trainer import Trainer


def inputs_today(config: RunConfig, store: RunStore, prompts: Sequence[str] | None) -> Row:
    """What the inputs of a finished run are today, told without loading its model."""
    source = model_source(config.model)
    if prompts is None:
        prompts = read_prompts(config.prompts or registry.objective(config.objective).prompts)
    found: Row = {"model": fingerprint(source), "prompts": digest(prompts)}
    inputs = store.provenance().get("inputs")
    began = inputs.get("scorers", {}) if isinstance(inputs, dict) else {}
    known = began if isinstance(began, dict) else {}  # what is none is none of today's, either
    today = {name: _scorer_fingerprint(name, source.scorers) for name in known}
    return found | {"scorers": {name: today[name] or known[name] for name in known}}


def _scorer_fingerprint(name: str, weights: str) -> str | None:
    """What names a scorer's weights; None where it cannot be loaded here, so scores nothing."""
    selfcheck: Any = registry.selfcheck()
    try:
        return str(selfcheck.fingerprint(_origin(name, weights)))
    except (UserError, ImportError):
        return None


@cache
def _origin(name: str, weights: str) -> SimpleNamespace:
    """What a scorer comes from, without its network; loaded once for all runs of a command."""
    scorer = registry.load_scorer(name, torch.device("cpu"), weights)
    known = {k: getattr(scorer, k) for k in ("sources", "digest") if hasattr(scorer, k)}
    return SimpleNamespace(**known)


def plugins_of(config: RunConfig, evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """Which packages brought what a run uses, if any did."""
    used: list[tuple[registry.Kind, str]] = [
        ("method", config.method), ("objective", config.objective), ("model", config.model),
        *(("scorer", name.partition(":")[0]) for name in evaluation.named()),
    ]  # fmt: skip
    return registry.plugins(used)


def tell_unchecked(trainer: Trainer, evaluation: Evaluation, report: Report) -> list[str]:
    """The scorers that nothing was compared with, after saying so."""
    names, done = evaluation.unchecked(), trainer.round / trainer.config.rounds
    if names:
        note = registry.selfcheck().note(names)
        report(Progress(label(trainer.config), done, "", note))
    return names
