"""`d3po-bench table1`: prompt-image alignment of every method, as Table 1 of the D3PO paper.

Every method trains on the same declared signal, and every model draws the same held-out prompts
from the same noise. A score of the signal itself is marked: a model that was trained on a scorer
is not judged by it.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from d3po_bench import registry
from d3po_bench.config import RunConfig
from d3po_bench.digests import changed
from d3po_bench.errors import UserError
from d3po_bench.launch import launch
from d3po_bench.launch.launch import RunRequest
from d3po_bench.launch.progress import Board
from d3po_bench.models.sources import model_source
from d3po_bench.runs.files import csv_bytes, readable, write_atomically
from d3po_bench.runs.run import LORA, RunFolder, find_runs, read_object
from d3po_bench.training.progress import IMAGE, Counted, Progress
from d3po_bench.training.run import Job
from eval.analysis import choices
from eval.analysis.cells import Cells
from eval.analysis.choices import Choices
from eval.analysis.runs import require_alike
from eval.analysis.scored import (
    BASE,
    BASE_ROWS,
    METHODS,
    SAMPLER,
    columns,
    gains,
    methods,
    rows_of,
    runs_of,
)
from eval.analysis.statistics import from_zero
from eval.analysis.tables import Table, shown, text
from eval.evaluate import plan, work
from eval.tools import TOOLS

PAPER = {
    BASE: (30.7, 1.95, 0.04, 14.7),
    "preferred_images": (31.0, 1.97, 0.08, 11.0),
    "reward_weighted": (31.5, 2.01, 0.17, 18.7),
    "d3po": (31.9, 2.06, 0.27, 55.7),
}
"""Table 1 of arXiv:2311.13231: CLIP, BLIP, ImageReward, human preference in per cent."""

PAPERS_COLUMNS = {"clip": 0, "blip_itm_logit": 1, "blip_base_itm_logit": 1, "image_reward": 2}
"""Our column -> the paper's; its BLIP score is too large for a probability or a cosine.

The paper names model_base.pth, which is blip_base; published tables have blip, or its stand-in.
"""

SIGNAL = {name: f"{name}_itm_logit" for name in ("blip", "blip_base")}
"""Column that holds the score of a scorer with several."""

SAME_JUDGE = {"geneval_soft": "geneval", "geneval": "geneval_soft"}
"""Column -> another that the same network decides."""


@dataclass(frozen=True, kw_only=True)
class Table1Request:
    """What the command line asked for."""

    objective: str
    model: str
    preset: str | None
    settings: Mapping[str, str]
    seeds: range
    scorers: tuple[str, ...]
    prompts: str | None
    """List or file to evaluate on; None for the model's own."""
    count: int | None
    device: str
    jobs: int | None
    out: Path
    track: Sequence[str] = ()
    runs: tuple[Path, ...] = ()
    """Finished runs to take instead of training."""


def run(request: Table1Request, board: Board) -> str:
    """Train or take the models, score them, write and return the table.

    Writes OUT/rows/METHOD-SEED.csv, OUT/table1.csv, .md and .tex, and OUT/signal.json. Raters'
    first choices are read from OUT/choices.

    Raises:
        UserError: bad input, or weights of a scorer that are not there.
        RunError: a run failed; the others are kept.
    """
    jobs = [] if request.runs else _jobs(request)
    folders = _taken(request) if request.runs else {_name(job.config): job.folder for job in jobs}
    configs = [job.config for job in jobs] or [RunFolder(f).config for f in folders.values()]
    drawn = _drawn(configs)
    targets = {BASE_ROWS: Path(request.model), **folders}
    asked = {name: _asked(request, folder, name, drawn) for name, folder in targets.items()}
    # Now, not after hours of training.
    _choices(request.out, [*dict.fromkeys(config.method for config in configs)])
    wanted, prompts = str(asked[BASE_ROWS].prompts), plan.planned(asked[BASE_ROWS]).prompts
    for job in jobs:
        plan.require_held_out(job.config, wanted, prompts, job.folder)
    _require_room(request.out, asked)
    with board:
        made = _made(jobs, asked, request, board)
    signal = {**_signal(request), "rows": made}
    write_atomically(request.out / "signal.json", (json.dumps(signal, indent=1) + "\n").encode())
    return write(request.out)


def _made(
    jobs: list[Job], asked: Mapping[str, plan.EvaluateRequest], request: Table1Request, board: Board
) -> dict[str, str]:
    """Train, then score each model: the digest of each file of rows."""
    images = work.images(plan.planned(asked[BASE_ROWS]))
    waiting = {name: Progress(run=f"scoring {name}", left={IMAGE: images}) for name in asked}
    board.expect(waiting.values())
    if jobs:
        launch.require_all(launch.execute(jobs, request.jobs, board))
    made: dict[str, str] = {}
    for name, evaluation in asked.items():
        told = Counted(waiting[name].run, IMAGE, board.report)
        # What is to be known of the scorers is the same for each model.
        folder = work.run(evaluation, told, board.note)
        rows = (folder / "rows.csv").read_bytes()
        write_atomically(request.out / "rows" / f"{name}.csv", rows)
        made[f"rows/{name}.csv"] = sha256(rows).hexdigest()
    return made


def _signal(request: Table1Request) -> dict[str, str]:
    scorer = registry.name_of("scorer", str(registry.objective(request.objective).scorer))
    name = registry.name_of("objective", request.objective)
    return {"objective": name, "column": SIGNAL.get(scorer, scorer)}


# ---- models


def _name(config: RunConfig) -> str:
    """A run's name among files."""
    return f"{config.method}-{config.seed}"


def _jobs(request: Table1Request) -> list[Job]:
    """The runs that are to be made; what is finished is not trained again."""
    return [
        job
        for method in METHODS
        for job in launch.planned(
            RunRequest(
                method=method, objective=request.objective, model=request.model,
                preset=preset(request), settings=request.settings, seeds=request.seeds,
                device=request.device, out=request.out / "runs", tools=TOOLS, track=request.track,
            )
        )
    ]  # fmt: skip


def preset(request: Table1Request) -> str | None:
    """What was asked for; for the embedded model the one that leaves it mistakes to unlearn."""
    embedded = request.model == "tiny"
    return "alignment" if embedded and request.preset is None else request.preset


def _taken(request: Table1Request) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for run in find_runs(request.runs):
        if not (run.folder / LORA).is_dir():  # it has not ended
            continue
        made, name = run.config, _name(run.config)
        if (made.source("objective"), made.model) != (request.objective, request.model):
            raise UserError(
                f"{run.folder} is a run of {made.model} on {made.objective}, not of "
                f"{request.model} on {request.objective}. Leave it out, or change --model and "
                "--objective."
            )
        if name in found:
            raise UserError(f"{found[name]} and {run.folder} are both {name}. Leave one out.")
        found[name] = run.folder
    if not found:
        raise UserError(
            f"No finished run below {', '.join(map(str, request.runs))}. Make some with "
            "`d3po-bench run`, or leave RUNS out to train them now."
        )
    require_alike([RunFolder(folder) for folder in found.values()])
    return found


def _drawn(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """How all runs sample, and their prompts: the base model must share it to be compared."""
    found: dict[str, dict[str, Any]] = {}
    for c in configs:
        prompts = model_source(c.model).prompts or c.prompt_source
        found[_name(c)] = {
            "steps": c.sampling_steps, "guidance": c.guidance, "prompts": prompts,
            "sampler": c.sampler, "timestep_spacing": c.timestep_spacing, "eta": c.eta,
            "dtype": c.dtype, "full": c.full, "long_prompts": c.long_prompts,
        }  # fmt: skip
    first = next(iter(found))
    for name, how in found.items():
        if how != found[first]:
            raise UserError(
                f"{first} samples with {found[first]}, {name} with {how}: they cannot be compared. "
                "Leave one out."
            )
    return found[first]


def _asked(
    request: Table1Request, target: Path, name: str, drawn: Mapping[str, Any]
) -> plan.EvaluateRequest:
    """The evaluation of a model. It stays in OUT/scoring, which says what its rows were made from.

    Raises:
        UserError: another lies there.
    """
    how = {**drawn, "prompts": request.prompts or drawn["prompts"]}
    place = request.out / "scoring" / name
    asked = plan.EvaluateRequest(
        target=target, scorers=request.scorers, model=None, count=request.count, images=1,
        device=request.device, jobs=request.jobs or 1, out=place, samplers=(SAMPLER,), **how,
    )  # fmt: skip
    if name == BASE_ROWS or (target / LORA).is_dir():  # else it is trained first
        work.require_same(place, asdict(plan.planned(asked)))
    return asked


def _require_room(out: Path, names: Container[str]) -> None:
    """Refuse rows of models that are not asked for: they would stay in the table.

    Raises:
        UserError: naming such rows.
    """
    for path in sorted((out / "rows").glob("*.csv")):
        if path.stem not in names:
            raise UserError(
                f"{path} is of a model that this command does not ask for. Give another --out, or "
                "remove that file."
            )


# ---- the table


def write(out: Path) -> str:
    """Derive the table from OUT/rows, OUT/choices and OUT/signal.json alone, and write it.

    Raises:
        UserError: rows are missing, or were drawn from other prompts; or choices are malformed.
    """
    rows = rows_of(out)
    signal = _recorded_signal(out / "signal.json")
    chosen = _choices(out, methods(rows))
    table = [_row(name, rows, signal["column"], chosen) for name in methods(rows)]
    printed = Table(table, {name: text(name) for name in table[0]}, left=("method",))
    said = _said(signal, chosen) + "\n\n" + printed.markdown()
    write_atomically(out / "table1.csv", csv_bytes(table))
    write_atomically(out / "table1.md", (said + "\n").encode())
    write_atomically(out / "table1.tex", (printed.latex() + "\n").encode())
    return said


def _recorded_signal(path: Path) -> Mapping[str, Any]:
    found = read_object(path)
    rows = found.get("rows", {})  # of an earlier version, nothing is known of them
    with readable(path):
        other = changed(path.parent, {str(n): str(digest) for n, digest in rows.items()})
    if other:
        raise UserError(
            f"{path.parent / other[0]} is missing or was changed since it was made. Give the "
            "command again without --redraw."
        )
    if not {"objective", "column"} <= found.keys():
        raise UserError(
            f"{path} lacks objective or column. Give the command again without --redraw."
        )
    return found


def _choices(out: Path, names: Sequence[str]) -> Choices | None:
    folder = out / "choices"
    found = choices.read(folder, (BASE_ROWS, *dict.fromkeys([*names, *METHODS])))
    for model in found.shares[0] if found else ():
        if model not in (BASE_ROWS, *names):
            raise UserError(
                f"The choices in {folder} name {model}, which is not in the table "
                f"({', '.join(names)}). Add its runs, or leave those files out."
            )
    return found


def _said(signal: Mapping[str, Any], chosen: Choices | None) -> str:
    return (
        f"Trained on the objective {signal['objective']}; † marks the score that a model was "
        f"trained on. Held-out prompts, sampler {SAMPLER}; means over seeds, and differences to "
        f"{BASE} on the same prompts and noise with 95 % intervals over seeds."
        + (f" {chosen.said}" if chosen else "")
    )


def _row(name: str, rows: Mapping[str, pd.DataFrame], signal: str, chosen: Choices | None) -> Cells:
    base = rows[BASE_ROWS]
    runs = runs_of(name, rows)
    cells = {"method": name, "seeds": str(len(runs) or "")}
    for column in columns(rows):
        mark = " †" if column in (signal, SAME_JUDGE.get(signal)) and runs else ""
        cells[column] = _cell(runs, base, column) + mark
        if column in PAPERS_COLUMNS:
            numbers = PAPER.get(name)
            cells[f"{column}, paper"] = str(numbers[PAPERS_COLUMNS[column]]) if numbers else ""
    if chosen is not None:
        cells[chosen.heading] = chosen.cell(BASE_ROWS if name == BASE else name)
    cells["preferred by people, paper"] = f"{PAPER[name][3]:g} %" if name in PAPER else ""
    return cells


def _cell(runs: Sequence[pd.DataFrame], base: pd.DataFrame, column: str) -> str:
    """The mean, and how much more than the base it is; nothing where no scorer said anything."""
    if not runs:
        return shown(base[column].mean(), ".3f")
    seeds = gains(runs, base, column)
    if not np.isfinite(seeds).all():
        return ""
    found = from_zero(seeds)
    spread = "" if np.isnan(found.low) else f", {found.low:+.3f} to {found.high:+.3f}"
    return f"{np.mean([run[column].mean() for run in runs]):.3f} ({found.mean:+.3f}{spread})"
