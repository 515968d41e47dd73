"""`d3po-bench tune`: for every method as many trials, on development seeds, judged by one rule.

A trial is a setting of a method's search space and its runs, a seed after the other. The first
eight cover the space evenly, and at the same rates for every method. The next four repeat the most
promising of them at other rates. Optuna's TPE proposes further ones, one at a time, from the
method's finished trials. So what is proposed does not depend on how many runs are made side by
side, nor on a command that was killed and given again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_bench import registry
from d3po_bench.config import RunConfig
from d3po_bench.digests import short
from d3po_bench.errors import RunError, TryAgainError, UserError, install
from d3po_bench.launch import launch
from d3po_bench.launch.launch import RunRequest
from d3po_bench.launch.progress import Board
from d3po_bench.launch.rule import Rule, Seen, seen_of
from d3po_bench.launch.space import (
    COMMON,
    RATE,
    REFINED,
    SPREAD,
    rescaled,
    settings_of,
    space_of,
    spread,
)
from d3po_bench.launch.state import State, read_state
from d3po_bench.runs.files import csv_bytes, taken, write_atomically
from d3po_bench.runs.run import JOURNAL
from d3po_bench.training.progress import label

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

TABLE = "trials.csv"
"""What is published of a search, beside the `JOURNAL` that Optuna remembers it by."""

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
    rule: Rule = field(default_factory=Rule)
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
    most = max(COMMON["images_per_prompt"])
    if request.images % most:
        raise UserError(
            f"--images is {request.images}. Give a multiple of {most}, the most images of a prompt."
        )
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

    method: str
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
            "first trials": f"Latin hypercube of {SPREAD}, then {REFINED} rates of one of them",
        }  # fmt: skip

    def make(self, board: Board) -> None:
        """Make the trials that are missing, of all methods side by side.

        Raises:
            UserError: bad input.
            TryAgainError: it was asked to stop; the same command resumes.
        """
        with board as shown:
            while live := [trial for method in self.studies for trial in self._next(method)]:
                self._try(live, shown)

    def _next(self, method: str) -> list[_Live]:
        """The trials that can be made side by side: those under way, and those not yet asked for.

        The first ones are fixed before any result, the next four by those; others come one by one.
        """
        from optuna.trial import TrialState

        study, space = self.studies[method], self.spaces[method]
        live = []
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.params.keys() == space.keys():
                live.append(self._live(method, trial.number, trial.params))
            else:  # killed while it was being written down
                study.tell(trial.number, state=TrialState.FAIL)
        ended = len(self.whole(method))
        number = ended + len(live)
        ends = (SPREAD, SPREAD + REFINED) if RATE in space else (SPREAD,)
        until = next((end for end in ends if ended < end), number + (0 if live else 1))
        numbers = range(number, min(until, self.request.trials))
        points = zip(numbers, self._points(method, numbers), strict=True)
        return live + [self._ask(method, number, point) for number, point in points]

    def _points(self, method: str, numbers: range) -> list[dict[str, Any] | None]:
        """What trials of one stage try; None for what Optuna is to propose."""
        space = self.spaces[method]
        if numbers.stop <= SPREAD:
            return [spread(space, number, self.request.sampler_seed) for number in numbers]
        if numbers.stop > SPREAD + REFINED or RATE not in space or not numbers:
            return [None for _ in numbers]
        first = self.whole(method)[:SPREAD]
        made = [[*self.shown(method, trial).values()] for trial in first]
        best, broken = self.request.rule.promising(made)
        return [rescaled(space, first[best].params, n - SPREAD, lower=broken) for n in numbers]

    def _ask(self, method: str, number: int, point: dict[str, Any] | None) -> _Live:
        """Begin a trial of a method, at a point or where Optuna proposes."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        study, space = self.studies[method], self.spaces[method]
        seed = short(f"{self.request.sampler_seed}/{method}/{number}")
        study.sampler = TPESampler(seed=int(seed, 16) % 2**32, n_startup_trials=0)
        waiting = study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if point and not waiting:  # else a killed command left this one in the queue
            study.enqueue_trial(point)
        asked = study.ask({
            name: FloatDistribution(*of, log=True) if isinstance(of, tuple)
            else CategoricalDistribution(of) for name, of in space.items()
        })  # fmt: skip
        return self._live(method, asked.number, asked.params)

    def _live(self, method: str, number: int, params: Mapping[str, Any]) -> _Live:
        config, images = self.configs[method], self.request.images
        return _Live(method, number, settings_of(params, config, images), [])

    def whole(self, method: str) -> list[FrozenTrial]:
        """The trials of a method that have ended, however they did."""
        space, found = self.spaces[method], self.studies[method].get_trials(deepcopy=False)
        return [t for t in found if t.state.is_finished() and t.params.keys() == space.keys()]

    def _try(self, live: Sequence[_Live], board: Board) -> None:
        """Make trials, a seed after the other while they break no bound."""
        from optuna.trial import TrialState

        for seed in self.request.seeds:
            if not live:
                return
            failed, going = self._made(live, seed, board), []
            for trial in live:
                if trial not in failed:
                    trial.seen.append(self.seen(trial, seed))
                    if not self.request.rule.broken(trial.seen[-1]):
                        going.append(trial)
                        continue
                state = TrialState.FAIL if trial in failed else TrialState.PRUNED
                self.studies[trial.method].tell(trial.number, state=state)
            live = going
        for trial in live:
            self.studies[trial.method].tell(trial.number, self.request.rule.worth(trial.seen))

    def _made(self, live: Sequence[_Live], seed: int, board: Board) -> list[_Live]:
        """Make the runs of a seed; the trials of which one has failed.

        Raises:
            UserError: it is not the trial that is to blame.
        """
        jobs, of = [], dict[str, _Live]()
        for trial in live:
            for one in self.request.of(trial.method, trial.number, seed, trial.settings):
                (job,) = launch.planned(one)
                name = f"trial {trial.number} of {label(job.config)}"
                jobs.append(replace(job, name=name))
                of[name] = trial
        run = self.request.run
        problems = launch.execute(jobs, run.jobs, board, where=run.where)
        for name, problem in problems.items():
            if not isinstance(problem, RunError) or isinstance(problem, TryAgainError):
                launch.require_all({name: problem})
        return [of[name] for name in problems]

    # ---- what came of it

    def folders(self, trial: _Live, seed: int) -> dict[Path, RunConfig]:
        """The run folders of a trial with a seed, one for each objective."""
        requests = self.request.of(trial.method, trial.number, seed, trial.settings)
        configs = [(one.out, launch.configured(one)[0]) for one in requests]
        return {launch.run_folder(out, config): config for out, config in configs}

    def seen(self, trial: _Live, seed: int) -> Seen:
        """What the finished runs of a trial with a seed showed."""
        found = [self.request.measure(folder) for folder in self.folders(trial, seed)]
        signs = [registry.objective(name).sign for name in self.request.objectives]
        return seen_of(found, signs)

    def states(self, trial: _Live) -> dict[int, list[State]]:
        """Seed -> where its runs are."""
        return {
            seed: [read_state(*run) for run in self.folders(trial, seed).items()]
            for seed in self.request.seeds
        }

    def shown(self, method: str, trial: FrozenTrial) -> dict[int, Seen]:
        """Seed -> what it showed, of those whose runs have all finished.

        Raises:
            UserError: the runs of a trial that did not fail are gone.
        """
        live = self._live(method, trial.number, trial.params)
        found = {
            seed: self.seen(live, seed) for seed, of in self.states(live).items()
            if all(state.name == "finished" for state in of)
        }  # fmt: skip
        if not found and trial.state.name != "FAIL":
            out = self.request.run.out
            raise UserError(
                f"{out / JOURNAL} has a trial {trial.number} of {method}, but {out} has no runs of "
                "it. Restore them, or give another --out."
            )
        return found

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
        own = self._live(method, trial.number, trial.params)
        seeds = self.shown(method, trial)
        said = [state.why for states in self.states(own).values() for state in states]
        said += map(self.request.rule.broken, seeds.values())
        last = [*seeds.values()]
        return {
            "method": method, "trial": trial.number, "state": trial.state.name.lower(),
            "chosen": "yes" if chosen else "", "value": "" if trial.value is None else trial.value,
            "why": next(filter(None, said), ""),
            **{f"gain, seed {seed}": found.gain for seed, found in seeds.items()},
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
