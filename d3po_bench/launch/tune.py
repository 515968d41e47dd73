"""`d3po-bench tune`: for every method as many trials, on development seeds, judged by one rule.

A trial is a setting of a method's search space and its runs, a seed after the other. The first
eight cover the space evenly, and at the same rates for every method; Optuna's TPE proposes further
ones from the method's finished trials. All methods are asked for one at a time, so what is proposed
does not depend on how many runs are made side by side, nor on a command that was killed and given
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d3po_bench import registry
from d3po_bench.config import RunConfig
from d3po_bench.digests import short
from d3po_bench.errors import RunError, TryAgainError, UserError, install
from d3po_bench.launch import launch
from d3po_bench.launch.launch import RunRequest
from d3po_bench.launch.progress import Board
from d3po_bench.launch.space import SPREAD, settings_of, space_of, spread
from d3po_bench.launch.state import read_state
from d3po_bench.runs.files import csv_bytes, taken, write_atomically
from d3po_bench.training.progress import label

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

JOURNAL, TABLE = "trials.log", "trials.csv"
"""What Optuna remembers a search by, and what is published of it."""

# ---- the rule


@dataclass(frozen=True)
class Seen:
    """What the runs of one seed showed at their end, on held-out noise."""

    gain: float
    """Of the objective, positive where it went the right way; S where there are two."""
    recognised: float
    """Probability of the prompted animal, of the worse run; NaN where nothing measured it."""
    drift: float
    """As evaluations measure it, of the run that went farther."""


@dataclass(frozen=True)
class Rule:
    """Which trial is best: the largest mean gain over the seeds, none of which breaks a bound."""

    recognised: float | None = None
    """The least."""
    drift: float | None = None
    """The most."""

    def broken(self, seen: Seen) -> str:
        """Which bound a seed breaks, with its number; "" for none. NaN breaks each."""
        if self.recognised is not None and not seen.recognised >= self.recognised:
            return f"recognised {seen.recognised:.3f}, below {self.recognised:g}"
        if self.drift is not None and not seen.drift <= self.drift:
            return f"drift {seen.drift:.3f}, above {self.drift:g}"
        return "" if math.isfinite(seen.gain) else "no gain was measured"

    def worth(self, seeds: Sequence[Seen]) -> float | None:
        """Mean gain, or None where a seed breaks a bound."""
        if any(self.broken(seen) for seen in seeds):
            return None
        return sum(seen.gain for seen in seeds) / len(seeds)


# ---- what is asked for


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """A search: methods, a number of trials for each, and the runs of a trial."""

    methods: Sequence[str]
    run: RunRequest
    """The runs of a trial: objective, model, preset, settings, jobs and place; `out` is the folder
    of the search. Method and seeds are filled in."""
    seeds: Sequence[int]
    """Of development: none that anything is reported on."""
    trials: int
    images: int = 0
    """Of a round, the same for every method; 0: as many as the preset has."""
    against: str | None = None
    """The objective of the other sign, if S is sought: half the difference of the two gains."""
    rule: Rule = Rule()
    sampler_seed: int = 0
    measure: Callable[[Path], Mapping[str, float]]
    """gain, recognised and drift of a run folder."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Those that each trial runs on."""
        return (self.run.objective, *([self.against] if self.against else []))

    def of(self, method: str, number: int, seed: int, settings: Mapping[str, str]) -> list[Any]:
        """The runs of a trial with a seed, one for each objective."""
        place = replace(
            self.run, method=method, out=self.run.out / f"trial-{number:03}",
            seeds=range(seed, seed + 1), settings={**self.run.settings, **settings},
        )  # fmt: skip
        return [replace(place, objective=objective) for objective in self.objectives]


def require(request: TuneRequest) -> None:
    """Refuse a search that cannot be made.

    Raises:
        UserError: a package is missing, the two objectives are not one with two signs, or two
            settings say how many images a round has.
    """
    try:
        import optuna
    except ImportError as problem:
        raise UserError(
            f"A search needs the extra `tune`. Install it: {install('tune')}."
        ) from problem
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if request.images and "prompts_per_round" in request.run.settings:
        raise UserError("--images says how many prompts a round has. Leave out prompts_per_round.")
    if request.against:
        one, other = map(registry.objective, request.objectives)
        if one.scorer != other.scorer or one.sign == other.sign:
            raise UserError(
                f"{request.against} is not {request.run.objective} with the other sign: S is for "
                "one score that is to grow, and to shrink. Leave out --against."
            )


# ---- the search


@dataclass
class _Live:
    """A trial whose runs are being made."""

    number: int
    settings: dict[str, str]
    seen: list[Seen]


class Search:
    """The studies of a request, and the loop that asks them."""

    def __init__(self, request: TuneRequest) -> None:
        """Open or begin the studies.

        Raises:
            UserError: bad input, or the folder holds another search.
        """
        require(request)
        self.request = request
        self.configs = {
            method: launch.configured(replace(request.run, method=method))[0]
            for method in request.methods
        }
        given = request.run.settings
        self.spaces = {m: space_of(config, given) for m, config in self.configs.items()}
        self.studies = dict(self._studies())

    def _studies(self) -> Iterator[tuple[str, Study]]:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        out = self.request.run.out
        _mend(out / JOURNAL)
        storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
        for method, config in self.configs.items():
            study = optuna.create_study(
                storage=storage, study_name=method, direction="maximize", load_if_exists=True
            )
            now = self._identity(method, config)
            was = study.user_attrs.get("of", now)
            if differing := [name for name in now if was.get(name) != now[name]]:
                raise UserError(
                    f"{out} holds another search: its {', '.join(differing)} differ for {method}. "
                    "Give another --out."
                )
            study.set_user_attr("of", now)
            yield method, study

    def _identity(self, method: str, config: RunConfig) -> dict[str, Any]:
        """What makes a search this one."""
        request = self.request
        space = {name: list(of) for name, of in self.spaces[method].items()}
        return {
            "objectives": list(request.objectives), "seeds": list(request.seeds),
            "run": short(config.to_json()), "space": space, "sampler seed": request.sampler_seed,
            "rule": [request.rule.recognised, request.rule.drift], "images": request.images,
            "first trials": f"Latin hypercube of {SPREAD}",
        }  # fmt: skip

    def make(self, board: Board) -> None:
        """Make the trials that are missing, of all methods side by side.

        Raises:
            UserError: bad input.
            TryAgainError: it was asked to stop; the same command resumes.
        """
        with board as shown:
            while live := {m: trial for m in self.studies if (trial := self._next(m))}:
                self._try(live, shown)

    def _next(self, method: str) -> _Live | None:
        """The trial that was under way, or a new one; None when there are enough."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        study, space = self.studies[method], self.spaces[method]
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and trial.params.keys() == space.keys():
                return self._live(method, trial.number, trial.params)
            if trial.state == TrialState.RUNNING:  # killed while it was being written down
                study.tell(trial.number, state=TrialState.FAIL)
        number, seed = len(self.whole(method)), self.request.sampler_seed
        if number >= self.request.trials:
            return None
        study.sampler = TPESampler(
            seed=int(short(f"{seed}/{method}/{number}"), 16) % 2**32, n_startup_trials=0
        )
        waiting = study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if number < SPREAD and not waiting:  # else a killed command left this one in the queue
            study.enqueue_trial(spread(space, number, seed))
        asked = study.ask({
            name: FloatDistribution(*of, log=True) if isinstance(of, tuple)
            else CategoricalDistribution(of) for name, of in space.items()
        })  # fmt: skip
        return self._live(method, asked.number, asked.params)

    def _live(self, method: str, number: int, params: Mapping[str, Any]) -> _Live:
        config, images = self.configs[method], self.request.images
        return _Live(number, settings_of(params, config, images), [])

    def whole(self, method: str) -> list[FrozenTrial]:
        """The trials of a method that have ended, however they did."""
        space, found = self.spaces[method], self.studies[method].get_trials(deepcopy=False)
        return [t for t in found if t.state.is_finished() and t.params.keys() == space.keys()]

    def _try(self, live: dict[str, _Live], board: Board) -> None:
        """Make one trial of each method, a seed after the other while it breaks no bound."""
        from optuna.trial import TrialState

        for seed in self.request.seeds:
            if not live:
                return
            failed = self._made(live, seed, board)
            for method, trial in [*live.items()]:
                study = self.studies[method]
                if method not in failed:
                    trial.seen.append(self.seen(method, trial, seed))
                    if not self.request.rule.broken(trial.seen[-1]):
                        continue
                state = TrialState.FAIL if method in failed else TrialState.PRUNED
                study.tell(trial.number, state=state)
                del live[method]
        for method, trial in live.items():
            self.studies[method].tell(trial.number, self.request.rule.worth(trial.seen))

    def _made(self, live: Mapping[str, _Live], seed: int, board: Board) -> set[str]:
        """Make the runs of a seed; the methods of which one has failed.

        Raises:
            UserError: it is not the trial that is to blame.
        """
        jobs, names, of = [], {}, {}
        for method, trial in live.items():
            for one in self.request.of(method, trial.number, seed, trial.settings):
                (job,) = launch.planned(one)
                jobs.append(job)
                name = label(job.config)
                of[name], names[name] = method, f"trial {trial.number} of {name}"
        run = self.request.run
        problems = launch.execute(jobs, run.jobs, names, board, where=run.where)
        for name, problem in problems.items():
            if not isinstance(problem, RunError) or isinstance(problem, TryAgainError):
                launch.require_all({names[name]: problem})
        return {of[name] for name in problems}

    # ---- what came of it

    def folders(self, method: str, trial: _Live, seed: int) -> dict[Path, RunConfig]:
        """The run folders of a trial with a seed, one for each objective."""
        requests = self.request.of(method, trial.number, seed, trial.settings)
        configs = [(one.out, launch.configured(one)[0]) for one in requests]
        return {launch.run_folder(out, config): config for out, config in configs}

    def seen(self, method: str, trial: _Live, seed: int) -> Seen:
        """What the finished runs of a trial with a seed showed."""
        found = [self.request.measure(folder) for folder in self.folders(method, trial, seed)]
        signs = [registry.objective(name).sign for name in self.request.objectives]
        gains = [sign * one["gain"] for sign, one in zip(signs, found, strict=True)]
        return Seen(
            gain=sum(gains) / len(gains),  # (grown + shrunk) / 2, where there are two signs
            recognised=float(np.min([one["recognised"] for one in found])),  # NaN if any is
            drift=float(np.max([one["drift"] for one in found])),
        )

    def best(self, method: str) -> FrozenTrial | None:
        """The trial of a method that the rule chooses; None where all have broken or failed."""
        known = [trial for trial in self.whole(method) if trial.value is not None]
        return max(known, key=lambda trial: trial.value or 0.0, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """Every trial of every method, those that failed or broke a bound among them."""
        best = {method: self.best(method) for method in self.studies}
        return [
            self._row(method, trial, chosen=trial == best[method])
            for method in self.studies
            for trial in self.whole(method)
        ]

    def _row(self, method: str, trial: FrozenTrial, *, chosen: bool) -> dict[str, Any]:
        own, seeds = self._live(method, trial.number, trial.params), dict[int, Seen]()
        why = ""
        for seed in self.request.seeds:
            states = [read_state(*run) for run in self.folders(method, own, seed).items()]
            why = why or next((state.why for state in states if state.why), "")
            if all(state.name == "finished" for state in states):
                seeds[seed] = self.seen(method, own, seed)
                why = why or self.request.rule.broken(seeds[seed])
        last = [*seeds.values()]
        return {
            "method": method, "trial": trial.number, "state": trial.state.name.lower(),
            "chosen": "yes" if chosen else "", "value": "" if trial.value is None else trial.value,
            "why": why, **{f"gain, seed {seed}": found.gain for seed, found in seeds.items()},
            "recognised": min((found.recognised for found in last), default=""),
            "drift": max((found.drift for found in last), default=""), "settings": own.settings,
        }  # fmt: skip


def _mend(journal: Path) -> None:
    """Take away what a killed process left: half of a line, and Optuna's own lock.

    It is called with the folder's lock, so that no other process writes.
    """
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.exists():
        whole, end, half = journal.read_bytes().rpartition(b"\n")
        if half:
            write_atomically(journal, whole + end)


def run(request: TuneRequest, board: Board | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Make the trials of a search that are missing, and write its table.

    Args:
        request: what is searched.
        board: shows how far the runs are.

    Returns:
        The table, and its rows.

    Raises:
        UserError: bad input.
        TryAgainError: it was asked to stop; the same command resumes.
    """
    with taken(request.run.out):
        search = Search(request)
        search.make(board or Board())
        rows = search.rows()
        flat = [{**row, **row["settings"]} for row in rows]
        for row in flat:
            del row["settings"]
        write_atomically(request.run.out / TABLE, csv_bytes(flat))
    return request.run.out / TABLE, rows
