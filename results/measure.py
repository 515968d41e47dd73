"""Measure what documents show and no run folder holds; minutes to hours each.

    python results/measure.py step-shares
    python results/measure.py coverage
    python results/measure.py rounds normalcy --seed 0
    python results/measure.py preference runs/table1 --seed 0
    python results/measure.py collect runs/feedback
    python results/measure.py publish runs/reproduce/tiny results/tiny
    python results/measure.py publish runs/reproduce/tiny2 results/tiny2 --pack

`step-shares`, `coverage`, `collect` and `publish` write into this folder, from which make.py then
writes the documents. Every rater is SIMULATED.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

# An editable install of another checkout has a folder `results`, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3po_bench import registry
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.seeding import normal, stream
from d3po_bench.errors import said_in_one_line
from d3po_bench.feedback import comparisons, simulated, training
from d3po_bench.feedback.drawing import draw_round
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.simulated import Annotator, Rule
from d3po_bench.feedback.store import open_labels
from d3po_bench.feedback.study import one_question
from d3po_bench.feedback.votes import scores_of
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import load
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.runs.packed import PACKED, pack
from d3po_bench.runs.run import LORA, find_runs
from d3po_bench.setting import pairs_of
from d3po_bench.training.tools import Tools
from eval.analysis.runs import evaluated
from eval.analysis.scored import BASE_ROWS, SAMPLER
from eval.evaluate import plan, work
from eval.figures.curves import plot
from eval.tools import TOOLS
from eval.verify.folder import FILES
from results import coverage

sys.path.pop(0)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
PATH = click.Path(path_type=Path)
THERE = click.Path(path_type=Path, exists=True)


@click.group()
def main() -> None:
    """Measure what documents show and no run folder holds."""


# ---- which denoising steps decide a picture's JPEG size

REPEATS = 4


@main.command("step-shares")
def step_shares() -> None:
    """Draw animals again with the noise of one step alone drawn afresh; writes step-shares.csv.

    A share is the mean squared change of the JPEG size over the change when the noise of all
    steps is new. The first noise is kept, as in a pair of D3PO, and shares need not add up to 1.
    "Sensitivity" is E^2 / 2 s^2 of the sampler's step, with E the coefficient of the predicted
    noise and s the standard deviation: nats of KL per unit of squared change of that prediction.
    """
    torch.set_num_threads(1)
    rows = [row for steps in (10, 6) for row in _shares(steps)]
    write_atomically(HERE / "step-shares.csv", csv_bytes(rows))


@torch.no_grad()
def _shares(steps: int) -> list[dict[str, Any]]:
    policy = Policy(load(registry.model_source("tiny"), CPU, Training()), steps=steps)
    prompts, scorer = read_prompts("animals"), registry.load_scorer("jpeg_size", CPU)
    text, shape = policy.model.encode(prompts), policy.model.latent_shape

    def noise(index: int) -> Tensor:
        streams = (stream(0, "steps", index, i) for i in range(steps + 1))
        return normal((len(prompts), *shape), streams)

    def sizes(noise: Tensor) -> Tensor:
        x = noise[0]
        for step, step_noise in enumerate(noise[1:]):
            x = policy.step(x, torch.full((len(x),), step), text).sample(step_noise)
        return scorer(policy.model.decode(x), prompts)

    def change(fresh: Sequence[int]) -> float:
        """Mean squared change, kB^2, when the noise of these steps is drawn afresh."""
        total = 0.0
        for repeat in range(REPEATS):
            one, other = noise(2 * repeat), noise(2 * repeat + 1)
            mixed = one.clone()
            mixed[1:][fresh] = other[1:][fresh]
            total += float((sizes(mixed) - sizes(one)).square().mean()) / REPEATS
        return total

    whole = change(range(steps))
    sensitivity = policy.table.output.square() / (2 * policy.table.std.square())
    return [
        {"T": steps, "step": i + 1, "timestep": int(policy.levels[i]),
         "share": f"{change([i]) / whole:.3f}", "sensitivity": f"{float(sensitivity[i]):.2f}"}
        for i in range(steps)
    ]  # fmt: skip


@main.command("coverage")
def intervals_hold() -> None:
    """Draw seeds whose truth is known, and count how often our intervals hold it."""
    coverage.measure()


# ---- Figures 4 and 5: rates over rounds of feedback


@dataclass(frozen=True)
class Experiment:
    """What is asked, and the settings that were chosen for it on seeds 100 and 101."""

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
    model: str = "tiny"


JUDGED = simulated.by_scorer("geneval_soft", 0.5)
"""Version 2's first judge sees what the caption says."""


def not_as_asked(images: Tensor, prompts: Sequence[str], tools: Tools) -> Tensor:
    """The opposite: what was asked for is what is not wanted."""
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
    # On version 2 raters have a judge of their own, and what they say is measured otherwise.
    "captions2": Experiment(
        "deformed", {"guidance": "1"}, {"d3po": {}}, JUDGED,
        simulated.by_scorer("geneval_second", 0.5), simulated.by_scorer("animal:tiny2", 0.5),
        prompts="geneval", model="tiny2",
    ),
    "safety2": Experiment(
        "unsafe", {"guidance": "1"}, {"d3po": {}}, not_as_asked,
        simulated.harmless, simulated.by_scorer("animal:tiny2", 0.5),
        prompts=str(HERE / "red-cards.txt"), model="tiny2",
    ),
}  # fmt: skip


@main.command()
@click.argument("experiment", type=click.Choice(list(EXPERIMENTS)))
@click.option("--method", default="d3po", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--rounds", "count", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--raters", "number", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--error", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--count", "of", type=click.IntRange(min=1), help="Prompts a round; default: all.")
@click.option("--prompts", help="Another list or file.")
@click.option("--draw", multiple=True, metavar="KEY=VALUE", help="Another way to draw.")
@click.option("--set", "learn", multiple=True, metavar="KEY=VALUE", help="Another way to learn.")
@click.option("--out", type=PATH, default=Path("runs/feedback"))
def rounds(
    experiment: str, method: str, seed: int, count: int, number: int, error: float,
    of: int | None, prompts: str | None, draw: tuple[str, ...], learn: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Play Figures 4 and 5 on the embedded model: draw, tag, learn, draw again.

    A round draws seven images of each prompt from one noise, simulated raters tag the bad ones,
    D3PO learns from the tags against the model that drew the round, and the next round draws with
    what was learned; or another method does. Writes OUT/EXPERIMENT/error-E/seed-N/rates.csv, with
    -METHOD after EXPERIMENT for another; the same command resumes.
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
            place, asked, prompts or own.prompts, count=of, seed=seed, before=before,
            model=own.model, settings={} if before else own.drawing | pairs_of(draw),
            device="cpu",
        )  # fmt: skip
        pool = [Annotator(error=error)] * number
        simulated.simulate(place, None, pool, seed * 1000 + index, TOOLS, rule=own.said)
        rows.append({"round": index, **_rates(place, round_, own)})
        click.echo(rows[-1])
        write_atomically(folder / "rates.csv", csv_bytes(rows))
        if index < count:
            before = place / "trained" / method
            settings = own.learning[method] | pairs_of(learn)
            request = training.TrainRequest(
                method=method, passes=1, settings=settings, preset=None, device="cpu", tools=TOOLS
            )
            training.train(training.data_of(place, scores_of(place)), request, before)


def _rates(place: Path, round_: Round, own: Experiment) -> dict[str, Any]:
    """Shares of good images, as raters said and as is measured, and of recognised animals."""
    good, known = (
        torch.stack([worth[item.id] > 0 for item in round_.items]).float()
        for worth in (simulated.worths(place, round_, rule, TOOLS)
                      for rule in (own.good, own.known))
    )  # fmt: skip
    said = 1 + scores_of(place).mean()
    shares = {"said_good": said, "good": good.mean(), "recognised": known.mean()}
    return {"images": good.numel()} | {k: round(float(v), 6) for k, v in shares.items()}


# ---- Figure 7: whose picture is the first choice

METHODS = ("preferred_images", "reward_weighted", "d3po")
RATERS = 5


@main.command()
@click.argument("runs", type=THERE)
@click.option("--seed", "number", type=click.IntRange(min=0), default=0, help="0: the first.")
@click.option("--method", "methods", multiple=True, default=METHODS, show_default=True)
@click.option("--by", help="Scorer that raters judge by; default: image_reward:tiny.")
@click.option("--error", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--count", type=click.IntRange(min=1), help="Captions; default: all.")
@click.option("--out", type=PATH, default=Path("runs/feedback"))
def preference(
    runs: Path, number: int, methods: tuple[str, ...], by: str | None, error: float,
    temperature: float, count: int | None, out: Path,
) -> None:  # fmt: skip
    """Play Figure 7: let five simulated raters compare the models of one seed of RUNS.

    Takes each method's run of that seed, and the base model, draws the held-out captions with each
    from the same noise, and compares every two pictures of a caption. Writes
    OUT/preference/error-E/seed-N.csv, a row for each model, and the same as `d3po-bench table1`
    reads it to choices/ beside it; the same command resumes.
    """
    place = out / "preference"
    found = [run for run in find_runs([runs]) if (run.folder / LORA).is_dir()]
    trained = {m: [run for run in found if run.config.method == m][number] for m in methods}
    own = trained[methods[0]].config
    targets = {BASE_ROWS: Path(own.model), **{m: run.folder for m, run in trained.items()}}
    sources = []
    for name, target in targets.items():
        request = plan.EvaluateRequest(
            target=target, scorers=(), model=own.model, prompts=None, count=count, images=1,
            steps=own.sampling_steps, guidance=own.guidance, device="cpu", jobs=1,
            out=place / "drawn" / f"{name}-{number}", save=True,
        )  # fmt: skip
        sources.append(work.run(request) / "pictures" / SAMPLER)
    erring = f"error-{error:g}" + (f"-temperature-{temperature:g}" if temperature else "")
    folder = place / erring / f"seed-{number}"
    if not (folder / "round.json").exists():
        comparisons.take(folder, sources, one_question("pairs", "alignment"))
    rule = simulated.by_scorer(by) if by else None
    pool = [Annotator(error, temperature=temperature)] * RATERS
    simulated.simulate(folder, None, pool, number, TOOLS, rule=rule)
    with open_labels(folder, None) as store:
        shares = comparisons.choices(store, folder)
    rows = [{"model": m, "share": round(s.share, 6)}
            for m, s in zip((BASE_ROWS, *methods), shares, strict=True)]  # fmt: skip
    write_atomically(folder.with_suffix(".csv"), csv_bytes(rows))
    comparisons.write_choices(folder.parent / "choices" / f"{folder.name}.csv", shares)
    for row in rows:
        click.echo(row)


# ---- into this folder


@main.command()
@click.argument("runs", type=THERE)
def collect(runs: Path) -> None:
    """Copy the rows that `rounds` and `preference` wrote below RUNS into tiny/feedback.

    Raters without errors are those of Table 1: their choices go to its folder.
    """
    rates = [
        {"experiment": p.parts[-4], "error": p.parts[-3][6:], "seed": p.parts[-2][5:]} | row
        for p in sorted(runs.glob("*/error-*/seed-*/rates.csv"))
        for row in read_csv(p)
    ]
    chosen = [
        {"error": p.parts[-2][6:], "seed": p.stem[5:]} | row
        for p in sorted(runs.glob("preference/error-*/seed-*.csv"))
        for row in read_csv(p)
    ]
    for name, rows in (("rounds", rates), ("preference", chosen)):
        if rows:
            write_atomically(HERE / "tiny" / "feedback" / f"{name}.csv", csv_bytes(rows))
    for path in runs.glob("preference/error-0/choices/seed-*.csv"):
        write_atomically(HERE / "tiny" / "table1" / "choices" / path.name, path.read_bytes())


@main.command()
@click.argument("runs", type=THERE)
@click.argument("target", type=PATH)
@click.option("--sheets/--no-sheets", default=True, help="Draw the sheets of samples, too.")
@click.option("--pack", "packed", is_flag=True, help=f"As one file, {PACKED}.")
def publish(runs: Path, target: Path, sheets: bool, packed: bool) -> None:
    """Replace the runs in TARGET by the text files of those below RUNS.

    Weights and pictures stay behind, so the sheets of samples have to be drawn now.
    """
    found, old = evaluated([runs]), [run.folder for run in find_runs([target])]
    files = {(run.place / name).relative_to(runs).as_posix(): run.folder / name
             for run in found for name in FILES}  # fmt: skip
    if packed:
        pack(target / PACKED, files)
    for folder in old:
        if folder.is_relative_to(target):  # else it was unpacked
            shutil.rmtree(folder)
    if not packed:
        (target / PACKED).unlink(missing_ok=True)
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
    if (runs / "diversity.csv").is_file():
        write_atomically(target / "diversity.csv", (runs / "diversity.csv").read_bytes())
    if sheets:
        plot([runs], target / "figures")


if __name__ == "__main__":
    with said_in_one_line():
        main()
