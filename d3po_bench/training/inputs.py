"""Digests of what a run starts from: model, prompts and scorers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import torch

from d3po_bench import own, registry
from d3po_bench.config import FEEDBACK, RunConfig
from d3po_bench.errors import UserError
from d3po_bench.models import start
from d3po_bench.models.sources import Source, commit, fingerprint, model_source
from d3po_bench.prompts import digest, read_prompts
from d3po_bench.runs.files import Row
from d3po_bench.runs.run import RunFolder
from d3po_bench.training.tools import Tools


def inputs_today(run: RunFolder, prompts: Sequence[str], tools: Tools) -> Row:
    """What the inputs of a finished run are today, without loading its model."""
    source = model_source(run.config.model)
    today: dict[str, str] = {}
    texts = _texts(run.config)
    for name, known in run.facts.get("inputs", {}).get("scorers", {}).items():
        try:
            text = texts.get(name, name)
            # What is the user's own may have another text by now.
            of = _origin if registry.is_own("scorer", text) else _origin_once
            today[name] = tools.fingerprint(of(text, source.scorers))
        except (UserError, ImportError):  # it cannot be loaded here, so it scores nothing
            today[name] = known
    lora = start.digest(run.config.lora)
    began = lora | method_digest(run.config) | eval_digest(run.config)
    return {**model_today(source), **began, "prompts": digest(prompts), "scorers": today}


def _texts(config: RunConfig) -> dict[str, str]:
    """What stands for each scorer of a run, by its name."""
    scored = () if config.objective == FEEDBACK else registry.scorers_of(config.source("objective"))
    return {registry.name_of("scorer", text): text for text in (*scored, *config.eval_scorers)}


def method_digest(config: RunConfig) -> dict[str, str]:
    """What names the text of a method that is the user's own, if it is."""
    text = config.sources.get("method")
    return {} if text is None else {"method": own.load(text, "METHOD").digest}


def eval_digest(config: RunConfig) -> dict[str, str]:
    """What names the prompts of its evaluations, where training has others."""
    return {"eval_prompts": digest(read_prompts(config.eval_list))} if config.eval_list else {}


def model_today(source: Source) -> dict[str, str]:
    """What names the content of a base model, of a hub id the commit that is here, too."""
    found = commit(source)
    return {"model": fingerprint(source), **({"model_commit": found} if found else {})}


def require_unchanged(run: RunFolder, weights: str, prompts: Sequence[str] | None) -> None:
    """Refuse to put a run's weights on what they were not trained on.

    Args:
        run: a finished one.
        weights: what is used of it, `LORA` or `LAST`.
        prompts: what is taken for the prompts of its training; None where they are not used.

    Raises:
        UserError: the weights, the base model or the prompts are not the run's.
    """
    run.require_content(weights)
    today = model_today(model_source(run.config.model))
    if prompts is not None:
        today["prompts"] = digest(prompts)
    for name in sorted({"model", "prompts"} & today.keys() - run.facts.get("inputs", {}).keys()):
        raise UserError(
            f"{run.folder / 'provenance.json'} does not say which {name} the run was trained on. "
            "Restore that file, or run it again."
        )
    run.require_inputs(today, "go to the folder that its paths begin at")


def _origin(name: str, weights: str) -> SimpleNamespace:
    """What a scorer comes from, without its network."""
    scorer = registry.load_scorer(name, torch.device("cpu"), weights)
    known = {k: getattr(scorer, k) for k in ("sources", "digest") if hasattr(scorer, k)}
    return SimpleNamespace(**known)


_origin_once = cache(_origin)
"""For all runs of a command."""
