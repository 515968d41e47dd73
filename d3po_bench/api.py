"""Runs from Python: what `import d3po_bench` offers. The command line stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from d3po_bench import own
from d3po_bench.config import MOST_SEEDS
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch import launch
from d3po_bench.launch.grid import as_set
from d3po_bench.launch.launch import Deterministic
from d3po_bench.launch.progress import Board, Level
from d3po_bench.machine import device_of
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.sources import load, model_source
from d3po_bench.runs import remote
from d3po_bench.runs.run import LORA, RunFolder
from d3po_bench.scoring import undisturbed
from d3po_bench.training.inputs import require_unchanged
from d3po_bench.types import Method, Objective, Scorer
from eval.analysis.loaded import Runs
from eval.analysis.runs import evaluated
from eval.tools import TOOLS

__all__ = [
    "Method", "Objective", "RunError", "Runs", "Scorer", "UserError", "load_pipeline", "load_runs",
    "run",
]  # fmt: skip


def run(
    *, objective: str | Objective | Scorer | Callable[..., Any],
    method: str | Method[Any] | type[Method[Any]] = "d3po",
    scorers: str | Sequence[str | Scorer] = (), seeds: int | range = 1, model: str | Path = "tiny",
    prompts: str | Path | None = None, preset: str | None = None,
    settings: Mapping[str, object] | None = None, rounds: int | None = None, device: str = "auto",
    jobs: int = 1, ranks: int = 1, out: str | Path = "runs", resume: bool = True,
    track: str | Sequence[str] = (), quiet: bool = False, deterministic: Deterministic = "auto",
) -> Runs:  # fmt: skip
    """Fine-tune a model, a run for each seed, as `d3po-bench run` does.

    The same call resumes what was interrupted and reads what has finished. Torch's threads, seed
    and kernels are afterwards as they were.

    Args:
        objective: what is learned to please: a name, a file or a sum as after `--objective`, an
            `Objective`, or a function or class that scores, with attributes unit and direction.
        method: what learns: a name or a file, a method's class, or one with its options.
        scorers: what else judges at every evaluation, in place of the preset's.
        seeds: how many, from 0, or which, such as `range(5, 10)`.
        model: tiny, tiny2, sd15, a diffusers folder, a hub id, or a file with a model family.
        prompts: a list or a file; None for the objective's own.
        preset: settings to start from; None for the one made for the model.
        settings: what `--set` takes, such as `{"learning_rate": 1e-3}`.
        rounds: sampling rounds; None for the preset's. More than before extend what is there.
        device: auto, cpu, cuda, cuda:1 or mps.
        jobs: seeds side by side; with several, `if __name__ == "__main__":` around a script's code.
        ranks: processes that share each run, a GPU for each, as for `jobs`.
        out: folder of the run folders, or an address such as s3://BUCKET/runs.
        resume: continue runs that are already there.
        track: trackers that show the runs live: tensorboard, wandb.
        deterministic: on: the same bits each time, or an error; auto: on a CPU alone.
        quiet: show no progress on stderr.

    Raises:
        UserError: bad input, before anything is written.
        RunError: a run failed; the others have finished.
    """
    _require_kinds(rounds=rounds, jobs=jobs, ranks=ranks, settings=settings, out=out)
    learns, options = _method(method)
    chosen = {**options, **(settings or {}), **_watching(scorers)}
    request = launch.RunRequest(
        method=learns, objective=_objective(objective), model=str(model), preset=preset,
        prompts=None if prompts is None else str(prompts), settings=_as_text(chosen),
        rounds=rounds, seeds=_counted(seeds), device=device, jobs=jobs, ranks=ranks,
        out=_out(out), resume=resume, track=[track] if isinstance(track, str) else track,
        tools=TOOLS, deterministic=deterministic,
    )  # fmt: skip
    with undisturbed():
        return Runs(tuple(launch.run(request, Board(Level.QUIET if quiet else Level.NORMAL))))


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rounds": (lambda v: v is None or type(v) is int, "a whole number"),
    **dict.fromkeys(("jobs", "ranks"), (lambda v: type(v) is int and v > 0, "a number from 1")),
    "settings": (
        lambda v: v is None or isinstance(v, Mapping),
        'a mapping such as {"learning_rate": 1e-3}',
    ),
    "out": (lambda v: isinstance(v, str | Path), "a folder or an address"),
}
"""Argument -> what it has to be, and how that is said."""


def _require_kinds(**given: Any) -> None:
    """Refuse what type checkers would have refused.

    Raises:
        UserError: an argument is of another kind.
    """
    for name, value in given.items():
        fits, words = _KINDS[name]
        if not fits(value):
            raise UserError(f"{name}={value!r} is not {words}. Give one.")


def _out(place: str | Path) -> Path:
    return remote.workplace(str(place)) if remote.is_address(str(place)) else Path(place)


def _watching(scorers: str | Sequence[str | Scorer]) -> dict[str, list[str]]:
    judges = [scorers] if isinstance(scorers, str) else scorers
    return {"eval_scorers": [_text(scorer) for scorer in judges]} if judges else {}


def _text(thing: Any) -> str:
    return thing if isinstance(thing, str) else own.hold(thing)


def _objective(given: Any) -> str:
    """A text that stands for an objective; for an object it says all that it consists of."""
    if not isinstance(given, Objective):
        return _text(given)
    parts = (f"{name}={value!r}" for name, value in
             vars(replace(given, scorer=_text(given.scorer))).items())  # fmt: skip
    return own.hold(given, f"Objective({', '.join(parts)})")


def _method(given: Any) -> tuple[str, dict[str, object]]:
    """A text that stands for a method, and the options that it was made with."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, type) or not is_dataclass(given):
        return own.hold(given), {}
    chosen = {f.name: getattr(given, f.name) for f in fields(given) if f.init}
    usual = {f.name: f.default for f in fields(given)}
    return own.hold(type(given)), {k: v for k, v in chosen.items() if v != usual[k]}


def _counted(seeds: int | range) -> range:
    found = range(seeds) if isinstance(seeds, int) else seeds
    if not isinstance(found, range) or not 0 < len(found) <= MOST_SEEDS or min(found) < 0:
        raise UserError(f"seeds={seeds} are no seeds. Give a number from 1 to {MOST_SEEDS}, or a "
                        "range of numbers from 0, such as range(5, 10).")  # fmt: skip
    return found


def _as_text(settings: Mapping[str, object]) -> dict[str, str]:
    try:
        return {name: as_set(value) for name, value in settings.items()}
    except ValueError as problem:
        raise UserError(f"{settings!r} are no settings: {problem}.") from problem


def load_runs(*paths: str | Path) -> Runs:
    """The evaluated runs at or below `paths` or addresses, at any depth, finished or not.

    Raises:
        UserError: there is none.
    """
    places = (remote.copy(str(p)) if remote.is_address(str(p)) else Path(p) for p in paths)
    return Runs(tuple(run.folder for run in evaluated(places)))


def load_pipeline(run: str | Path, device: str = "auto") -> Any:
    """Diffusers' pipeline of a run's base model, with what the run trained on it.

    Everything is in float32; `.to(torch.float16)` changes that. A LoRA is an adapter as that of
    `load_lora_weights`: `disable_lora()` gives the base model.

    Args:
        run: the folder of a finished run.
        device: where it computes.

    Raises:
        UserError: the run has not ended, the base model or the weights are not those that it
            ended with, or its model is of a family without a pipeline.
    """
    made = RunFolder(Path(run))
    config, weights = made.config, made.folder / LORA
    if not weights.is_dir():
        raise UserError(f"{weights} is not there: the run has not ended. Run it again: it resumes.")
    require_unchanged(made, LORA, None)
    model = load(model_source(config.model), device_of(device), Training())
    if not isinstance(model, DiffusersModel):
        raise UserError(f"The model {config.model} is no pipeline of diffusers. Load it as your "
                        "file does.")  # fmt: skip
    model.load_saved(weights)
    return model.pipeline
