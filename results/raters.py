"""Figures 4, 5 and 7 of the paper, played with SIMULATED raters: commands of measure.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from d3po_bench.config import Execution, RunConfig
from d3po_bench.errors import UserError
from d3po_bench.feedback import comparisons, simulated, training
from d3po_bench.feedback.drawing import draw_round
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.sampling import Sampling, draw
from d3po_bench.feedback.simulated import Annotator, Rule
from d3po_bench.feedback.store import open_labels
from d3po_bench.feedback.study import one_question
from d3po_bench.feedback.votes import scores_of
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.runs.run import LORA, RunFolder, find_runs
from d3po_bench.setting import pairs_of
from d3po_bench.training.tools import Tools
from eval.analysis.scored import BASE_ROWS, SAMPLER
from eval.evaluate import plan, work
from eval.tools import TOOLS
from results.feedback import QUESTIONS, learned_of, path_of

HERE = Path(__file__).resolve().parent
PATH = click.Path(path_type=Path)
THERE = click.Path(path_type=Path, exists=True)

# ---- Figures 4 and 5: rates over rounds of feedback


@dataclass(frozen=True)
class Experiment:
    """What is asked, and the settings for it, chosen on seeds 100 and 101."""

    question: str
    drawing: dict[str, str]
    learning: dict[str, dict[str, str]]
    """Method -> how it learns from the votes."""
    said: Rule
    """What raters judge by."""
    good: Rule
    """What the rate is measured by."""
    known: Rule = simulated.recognised
    prompts: str = "animals"
    count: int | None = None
    """Of the prompts; None for all."""
    model: str = "tiny"


JUDGED = simulated.by_scorer("geneval_soft", 0.5)
"""Version 2's first judge sees what the caption says."""


def not_as_asked(images: Tensor, prompts: Sequence[str], tools: Tools) -> Tensor:
    """Bad where the picture shows what its prompt asks for."""
    return -JUDGED(images, prompts, tools)


EXPERIMENTS = {
    # Five steps, so that the embedded model makes mistakes: with ten it draws every animal right.
    "normalcy": Experiment(
        "deformed",
        {"sampling_steps": "5", "skip_steps": "2"},
        {
            # One update from the tags of 45 prompts: few pictures are bad, fewer tags are noise.
            "d3po": {
                "skip_steps": "2",
                "timestep_fraction": "1",
                "prompts_per_round": "45",
                "units_per_update": "100000",
                "learning_rate": "0.005",
            },
            "diffusion_dpo": {},
            "kto": {
                "skip_steps": "0",
                "prompts_per_round": "45",
                "units_per_update": "32",
                "learning_rate": "0.0025",
            },
        },
        simulated.recognised,
        simulated.recognised,
        prompts="captions",
    ),
    "safety": Experiment(
        "unsafe", {}, {"d3po": {"units_per_update": "16"}}, simulated.harmless, simulated.harmless
    ),
    # On version 2 raters have a judge of their own, and what they say is measured otherwise. Rates
    # and steps are what results/tries.py chose.
    "captions2": Experiment(
        "deformed", {"guidance": "1"},
        {"d3po": {"prompts_per_round": "45", "updates_per_round": "4", "learning_rate": "0.002"}},
        JUDGED,
        simulated.by_scorer("geneval_second", 0.5), simulated.by_scorer("animal:tiny2", 0.5),
        prompts="geneval", count=45, model="tiny2",
    ),
    "safety2": Experiment(
        "unsafe", {"guidance": "1"},
        {"d3po": {"prompts_per_round": "45", "updates_per_round": "16", "learning_rate": "0.0005"}},
        not_as_asked,
        simulated.harmless, simulated.by_scorer("animal:tiny2", 0.5),
        prompts=str(HERE / "red-cards.txt"), model="tiny2",
    ),
}  # fmt: skip


@click.command()
@click.argument("experiment", type=click.Choice(list(EXPERIMENTS)))
@click.option("--method", default="d3po", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--rounds", "count", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--raters", "number", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--error", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--count", "of", type=click.IntRange(min=1), help="Prompts a round.")
@click.option("--prompts", help="Another list or file.")
@click.option("--draw", multiple=True, metavar="KEY=VALUE", help="Another way to draw.")
@click.option("--set", "learn", multiple=True, metavar="KEY=VALUE", help="Another way to learn.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=PATH, default=Path("runs/feedback"))
def rounds(
    experiment: str, method: str, seed: int, count: int, number: int, error: float,
    of: int | None, prompts: str | None, draw: tuple[str, ...], learn: tuple[str, ...],
    device: str, out: Path,
) -> None:  # fmt: skip
    """Play Figures 4 and 5 on the embedded model: draw, tag, learn, draw again.

    A round draws seven images of each prompt from one noise, simulated raters tag the bad ones,
    D3PO learns from the tags against the model that drew the round, and the next round draws with
    what was learned; or another method does. Where each round has other prompts, the base model
    draws them, too. A play ends early where raters find nothing bad, or nothing good. Writes
    OUT/EXPERIMENT/error-E/seed-N/rates.csv, with -METHOD after EXPERIMENT for another; the same
    command resumes.
    """
    own = EXPERIMENTS[experiment]
    name = experiment if method == "d3po" else f"{experiment}-{method}"
    folder = out / name / f"error-{error:g}" / f"seed-{seed}"
    rows: list[dict[str, Any]] = []
    before = None
    for index in range(count + 1):
        place = folder / f"round-{index}"
        asked = one_question("tags", own.question)
        round_ = draw_round(
            place, asked, prompts or own.prompts, count=of or own.count, seed=seed, before=before,
            model=own.model, preset=None if before else "quick",
            settings={} if before else own.drawing | pairs_of(draw), device=device,
        )  # fmt: skip
        pool = [Annotator(error=error)] * number
        simulated.simulate(place, None, pool, seed * 1000 + index, TOOLS, rule=own.said)
        rows.append({"round": index, **_rates(place, round_, own)})
        if of or own.count:
            base, sampling = folder / f"base-{index}", Sampling.read(place)
            rows[-1]["base"] = untrained(sampling, own, base, device)
        click.echo(rows[-1])
        write_atomically(folder / "rates.csv", csv_bytes(rows))
        if index < count:
            before = place / "trained" / method
            settings = own.learning[method] | pairs_of(learn)
            request = training.TrainRequest(
                method=method,
                passes=1,
                settings=settings,
                preset="quick",
                device=device,
                tools=TOOLS,
            )
            try:
                training.train(training.data_of(place, scores_of(place)), request, before)
            except training.TiesError as problem:
                click.echo(f"The play ends here. {problem}")
                return


def untrained(sampling: Sampling, own: Experiment, place: Path, device: str) -> float:
    """The rate of the base model on the prompts and noise of a round, drawn at `place`."""
    asked = one_question("tags", own.question), Path()
    drawn = draw(place, replace(sampling, adapter=""), asked, None, Execution(device=device))
    return round(_share(place, drawn, own.good), 6)


def _share(place: Path, drawn: Round, rule: Rule) -> float:
    """Of images that are good by a rule."""
    worth = simulated.worths(place, drawn, rule, TOOLS)
    return float(torch.stack([worth[item.id] > 0 for item in drawn.items]).float().mean())


def _rates(place: Path, round_: Round, own: Experiment) -> dict[str, Any]:
    """Shares of good images, as raters said and as is measured, and of recognised animals."""
    scores = scores_of(place)
    shares = {"said_good": 1 + scores.mean(), "good": _share(place, round_, own.good),
              "recognised": _share(place, round_, own.known)}  # fmt: skip
    return {"images": scores.size} | {k: round(float(v), 6) for k, v in shares.items()}


# ---- Figure 7: whose picture is the first choice

METHODS = ("preferred_images", "reward_weighted", "d3po")
RATERS = 5


@click.command()
@click.argument("runs", type=THERE)
@click.option(
    "--nth", type=click.IntRange(min=0), default=0, help="Of each method's seeds, from 0."
)
@click.option("--method", "methods", multiple=True, default=METHODS, show_default=True)
@click.option("--by", help="Scorer that raters judge by; default: image_reward:tiny.")
@click.option("--error", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--count", type=click.IntRange(min=1), help="Captions; default: all.")
@click.option("--out", type=PATH, default=Path("runs/feedback"))
def preference(
    runs: Path, nth: int, methods: tuple[str, ...], by: str | None, error: float,
    temperature: float, count: int | None, out: Path,
) -> None:  # fmt: skip
    """Play Figure 7: let five simulated raters compare the models of one seed of RUNS.

    Takes the NTH seed of each method, and the base model, draws the model's held-out captions with
    each from the same noise, and compares every two pictures of a caption. Writes
    OUT/preference/error-E/seed-N.csv, a row for each model, and the same as `d3po-bench table1`
    reads it to choices/ beside it; the same command resumes.
    """
    trained = _nth(runs, methods, nth)
    place, own = out / "preference", trained[methods[0]].config
    targets = {BASE_ROWS: Path(own.model), **{m: run.folder for m, run in trained.items()}}
    sources = [_drawn(target, own, count, place / "drawn" / f"{name}-{nth}")
               for name, target in targets.items()]  # fmt: skip
    judged = f"-by-{by or 'rule'}-at-{temperature:g}" if by or temperature else ""
    folder = place / f"error-{error:g}{judged}".replace(":", "-") / f"seed-{nth}"
    if not (folder / "round.json").exists():
        comparisons.take(folder, sources, one_question("pairs", "alignment"))
    pool = [Annotator(error, temperature=temperature)] * RATERS
    rule = simulated.by_scorer(by) if by else None
    simulated.simulate(folder, None, pool, nth, TOOLS, rule=rule)
    with open_labels(folder, None) as store:
        if comparisons.sources_of(store.round, folder) != [str(source) for source in sources]:
            raise UserError(f"{folder} compares other models. Give another --out.")
        shares = comparisons.choices(store, folder)
    rows = [{"model": m, "share": round(s.share, 6)}
            for m, s in zip(targets, shares, strict=True)]  # fmt: skip
    write_atomically(folder.with_suffix(".csv"), csv_bytes(rows))
    comparisons.write_choices(folder.parent / "choices" / f"{folder.name}.csv", shares)
    for row in rows:
        click.echo(row)


def _nth(runs: Path, methods: Sequence[str], nth: int) -> Mapping[str, RunFolder]:
    """Of each method the run with its nth seed.

    Raises:
        UserError: a method has fewer, or the runs are of several objectives.
    """
    there = [run for run in find_runs([runs]) if (run.folder / LORA).is_dir()]
    found = {}
    for method in methods:
        own = sorted((r for r in there if r.config.method == method), key=lambda r: r.config.seed)
        if len(own) <= nth:
            raise UserError(
                f"{runs} has {len(own)} finished runs of {method}. Give a smaller --nth."
            )
        found[method] = own[nth]
    if len({(run.config.model, run.config.objective) for run in found.values()}) > 1:
        raise UserError(f"{runs} has runs of several objectives or models. Give a folder of one.")
    return found


def _drawn(target: Path, own: RunConfig, count: int | None, out: Path) -> Path:
    """The folder of a model's pictures, drawn as runs draw theirs."""
    request = plan.EvaluateRequest(
        target=target, scorers=(), model=own.model, prompts=None, count=count, images=1,
        steps=own.sampling_steps, guidance=own.guidance, sampler=own.sampler, eta=own.eta,
        timestep_spacing=own.timestep_spacing, dtype=own.dtype, device="cpu", jobs=1, out=out,
        save=True, samplers=(SAMPLER,),
    )  # fmt: skip
    return work.run(request) / "pictures" / SAMPLER


# ---- into this folder


@click.command()
@click.argument("runs", type=THERE)
def collect(runs: Path) -> None:
    """Copy what `rounds` and `preference` wrote below RUNS to the rows of their version.

    First choices also go to Table 1: those of raters without errors to version 1's, those of
    raters that judge by a scorer to version 2's.
    """
    rates = [
        {"experiment": p.parts[-4], "error": p.parts[-3][6:], "seed": p.parts[-2][5:]} | row
        for p in sorted(runs.glob("*/error-*/seed-*/rates.csv")) for row in read_csv(p)
    ]  # fmt: skip
    learned = [*learned_of(runs)]
    for home, own in QUESTIONS.items():
        _keep(home, "rounds", [row for row in rates if row["experiment"].partition("-")[0] in own])
        mine = [row for row in learned if row["play"].split("/")[0].partition("-")[0] in own]
        _keep(home, "learned", mine)
    chosen = [
        {"error": p.parts[-2][6:], "seed": p.stem[5:]} | row
        for p in sorted(runs.glob("preference/error-*/seed-*.csv"))
        if "-by-" not in p.parts[-2]
        for row in read_csv(p)
    ]
    _keep("tiny", "preference", chosen)
    for home, raters in (("tiny", "error-0"), ("alignment", "error-0-by-*")):
        for path in runs.glob(f"preference/{raters}/choices/seed-*.csv"):
            write_atomically(HERE / home / "table1" / "choices" / path.name, path.read_bytes())


def _keep(home: str, name: str, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        write_atomically(path_of(home, name), csv_bytes(rows))
