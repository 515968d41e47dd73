"""Finished runs as data frames: scores by round, and what they cost."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from d3po_bench.config import RunConfig
from d3po_bench.errors import UserError
from d3po_bench.runs.run import read_config, read_facts, read_lines, require_content
from eval.analysis.statistics import interval

if TYPE_CHECKING:
    import pandas as pd

    Frame: TypeAlias = pd.DataFrame


COUNTS = ("pairs", "images", "scorer_calls", "unet_forwards", "unet_backwards")
"""Of `X_LABELS`, what metrics.jsonl counts; every run has the first two."""


IMAGE = ("round", "sampler", "prompt", "index")
"""Columns that name an evaluation image; the others measure it."""


MOST = 2.0**53
"""Largest count that a float still tells from the next."""


Group: TypeAlias = tuple[str, str, str]
"""Model, objective, method: the runs that differ in nothing but the seed."""


@dataclass(frozen=True)
class Run:
    """What the figures need of one run folder."""

    folder: Path
    config: dict[str, Any]
    scores: Frame
    """Mean over the evaluation images by (sampler, round): score and whatever else was measured."""
    spent: dict[int, dict[str, float]]
    """Round -> cumulative pairs, images and, where the run has them, the rest of `X_LABELS`."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What names the content of model, prompts and scorers; {} where that is not on record."""

    @property
    def group(self) -> Group:
        """The runs that this one is averaged with."""
        model, objective, method = (self.config[k] for k in ("model", "objective", "method"))
        return model, objective, method

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])


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
    runs = sorted(map(read_run, find_runs(paths)), key=lambda run: (*run.group, run.seed))
    for run in [] if unfinished else runs:
        _require_its_end(run)
    _require_one_model(runs)
    _require_one_scorer(runs)
    groups = _grouped(runs)
    for members in groups.values():
        _require_one("prompts", members)
    return groups


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The folders at or below `paths` that hold config.json and eval.csv, each once, sorted.

    Runs whose settings turn evaluation off are passed over.

    Raises:
        UserError: there is none, or one that should have been evaluated was not.
    """
    paths = list(paths)
    folders = {c.parent.resolve(): c.parent for p in paths for c in p.rglob("config.json")}
    found = sorted(f for f in folders.values() if _is_evaluated(f))
    if not found:
        raise UserError(
            "Expected run folders (with config.json and eval.csv) below "
            f"{', '.join(map(str, paths)) or 'the given paths'}, got none. Make one with "
            "`d3po-bench run`, or name another folder."
        )
    return found


def _is_evaluated(folder: Path) -> bool:
    """Whether the folder has an evaluation; False where its settings ask for none.

    Raises:
        UserError: it should have one.
    """
    if (folder / "eval.csv").is_file():
        return True
    try:
        off = json.loads((folder / "config.json").read_text(encoding="utf-8"))["eval_every"] == 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        off = False
    if not off:
        raise UserError(
            f"Expected config.json and eval.csv in {folder}, got no eval.csv: the run was cut "
            "short. Remove that folder and run it again, or leave it out."
        )
    return False


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        UserError: a file is missing, damaged, cut short or has no row of the training sampler.
    """
    config = read_config(folder)
    try:
        scores, spent = _mean_scores(folder / "eval.csv"), _spent(folder)
        facts = read_facts(folder)
        inputs = facts.get("inputs")
        run = Run(folder, config, scores, spent, inputs if isinstance(inputs, dict) else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        detail = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise _unreadable(folder, detail) from problem
    require_content(folder, facts)
    if not any(sampler == "eta1" and n in run.spent for sampler, n in run.scores.index):
        raise UserError(
            "Expected evaluation rows of the sampler eta1 and a finished round in "
            f"{folder / 'eval.csv'}, got none. "
            "Run it again, or leave that folder out."
        )
    return run


def _unreadable(folder: Path, detail: str) -> UserError:
    return UserError(
        f"Expected a readable run in {folder}, got {detail}. Remove that folder and run it again, "
        "or leave it out."
    )


def _mean_scores(path: Path) -> Frame:
    """Means over the evaluation images; images without a score are left out.

    Raises:
        ValueError: the file does not end where an evaluation ends, or holds what none writes.
    """
    rows = _rows(path)
    counts = rows.groupby(["round", "sampler"]).size().unstack(fill_value=0).stack()
    if counts.nunique() > 1:
        (round_, sampler), count = counts.idxmin(), counts.min()
        raise ValueError(
            f"{count} of {counts.max()} images of round {round_}, sampler {sampler}, in {path.name}"
        )
    columns = [c for c in rows if c not in IMAGE]
    return rows.groupby(["sampler", "round"])[columns].mean().dropna(subset="score")


def _rows(path: Path) -> Frame:
    """The rows of the evaluation images, each image once, with numbers that can be averaged."""
    import pandas as pd

    text = path.read_text(encoding="utf-8")
    # Half a number reads as a number: 1.4 of 1.445.
    if not text.endswith("\n"):
        raise ValueError(f"half a line at the end of {path.name}")
    if "\0" in text:
        raise ValueError(f"a null byte in {path.name}")
    rows = pd.read_csv(io.StringIO(text))
    if rows[list(IMAGE)].isna().any(axis=None):
        raise ValueError(f"a row without round, sampler, prompt or index in {path.name}")
    for name in ("round", "index") if len(rows) else ():  # no column of no rows has a type
        if not pd.api.types.is_integer_dtype(rows[name]) or (rows[name] < 0).any():
            raise ValueError(f"another {name} than a whole number from 0 in {path.name}")
    if rows.duplicated(list(IMAGE)).any():
        raise ValueError(f"two rows of one image in {path.name}")
    _require_numbers(rows.drop(columns=list(IMAGE)), path.name)
    return rows


def _require_numbers(columns: Frame, name: str) -> None:
    """Refuse scores that are text, true or false, or infinite; one that is not there is none.

    Raises:
        ValueError: naming the column.
    """
    for column in columns:
        if len(columns) and column not in columns.select_dtypes("number"):
            raise ValueError(f"another {column} than a number in {name}")
        if (columns[column].abs() == math.inf).any():
            raise ValueError(f"an infinite {column} in {name}")


def _spent(folder: Path) -> dict[int, dict[str, float]]:
    """What each finished round had cost since the start; evaluation is not a cost.

    Raises:
        ValueError: a round is not there or there twice, or a number is none or goes back.
    """
    total, seconds = 0.0, {0: 0.0}
    for line in _rounds(folder / "timing.jsonl"):
        total += sum(_amount(line, stage) for stage in line if stage not in ("round", "evaluate"))
        seconds[line["round"]] = total
    spent = {0: dict.fromkeys(COUNTS, 0.0)}
    for line in _rounds(folder / "metrics.jsonl"):
        number = line["round"]
        known = ("pairs", "images", *(name for name in COUNTS[2:] if name in line))
        spent[number] = {name: _amount(line, name) for name in known}
        for name in spent[number].keys() & spent[number - 1].keys():
            if spent[number][name] < spent[number - 1][name]:
                raise ValueError(f"a count of {name} that goes back in round {number}")
    for round_ in spent.keys() & seconds.keys():
        spent[round_]["seconds"] = seconds[round_]
    return spent


def _rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of a file with one for each round, from 1; none where there is no file."""
    lines = read_lines(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if line["round"] != number:
            raise ValueError(f"round {line['round']} in line {number} of {path.name}")
    return lines


def _amount(line: Mapping[str, Any], name: str) -> float:
    """A count, or seconds."""
    value = line[name]
    if type(value) not in (int, float) or not 0 <= value <= MOST:
        raise ValueError(f"{ascii(value)[:40]} as {name} of round {line['round']}")
    return float(value)


def _require_its_end(run: Run) -> None:
    """Refuse a run that was stopped: its last scores are no end to compare with others'."""
    done, due = max(run.spent), run.config.get("rounds", RunConfig.rounds)
    evaluated = max(n for sampler, n in run.scores.index if sampler == "eta1")
    if done != due or evaluated != due:
        raise UserError(
            f"Expected runs that have ended, got {done} of {due} rounds in {run.folder}, evaluated "
            f"up to {evaluated}. Run its command again, which goes on from there, leave that "
            "folder out, or `plot --unfinished`."
        )


def _require_one_model(runs: Sequence[Run]) -> None:
    """Refuse runs of several base models: their scores do not start at the same height."""
    first = runs[0]
    for run in runs:
        if run.config["model"] != first.config["model"]:
            raise UserError(
                f"Expected runs of one base model, got {first.config['model']} in {first.folder} "
                f"and {run.config['model']} in {run.folder}. Name the folder of one model."
            )
    _require_one("model", runs)


def _require_one(name: str, runs: Iterable[Run]) -> None:
    """Refuse runs whose input of that name had other content, where that is on record.

    Raises:
        UserError: naming two such runs.
    """
    known = [run for run in runs if name in run.inputs]
    for run in known:
        if run.inputs[name] != known[0].inputs[name]:
            raise UserError(
                f"Expected runs that share their {name}, got {known[0].inputs[name]} in "
                f"{known[0].folder} and {run.inputs[name]} in {run.folder}: files of one name had "
                "other content. Name the runs of one."
            )


def _require_one_scorer(runs: Sequence[Run]) -> None:
    """Refuse runs whose scorers had other weights: their scores are not in one unit.

    Raises:
        UserError: naming the scorer and both runs.
    """
    first: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for name, weights in scorers_of(run).items():
            known, folder = first.setdefault(name, (weights, run.folder))
            if known != weights:
                raise UserError(
                    f"Expected runs scored by one {name}, got weights {known} in {folder} and "
                    f"{weights} in {run.folder}. Name the runs of one."
                )


def scorers_of(run: Run) -> dict[str, str]:
    """Scorer -> what names its weights, of a run; {} where that is not on record."""
    found = run.inputs.get("scorers")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _grouped(runs: Iterable[Run]) -> dict[Group, list[Run]]:
    """Runs by model, objective and method.

    Raises:
        UserError: runs of a group differ in more than the seed, so a mean would mix them.
    """
    groups: dict[Group, list[Run]] = {}
    for run in runs:
        members = groups.setdefault(run.group, [])
        if members:
            _require_seeds(members, run)
        members.append(run)
    return groups


def _require_seeds(members: Sequence[Run], run: Run) -> None:
    """Refuse a run that has the seed of a member, or other settings than the first."""
    twin = next((m for m in members if m.seed == run.seed), None)
    if twin is not None:
        raise UserError(
            f"Expected each seed of {run.config['method']} once, got seed {run.seed} in "
            f"{twin.folder} and {run.folder}. Name one of the two."
        )
    ours, theirs = run.config, members[0].config
    shared = (ours.keys() & theirs.keys()) - {"seed", "run_id"}
    for key in sorted(key for key in shared if ours[key] != theirs[key]):
        raise UserError(
            f"Expected the seeds of {ours['method']} to share their settings, got {key} "
            f"{theirs[key]!r} in {members[0].folder} and {ours[key]!r} in {run.folder}. Plot "
            "them one by one."
        )


def curves(runs: Iterable[Run], x: str) -> Frame:
    """The curve of every seed, with the training sampler.

    Args:
        runs: the runs.
        x: a key of `X_LABELS`.

    Returns:
        A row for each evaluated round of a run, with columns model, objective, method, seed,
        round, x, score (unit of the scorer) and animal (probability; NaN where not known).

    Raises:
        UserError: a run does not know what is asked for, seconds without a timing.jsonl, say.
    """
    import pandas as pd

    rows = [row for run in runs for row in _curve(run, x)]
    columns = ["model", "objective", "method", "seed", "round", "x", "score", "animal"]
    return pd.DataFrame(rows, columns=columns)


def _curve(run: Run, x: str) -> list[dict[str, Any]]:
    names = dict(zip(("model", "objective", "method"), run.group, strict=True))
    rows = []
    for round_, scores in run.scores.loc["eta1"].iterrows():
        # An interrupted run may have been evaluated after a round that it then did not log.
        if round_ not in run.spent:
            continue
        if x not in run.spent[round_]:
            where = run.folder / ("timing.jsonl" if x == "seconds" else "metrics.jsonl")
            raise UserError(
                f"Expected the {x} of round {round_} in {where}, got none. Choose --x pairs or "
                "--x images."
            )
        place = {"seed": run.seed, "round": round_, "x": run.spent[round_][x]}
        rows.append({**names, **place, **scores.reindex(["score", "animal"])})
    return rows


def averages(table: Frame, column: str = "score") -> Frame:
    """Mean and interval over seeds, at the rounds that all seeds of a method have.

    Args:
        table: what `curves` returns.
        column: score or animal.

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
