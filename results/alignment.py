"""GenEval's share right before and after training, as PROTOCOL.md asks under "Alignment".

    python -m results.alignment runs/alignment

draws `geneval-unseen` with the base model and with the LoRA of each run below that folder, and what
the base model would have drawn in the last rounds of each seed. That is about an hour of one core.
It writes alignment/unseen.csv and alignment/rewards.csv.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from d3po_bench.config import RunConfig
from d3po_bench.errors import said_in_one_line
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from d3po_bench.runs.packed import PACKED
from eval.analysis import scored
from eval.analysis.gains import both_ends
from eval.analysis.runs import Run, evaluated, read_groups
from eval.analysis.statistics import Difference, by_seed, from_zero, over_both
from eval.analysis.tables import Record, Table, change, ends, number, over_seeds, spread, text
from eval.analysis.worded import Words, adjusted, said
from results.claims import bullets, by_first, than
from results.tuning import TRIALS, tuning

HOME = Path(__file__).resolve().parent / "alignment"
UNSEEN, REWARDS = HOME / "unseen.csv", HOME / "rewards.csv"
SAMPLERS = {"eta1": "eta 1", "eta0": "eta 0"}
JUDGES = ("geneval", "geneval_second")
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
FAMILIES = (("d3po_best_of_k", "ddpo"), ("d3po",))
"""Methods whose tests are adjusted together: the grids of PROTOCOL.md, one after the other."""

BASE = "no fine-tune"
VARIED = 20
"""Captions whose pictures are compared with each other."""

TABLE1, AGAIN = HOME / "table1", HOME.parent / "table1-v2"
"""Rows of Table 1, and the runs behind it."""

RIVAL = "d3po_best_of_k"
"""What the rows of Table 1 are compared with."""

LAST = 6
"""Rounds whose rewards are compared with those that the base model gets of the same prompts and
noise: prompts differ from round to round by more than training does."""


def there() -> bool:
    """Whether the runs have been published."""
    return (HOME / PACKED).is_file()


@cache
def runs() -> Mapping[str, list[Run]]:
    """Method -> its runs, by seed."""
    return {method: found for (_, _, method), found in read_groups([HOME]).items()}


# ---- measured


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def measure(folder: Path) -> None:
    """Write alignment/unseen.csv and alignment/rewards.csv of the runs below FOLDER."""
    found = evaluated([folder])
    rows = [*_drawn(BASE, "", Path("tiny2"), folder)]
    for run in found:
        rows += _drawn(run.config.method, str(run.config.seed), run.folder, folder)
    write_atomically(UNSEEN, csv_bytes(rows))
    # All methods draw the same: the first run of a seed stands for all.
    configs = {run.config.seed: run.config for run in reversed(found)}
    rewards = [row for seed in sorted(configs) for row in _rewarded(configs[seed])]
    write_atomically(REWARDS, csv_bytes(rewards))


def _rewarded(config: RunConfig) -> Iterator[dict[str, Any]]:
    """The base model's mean reward of what the last rounds of a run ask for."""
    from d3po_bench.config import Execution
    from d3po_bench.models.sources import model_source
    from d3po_bench.training.run import Job, on_policy
    from d3po_bench.training.trainer import Trainer
    from eval.tools import TOOLS

    cpu = torch.device("cpu")
    job = Job(config=config, execution=Execution(), folder=Path("unused"), tools=TOOLS)
    experience = on_policy(job, cpu, model_source(config.model).scorers)
    untrained = Trainer(config, job.execution, experience, cpu).policy
    for done in range(config.rounds - LAST, config.rounds):
        drawn = experience.collect(untrained, done, lambda name: nullcontext(), lambda share: None)
        yield {"seed": config.seed, "round": done + 1, "base": f"{float(drawn.scores.mean()):.6f}"}


def _drawn(method: str, seed: str, target: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """What both judges say of a picture of each caption, and the Vendi score of four of some.

    Yields:
        A row for each sampler.
    """
    place = folder / "unseen" / f"{method}{seed and '-'}{seed}"
    judged = _evaluated(target, place / "judged", JUDGES, None, 1)
    varied = _evaluated(target, place / "varied", ("vendi",), VARIED, 4)
    for sampler in SAMPLERS:
        means = {
            name: np.mean([float(row[name]) for row in rows if row["sampler"] == sampler])
            for rows, names in ((judged, JUDGES), (varied, ("vendi",)))
            for name in names
        }
        shown = {name: f"{mean:.6f}" for name, mean in means.items()}
        yield {"method": method, "seed": seed, "sampler": sampler, **shown}


def _evaluated(
    target: Path, out: Path, scorers: tuple[str, ...], count: int | None, images: int
) -> list[dict[str, str]]:
    from eval.evaluate import plan, work

    request = plan.EvaluateRequest(
        target=target, scorers=scorers, model=None, prompts="geneval-unseen", count=count,
        images=images, steps=10, guidance=1.0, device="cpu", jobs=1, out=out,
    )  # fmt: skip
    return read_csv(work.run(request) / "rows.csv")


# ---- tables


def tables() -> dict[str, Callable[[], Table]]:
    """Name -> what makes it, once there are runs."""
    made: dict[str, Callable[[], Table]] = {
        "alignment": table, "alignment-kinds": kinds, "alignment-cost": cost,
        "v2-table1-again": again, "v2-table1-rival": to_rival,
        "alignment-tuning": partial(tuning, HOME / TRIALS, "gain"),
    }  # fmt: skip
    return made if there() else {}


def sentences() -> dict[str, Callable[[], str]]:
    """Likewise."""
    made = {
        "claims-alignment": claims,
        "claims-v2-table1-rival": lambda: by_first(compared(), than(RIVAL)),
    }
    return made if there() else {}


def _unseen(name: str, sampler: str) -> dict[tuple[str, str], float]:
    """Method and seed -> a mean."""
    rows = (row for row in read_csv(UNSEEN) if row["sampler"] == sampler)
    return {(row["method"], row["seed"]): float(row[name]) for row in rows}


def _both(captions: str, run: Run, sampler: str, name: str) -> tuple[float, float]:
    if captions == "held out":
        return both_ends(run, name, sampler)
    found = _unseen(name, sampler)
    return found[BASE, ""], found[run.config.method, str(run.seed)]


def gained() -> dict[tuple[str, str], Difference]:
    """Sampler and method -> the test of its gain on held-out captions, by the first judge."""
    return {
        (sampler, method): from_zero(
            [np.diff(both_ends(run, JUDGES[0], sampler))[0] for run in found]
        )
        for sampler in SAMPLERS
        for method, found in runs().items()
    }


def tested() -> dict[tuple[str, str], float]:
    """Sampler and method -> p-value of its gain by the first judge, as the protocol adjusts it."""
    tests, found = gained(), dict[tuple[str, str], float]()
    for family in FAMILIES:
        found |= adjusted({key: test for key, test in tests.items() if key[1] in family})
    return found


def _by_caption(run: Run, sampler: str) -> list[float]:
    """What the first judge says more of each held-out caption at the end than before training."""
    import pandas as pd

    rows = pd.DataFrame(run.files.evaluation)
    means = rows[rows["sampler"] == sampler].groupby(["round", "prompt"])[JUDGES[0]].mean()
    return list(means[run.last] - means[0])


def table() -> Table:
    """A row for each list of captions, sampler and method."""
    p = tested()
    found = [
        {
            "captions": captions, "sampler": words, "method": method, "seeds": len(own),
            "p": p[sampler, method] if captions == "held out" else math.nan,
            **_elsewhere(own if captions == "held out" else [], sampler),
            **_shares([[_both(captions, run, sampler, j) for j in JUDGES] for run in own]),
        }
        for captions in ("held out", "unseen")
        for sampler, words in SAMPLERS.items()
        for method, own in runs().items()
    ]  # fmt: skip
    columns = {
        "captions": text("captions"), "sampler": text("sampler"), "method": text("method"),
        "seeds": text("seeds"), "right": change("share", ".3f"),
        "gain (95 % interval)": spread("gain"), "p, Holm": number("p", ".2g"),
        "gain on other captions (95 % interval)": spread("elsewhere"),
        "gain by the second judge (95 % interval)": spread("second"),
        "first judge minus second (95 % interval)": spread("judges"),
    }  # fmt: skip
    return Table(found, columns, left=("captions", "sampler", "method"))


def _elsewhere(own: list[Run], sampler: str) -> Record:
    """The gain with an interval that takes captions, too, for a sample of captions."""
    nothing = Difference.unsure(math.nan)
    test = over_both([_by_caption(run, sampler) for run in own]) if own else nothing
    return dict(zip(("elsewhere", "elsewhere_low", "elsewhere_high"), test, strict=False))


def _shares(seeds: list[list[tuple[float, float]]]) -> Record:
    """Means and gains of [seeds, judges] pairs."""
    ends = np.array(seeds)
    first, second = (ends[:, judge, 1] - ends[:, judge, 0] for judge in range(len(JUDGES)))
    before, after = ends[:, 0].mean(0)
    return {"share_before": before, "share": after,
            **over_seeds("gain", first), **over_seeds("second", second),
            **over_seeds("judges", first - second)}  # fmt: skip


def kinds() -> Table:
    """A row for each kind of caption and method, held-out captions, both samplers together."""
    found = []
    for kind in KINDS:
        for method, own in runs().items():
            ends = np.array([
                [both_ends(run, f"geneval_{kind}", sampler) for sampler in SAMPLERS] for run in own
            ]).mean(1)  # fmt: skip
            found.append({
                "kind": kind, "method": method, "share_before": float(ends[:, 0].mean()),
                "share": float(ends[:, 1].mean()), **over_seeds("gain", ends[:, 1] - ends[:, 0]),
            })  # fmt: skip
    columns = {
        "kind": text("kind"), "method": text("method"), "right": change("share", ".3f"),
        "gain (95 % interval)": spread("gain"),
    }  # fmt: skip
    return Table(found, columns, left=("kind", "method"))


def cost() -> Table:
    """A row for each method: what the reward did in training, and what was lost on the way."""
    found = [_costs(method, own) for method, own in runs().items()]
    columns = {
        "method": text("method"), "reward in training": change("reward", ".3f"),
        "its rise (95 % interval)": spread("rise"), "least rise of a seed": number("least", "+.3f"),
        "drift": number("drift", ".4f"), "recognised": change("animal", ".2f"),
        "Vendi score, unseen": change("vendi", ".3f"), "images": number("images", ",.0f"),
        "UNet passes": number("passes", ",.0f"), "CPU seconds": number("cpu", ",.0f"),
    }  # fmt: skip
    return Table(found, columns, left=("method",))


def _costs(method: str, own: list[Run]) -> Record:
    base = {(row["seed"], row["round"]): float(row["base"]) for row in read_csv(REWARDS)}
    ends = np.array([
        [(base[str(run.seed), str(row["round"])], row["score_mean"])
         for row in run.files.metrics[-LAST:]] for run in own
    ]).mean(1)  # fmt: skip
    rise = ends[:, 1] - ends[:, 0]
    animal = np.array([both_ends(run, "animal", "eta1") for run in own]).mean(0)
    vendi = _unseen("vendi", "eta1")
    spent = [run.spent[run.last] for run in own]
    return {
        "method": method, "reward_before": float(ends[:, 0].mean()),
        "reward": float(ends[:, 1].mean()), **over_seeds("rise", rise), "least": float(rise.min()),
        "drift": float(np.mean([both_ends(run, "drift", "eta1")[1] for run in own])),
        "animal_before": animal[0], "animal": animal[1], "vendi_before": vendi[BASE, ""],
        "vendi": float(np.mean([vendi[method, str(run.seed)] for run in own])),
        "images": spent[0]["images"], "passes": float(np.mean([s["unet_forwards"] for s in spent])),
        "cpu": float(np.mean([s["cpu"] for s in spent])),
    }  # fmt: skip


# ---- Table 1, which has the same methods


def _gain(name: str, found: list[float]) -> Record:
    """NAME with its interval over seeds; empty where there are none."""
    return over_seeds(name, found) if found else dict.fromkeys((name, *ends(name)), math.nan)


def again() -> Table:
    """A row for each method and judge: its gain on the pictures of GenEval's table, and Table 1's.

    The models of Table 1 were made again, so those of GenEval's table stand beside them.
    """
    rows, remade = scored.rows_of(TABLE1), read_groups([AGAIN])
    base, records = rows[scored.BASE_ROWS], list[Record]()
    for ((_, _, method), own), judge in product(remade.items(), JUDGES):
        seen = {
            name: [both_ends(run, judge, scored.SAMPLER) for run in found]
            for name, found in (("first", runs().get(method, [])), ("made", own))
        }
        ours = [(run[judge] - base[judge]).to_numpy() for run in scored.runs_of(method, rows)]
        both = over_both(ours)
        records.append({
            "method": method, "judge": judge, "base": seen["made"][0][0],
            "base_table1": float(base[judge].mean()),
            **_gain("first", [end - start for start, end in seen["first"]]),
            **_gain("made", [end - start for start, end in seen["made"]]),
            **_gain("table1", [float(gain.mean()) for gain in ours]),
            "both": both.mean, "both_low": both.low, "both_high": both.high,
        })  # fmt: skip
    columns = {
        "method": text("method"), "judge": text("judge"), "base model": number("base", ".3f"),
        "gain of the first models (95 % interval)": spread("first"),
        "gain, made again (95 % interval)": spread("made"),
        "base model, Table 1": number("base_table1", ".3f"),
        "gain, Table 1 (95 % interval)": spread("table1"),
        "for other captions and noise, too (95 % interval)": spread("both"),
    }  # fmt: skip
    return Table(records, columns, left=("method", "judge"))


def compared() -> dict[tuple[str, str], Difference]:
    """Method and column of Table 1 -> how its score differs from the rival's, by seed if shared."""
    rows = scored.rows_of(TABLE1)
    means = {
        (method, column): {
            int(name.rpartition("-")[2]): float(found[column].mean())
            for name, found in rows.items() if name.rpartition("-")[0] == method
        }
        for method in scored.methods(rows)[1:] for column in scored.columns(rows)
    }  # fmt: skip
    return {
        (method, column): by_seed(seeds, means[RIVAL, column])
        for (method, column), seeds in means.items() if method != RIVAL
    }  # fmt: skip


def to_rival() -> Table:
    """A row for each method of Table 1: how its scores differ from the rival's."""
    tests, records = compared(), dict[str, Record]()
    for (method, column), test in tests.items():
        record = records.setdefault(method, {"method": method})
        record |= dict(zip((column, *ends(column)), test, strict=False))
    scores = dict.fromkeys(column for _, column in tests)
    columns = {"method": text("method"), **{column: spread(column) for column in scores}}
    return Table([*records.values()], columns, left=("method",))


# ---- sentences


def claims() -> str:
    """What the tests of held-out captions show, by the judge that gave the rewards."""
    words = Words("Shown to gain", "Shown to lose", "Not shown to change")
    tests, p = gained(), tested()
    return bullets(
        f"**{told}:** "
        + said({m: (t.mean, p[s, m]) for (s, m), t in tests.items() if s == sampler}, words)
        for sampler, told in SAMPLERS.items()
    )


if __name__ == "__main__":
    with said_in_one_line():
        measure(sys.argv[1:])
