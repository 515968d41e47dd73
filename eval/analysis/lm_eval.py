"""Results in the layout of lm-evaluation-harness, for programs that read that.

A task is a method on an objective, and what stands for its filter is the sampler. What the harness
measures on one model has its standard error over documents; here it is over seeds, and "N/A", as
there, for one. https://github.com/EleutherAI/lm-evaluation-harness, result_schema.py of 0.4.13.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from eval.analysis import tries
from eval.analysis.gains import Groups, both_ends
from eval.analysis.runs import DRIFTS, Run
from eval.analysis.scores import score_of

SAMPLERS = ("eta1", "eta0")

COLUMNS = {"score": "score", "recognised": "animal", **{name: name for name in DRIFTS}}
"""Metric -> what measures it at the end of a run."""


def results(groups: Groups) -> str:
    """The runs as JSON, all of one base model."""
    tasks = {f"{objective}/{method}": runs for (_, objective, method), runs in groups.items()}
    first = next(iter(tasks.values()))[0]
    model = first.config.model
    under: dict[str, list[str]] = {}
    for _, objective, method in groups:
        under.setdefault(objective, []).append(f"{objective}/{method}")
    made = {
        "results": {name: _metrics(name, runs) for name, runs in tasks.items()},
        "group_subtasks": under,
        "configs": {name: {"task": name, **tries.settings(runs[0].config)}
                    for name, runs in tasks.items()},
        "versions": {name: _scorer(runs[0]) for name, runs in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {name: _directions(runs[0]) for name, runs in tasks.items()},
        "n-samples": {name: _samples(runs[0]) for name, runs in tasks.items()},
        "config": {"model": "d3po-bench", "model_args": {"pretrained": model},
                   "device": first.files.facts.get("device"), "seeds": _seeds(tasks)},
        "git_hash": first.files.facts.get("commit"),
        "date": _date(tasks),
        "transformers_version": first.files.facts.get("packages", {}).get("transformers"),
        "task_hashes": {name: runs[0].files.facts.get("inputs", {}).get("prompts")
                        for name, runs in tasks.items()},
        "model_source": "d3po-bench", "model_name": model,
        "model_name_sanitized": model.replace("/", "__"),
    }  # fmt: skip
    return json.dumps(made, indent=1, allow_nan=False)


def _metrics(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "alias": name,
                             "sample_len": _samples(runs[0])["effective"]}  # fmt: skip
    for metric, sampler, values in _measured(runs):
        error: float | str = "N/A"
        if len(values) > 1:
            error = float(values.std(ddof=1) / math.sqrt(len(values)))
        found |= {f"{metric},{sampler}": float(values.mean()),
                  f"{metric}_stderr,{sampler}": error}  # fmt: skip
    return found


def _measured(runs: Sequence[Run]) -> Iterator[tuple[str, str, Any]]:
    """Metric, sampler and the values of all seeds [S], where each seed has one."""
    for sampler in SAMPLERS:
        for metric, column in COLUMNS.items():
            base, end = np.array([both_ends(run, column, sampler) for run in runs]).T
            if not np.isnan(end).any():
                yield metric, sampler, end
                if metric == "score":
                    yield "base", sampler, base
                    yield "gain", sampler, end - base


def _directions(run: Run) -> dict[str, bool | None]:
    larger = score_of(run.files).sign > 0
    return {
        "score": larger,
        "base": None,
        "gain": larger,
        "recognised": True,
        **dict.fromkeys(DRIFTS, False),
    }


def _scorer(run: Run) -> str | None:
    """What names the content of the objective's scorer."""
    scorers: dict[str, str] = run.files.facts.get("inputs", {}).get("scorers", {})
    return scorers.get(score_of(run.files).scorer)


def _samples(run: Run) -> dict[str, int]:
    """Held-out images of an evaluation, and those that have a score."""
    last = max(row["round"] for row in run.files.evaluation)
    rows = [row for row in run.files.evaluation
            if row["sampler"] == "eta1" and row["round"] == last]  # fmt: skip
    return {"original": len(rows), "effective": sum(row["score"] == row["score"] for row in rows)}


def _seeds(tasks: dict[str, Sequence[Run]]) -> dict[str, list[int]]:
    return {name: [run.seed for run in runs] for name, runs in tasks.items()}


def _date(tasks: dict[str, Sequence[Run]]) -> float | None:
    """When the last run ended, as a UNIX timestamp; None where that is not on record."""
    ends = [str(run.files.facts["ended"]) for runs in tasks.values() for run in runs
            if "ended" in run.files.facts]  # fmt: skip
    try:
        return max(datetime.fromisoformat(end).timestamp() for end in ends)
    except ValueError:  # none, or no date
        return None
