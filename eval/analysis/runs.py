"""Finished runs as data frames: scores by round, and what they cost."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.runs.files import readable
from d3po_bench.runs.run import BESIDE, IMAGE, RunFolder, find_runs
from eval.analysis.statistics import interval

if TYPE_CHECKING:
    import pandas as pd

    Frame: TypeAlias = pd.DataFrame


DRIFTS = {
    "drift": "drift",
    "kl_trained": "KL, steps trained on",
    "kl": "KL, all steps",
}
"""What evaluations say of the drift, what says most first; runs of earlier versions know `kl`."""

COUNTS = ("pairs", "images", "scorer_calls", "unet_forwards", "unet_backwards")
"""Of `X_LABELS`, what metrics.jsonl counts; every run has the first two."""


MOST = 2.0**53
"""Largest count that a float still tells from the next."""


DRAWN = (
    "sampling_steps", "guidance", "sampler", "timestep_spacing", "eta", "eval_prompts", "eval_list",
    "eval_noise",
)  # fmt: skip
"""Settings that decide what is drawn of which prompts: scores of others are no comparison."""


Group: TypeAlias = tuple[str, str, str]
"""Model, objective, method: the runs that differ in nothing but the seed."""


@dataclass(frozen=True)
class Run:
    """What the figures need of one run."""

    files: RunFolder
    scores: Frame
    """Mean over the evaluation images by (sampler, round): score and whatever else was measured."""
    spent: dict[int, dict[str, float]]
    """Round -> cumulative pairs, images and, where the run has them, the rest of `COUNTS`, seconds
    on the clock and of processors (`cpu`)."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.files.folder

    @property
    def config(self) -> RunConfig:
        """What it was asked for."""
        return self.files.config

    @property
    def group(self) -> Group:
        """The runs that this one is averaged with."""
        return self.config.model, self.config.objective, self.config.method

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    @property
    def last(self) -> int:
        """The round of its last evaluation, training sampler."""
        return int(self.scores.loc["eta1"].index.max())

    @cached_property
    def held_out(self) -> pd.Series:
        """Scores of the last evaluation, training sampler, by (prompt, index)."""
        import pandas as pd

        rows = pd.DataFrame(self.files.evaluation)
        rows = rows[(rows["sampler"] == "eta1") & rows["round"].isin(list(self.spent))]
        last = rows[rows["round"] == rows["round"].max()]
        return last.set_index(["prompt", "index"])["score"].sort_index()

    @property
    def ended(self) -> bool:
        """Whether it was trained and evaluated to its last round, and closed."""
        cut = "run_id" in self.files.facts and not self.files.finished  # after its last round
        return max(self.spent) == self.config.rounds == self.last and not cut


def read_groups(paths: Iterable[Path], *, unfinished: bool = False) -> dict[Group, list[Run]]:
    """Every run below `paths` by model, objective and method; groups and seeds sorted.

    Args:
        paths: run folders, or folders of them at any depth.
        unfinished: take runs that have not ended, too.

    Raises:
        UserError: none is found, one cannot be read or was cut short, they are of several base
            models or weights of a model or scorer, or those of a method have a seed twice or
            differ in more than the seed.
    """
    runs = sorted(map(read_run, evaluated(paths)), key=lambda run: (*run.group, run.seed))
    if not unfinished:
        for run in runs:
            _require_its_end(run)
    require_alike([run.files for run in runs])
    return {group: list(members) for group, members in groupby(runs, lambda run: run.group)}


def require_alike(runs: Sequence[RunFolder]) -> None:
    """Refuse runs that cannot be shown together.

    Raises:
        UserError: they are of several base models, LoRAs to begin with or weights of a model or
            scorer, or those of a method have a seed twice or differ in more than the seed.
    """
    require_same_inputs(runs)
    cells: dict[tuple[str, str], list[RunFolder]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.config.seed):
        cells[run.config.objective, run.config.method].append(run)
    for members in cells.values():
        _require_seeds(members)


def require_same_inputs(runs: Sequence[RunFolder]) -> None:
    """Refuse runs of several base models, or scored in other units.

    Raises:
        UserError: naming two such runs.
    """
    inputs = [(run, dict(run.facts.get("inputs", {}))) for run in runs]
    _require_one("base model", ((run, run.config.model) for run in runs))
    _require_one("content of the base model", ((run, known.get("model")) for run, known in inputs))
    _require_one("LoRA that training began with", ((r, known.get("lora")) for r, known in inputs))
    scorers = [(run, known.get("scorers", {})) for run, known in inputs]
    for name in sorted({name for _, known in scorers for name in known}):
        # Others than these are in other units.
        weights = ((run, known.get(name)) for run, known in scorers)
        _require_one(f"version of the scorer {name}", weights)
    for objective in sorted({run.config.objective for run in runs}):
        known = [(run, i) for run, i in inputs if run.config.objective == objective]
        _require_one("content of the prompts", ((run, i.get("prompts")) for run, i in known))
        for name in (*DRAWN, "eval_images"):
            _require_one(f"setting {name}", ((run, getattr(run.config, name)) for run, _ in known))


def evaluated(paths: Iterable[Path]) -> list[RunFolder]:
    """The runs at or below `paths` that have been evaluated.

    Those whose settings turn evaluation off are passed over.

    Raises:
        UserError: there is none, or one that should have been evaluated was not.
    """
    paths, found = list(paths), []
    for run in find_runs(paths):
        if (run.folder / "eval.csv").is_file():
            found.append(run)
        elif run.config.eval_every > 0:
            raise UserError(
                f"The run in {run.folder} has no eval.csv: it was cut short. Remove that folder "
                "and run it again, or leave it out."
            )
    if not found:
        raise UserError(_nothing(paths))
    return found


def _nothing(paths: Sequence[Path]) -> str:
    """Why nothing below `paths` can be shown, and what to do."""
    where = ", ".join(map(str, paths)) or "the given paths"
    if unseen := find_runs(paths):
        return (
            f"No run below {where} was evaluated, since all have the setting eval_every=0. Score "
            f"one with `d3po-bench evaluate {unseen[0].place}`, or name another folder."
        )
    if trials := find_runs(paths, trials=True):
        return (
            f"All runs below {where} are trials of a search, which differ in their settings. Name "
            f"one of them, such as {trials[0].place}, or another folder."
        )
    return (
        f"There are no run folders (with config.json and eval.csv) below {where}. Make one with "
        "`d3po-bench run`, or name another folder."
    )


def read_run(run: RunFolder) -> Run:
    """The scores of a run, and what they cost.

    Raises:
        UserError: a file is damaged or was changed, or has no row of the training sampler.
    """
    import pandas as pd

    spent = _spent(run)
    run.require_content()
    known = [row for row in run.evaluation if not math.isnan(row["score"])]
    if not any(row["sampler"] == "eta1" and row["round"] in spent for row in known):
        raise UserError(
            f"{run.folder / 'eval.csv'} has no score of the sampler eta1 after a finished round. "
            "Run it again, or leave that folder out."
        )
    rows = pd.DataFrame(run.evaluation)
    measured = [name for name in rows if name not in IMAGE]
    means = rows.groupby(["sampler", "round"])[measured].mean()
    trained = [f"kl_{i + 1}" for i in range(run.config.sampling_steps - run.config.skip_steps)]
    if {*trained} <= {*measured}:
        means["kl_trained"] = means[trained].mean(axis=1)
    return Run(run, means.dropna(subset="score"), spent)


def _spent(run: RunFolder) -> dict[int, dict[str, float]]:
    """What each finished round had cost since the start; evaluation is not a cost.

    Raises:
        UserError: a number is missing, negative, NaN or infinite, or goes back.
    """
    total, seconds = {"seconds": 0.0, "cpu": 0.0}, {0: {"seconds": 0.0, "cpu": 0.0}}
    with readable(run.folder / "timing.jsonl"):
        for line in run.timing:
            total["seconds"] += sum(_amount(line, k) for k in line if k not in BESIDE)
            total["cpu"] += _amount(line, "cpu") if "cpu" in line else math.nan
            seconds[line["round"]] = {k: v for k, v in total.items() if not math.isnan(v)}
    spent = {0: dict.fromkeys(COUNTS, 0.0)}
    with readable(run.folder / "metrics.jsonl"):
        for line in run.metrics:
            number = line["round"]
            known = ("pairs", "images", *(name for name in COUNTS[2:] if name in line))
            spent[number] = {name: _amount(line, name) for name in known}
            for name in spent[number].keys() & spent[number - 1].keys():
                if spent[number][name] < spent[number - 1][name]:
                    raise ValueError(f"the count of {name} goes back in round {number}")
    for round_ in spent.keys() & seconds.keys():
        spent[round_] |= seconds[round_]
    return spent


def _amount(line: Mapping[str, Any], name: str) -> float:
    """A count, or seconds."""
    value = line[name]
    if type(value) not in (int, float) or not 0 <= value <= MOST:
        raise ValueError(f"{ascii(value)[:40]} as {name} of round {line['round']}")
    return float(value)


def _require_its_end(run: Run) -> None:
    """Refuse a run that was stopped: its last scores are no end to compare with others'."""
    if not run.ended:
        raise UserError(
            f"The run in {run.folder} has not ended: {max(run.spent)} of "
            f"{run.config.rounds} rounds, evaluated up to round {run.last}. Resume it with its "
            "command, leave that folder out, or `plot --unfinished`."
        )


def _require_one(what: str, found: Iterable[tuple[RunFolder, Any]]) -> None:
    """Refuse runs that differ in what those shown together share; None: not on record.

    Raises:
        UserError: naming two such runs.
    """
    known = [(run.place, value) for run, value in found if value is not None]
    for folder, value in known:
        first, expected = known[0]
        if value != expected:
            raise UserError(
                f"These runs do not share the {what}: it is {expected!r} in {first} and "
                f"{value!r} in {folder}. Such runs cannot be compared: name only folders of runs "
                f"that share it, as in `d3po-bench report {_without(first, folder)}`."
            )


def _without(run: Path, other: Path) -> str:
    """The outermost folder that holds a run but not the other, for a command."""
    apart = (p for p in run.parents[::-1] if p.absolute() not in other.absolute().parents)
    return shlex.quote(str(next(apart, run)))


def _require_seeds(members: Sequence[RunFolder]) -> None:
    """Refuse runs of one method that differ in more than the seed: a mean would mix them.

    Raises:
        UserError: naming two such runs, or two of one seed.
    """
    for one, other in pairwise(members):  # sorted by seed
        if one.config.seed == other.config.seed:
            raise UserError(
                f"Seed {one.config.seed} of {one.config.method} is there twice, in {one.folder} "
                f"and {other.folder}. Name one of the two."
            )
    for name in sorted(vars(members[0].config).keys() - {"seed"}):
        _require_one(f"setting {name}", ((run, getattr(run.config, name)) for run in members))


def curves(runs: Iterable[Run], x: str) -> Frame:
    """The curve of every seed, with the training sampler.

    Args:
        runs: the runs.
        x: a key of `X_LABELS`.

    Returns:
        A row for each evaluated round of a run, with columns model, objective, method, seed,
        round, x, score (unit of the scorer), animal (probability) and those of `DRIFTS`; NaN where
        not known.

    Raises:
        UserError: a run does not know what is asked for, seconds without a timing.jsonl, say.
    """
    import pandas as pd

    rows = [row for run in runs for row in _curve(run, x)]
    columns = ["model", "objective", "method", "seed", "round", "x", *MEASURED]
    return pd.DataFrame(rows, columns=columns)


MEASURED = ("score", "animal", *DRIFTS)


def _curve(run: Run, x: str) -> list[dict[str, Any]]:
    names = dict(zip(("model", "objective", "method"), run.group, strict=True))
    rows = []
    for round_, scores in run.scores.loc["eta1"].iterrows():
        # An interrupted run may have been evaluated after a round that it then did not log.
        if round_ not in run.spent:
            continue
        measured = scores.reindex([*MEASURED])
        spent = {"rounds": round_, **run.spent[round_], **measured[[*DRIFTS]].dropna()}
        if x not in spent:
            where = {"seconds": "timing.jsonl", "cpu": "timing.jsonl"}.get(x, "metrics.jsonl")
            raise UserError(
                f"{run.folder / ('eval.csv' if x in DRIFTS else where)} does not say the {x} of "
                f"round {round_}. Choose --x pairs or --x images."
            )
        place = {"seed": run.seed, "round": round_, "x": spent[x]}
        rows.append({**names, **place, **measured})
    return rows


def drift_of(table: Frame) -> str | None:
    """The first of `DRIFTS` that all rows of what `curves` returns know; None where none is."""
    return next((name for name in DRIFTS if len(table) and table[name].notna().all()), None)


def averages(table: Frame, column: str = "score") -> Frame:
    """Mean and interval over seeds, at the rounds that all seeds of a method have.

    Args:
        table: what `curves` returns.
        column: score, animal or one of `DRIFTS`.

    Returns:
        A row for each method and round, with columns model, objective, method, round, x (mean
        over seeds), mean, low, high (unit of the column) and seeds (their number).
    """
    import pandas as pd

    keys = ["model", "objective", "method"]
    parts = []
    for group, rows in table.groupby(keys):
        values = rows.pivot(index="seed", columns="round", values=column).dropna(axis=1)
        if values.empty:
            continue
        places = rows.groupby("round")["x"].mean()[values.columns]
        low, high = interval(values.to_numpy())
        numbers = {"x": places.to_numpy(), "mean": values.mean().to_numpy(), "low": low}
        numbers |= {"high": high, "seeds": len(values)}
        named = dict(zip(keys, group, strict=True)) | {"round": values.columns}
        parts.append(pd.DataFrame(named | numbers))
    columns = [*keys, "round", "x", "mean", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
