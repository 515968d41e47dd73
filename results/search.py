"""Tables of `search.csv`: tries behind presets, paper against code, and what `--rerun` sees.

A row is what `d3po-bench report RUNS --table runs --format csv` says of a run: the command that
makes it, and the numbers that these tables need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.runs.files import read_csv
from d3po_bench.runs.run import find_runs
from eval.analysis import tries
from eval.analysis.statistics import another_seed, interval
from eval.analysis.tables import Record, Table, change, number, shown, spread, text
from eval.analysis.windows import windows
from eval.verify import rerun

HERE = Path(__file__).parent
TINY = HERE / "tiny"

Settings = Mapping[str, str]

WORDS = ("run", "started", "commit", "method", "objective", "settings", "rates", "command")
"""Columns of search.csv that are no numbers."""


@cache
def rows(group: str) -> list[Record]:
    """The tries of a group, each with all settings that its command has."""
    found = []
    for row in read_csv(HERE / "search.csv"):
        if row["run"].startswith(f"{group}/"):
            numbers = {k: float(v or "nan") for k, v in row.items() if k not in WORDS}
            found.append({**row, **numbers, "set": tries.settings_of(row["command"])})
    return found


def _unusual(own: Settings, usual: Settings, method: str) -> str:
    """The options of a method and the settings in `usual` that are not as usual.

    Args:
        own: all settings of a try.
        usual: settings that are only named where they are something else; what it does not name
            of the method's options is the default.
        method: its name.
    """
    plain = {**tries.options(method), **usual}
    names = [*sorted(tries.options(method)), *(k for k in usual if k not in tries.options(method))]
    # A try of before a method had an option has the option's default.
    return ", ".join(f"{k}={own[k]}" for k in names if own.get(k, plain[k]) != plain[k])


def _setting(name: str, form: str = "") -> Any:
    return lambda row: format(float(row["set"][name]), form) if form else row["set"][name]


# ---- tries


def d3po() -> Table:
    """A row for each try with D3PO, in the order they were made."""
    columns = {
        "objective": text("objective"),
        "seed": number("seed", ".0f"),
        "T": _setting("sampling_steps"),
        "left out": _setting("skip_steps"),
        "fraction": _setting("timestep_fraction", "g"),
        "prompts x images": lambda row: (
            f"{row['set']['prompts_per_round']} x {max(2, int(row['set']['images_per_prompt']))}"
        ),
        "pairs per update": _setting("units_per_update"),
        "lr": _setting("learning_rate", "g"),
        "further": lambda row: _unusual(row["set"], {"passes": "1", "lora_rank": "4"}, "d3po"),
        "rounds": _rounds,
        "first": number("score_first", ".3f"),
        "best": number("score_best", ".3f"),
        "last three": number("score_last_three", ".3f"),
        "held out": number("gain", "+.3f"),
        "KL": number("training_kl_last", ".2f"),
        "saturated": number("saturated_last", ".2f"),
        "recognised": number("recognised", ".2f"),
    }
    found = sorted(rows("d3po"), key=lambda row: str(row["started"]))
    return Table(found, columns, left=("objective", "further"))


def _rounds(row: Record) -> str:
    done, due = int(row["rounds"]), int(row["set"]["rounds"])
    return f"{done}" if done == due else f"{done} of {due}"


PRESET: dict[str, Settings] = {
    "d3po": {"pairs": "extremes", "clip_range": "0.2", "units_per_update": "2"},
    "ddpo": {"minimum": "8", "clip_range": "0.1", "units_per_update": "16"},
    "dpok": {"minimum": "8", "clip_range": "0.1", "units_per_update": "16"},
    "reward_weighted": {"minimum": "8", "units_per_update": "16"},
    "preferred_images": {"units_per_update": "2"},
}
"""Settings that are only named where they are something else."""


def methods(group: str) -> Table:
    """A row for each setting that was tried in a group, mean over its seeds."""
    found: dict[tuple[int, str, float, str], list[Record]] = {}
    for row in rows(group):
        own, method = row["set"], row["method"]
        further = _unusual(own, {**PRESET[method], "guidance": "5.0"}, method)
        key = (int(own["sampling_steps"]), method, float(own["learning_rate"]), further)
        found.setdefault(key, []).append(row)
    columns = {
        "T": text("T"), "method": text("method"), "lr": number("lr", "g"),
        "further": text("further"), "seeds": text("seeds"), "rounds": text("rounds"),
        "training score": change("score", ".3f"),
        "denoising error": change("denoising_error", ".3f"),
        "held-out gain": number("gain", "+.3f"), "KL": number("kl", ".2f"),
        "recognised": number("recognised", ".2f"), "worst seed": number("worst", ".2f"),
    }  # fmt: skip
    records = [_over_seeds(key, found[key]) for key in sorted(found)]
    return Table(records, columns, left=("method", "further"))


def _over_seeds(key: tuple[int, str, float, str], seeds: Sequence[Record]) -> Record:
    known = {k: [s[k] for s in seeds if not math.isnan(s[k])] for k in seeds[0] if k in _MEANS}
    means = {k: float(np.mean(values)) if values else math.nan for k, values in known.items()}
    return {
        **dict(zip(("T", "method", "lr", "further"), key, strict=True)),
        "seeds": len(seeds),
        "rounds": " and ".join(str(n) for n in sorted({int(s["rounds"]) for s in seeds})),
        "score_before": means["score_first"], "score": means["score_last"],
        "denoising_error_before": means["denoising_error_first"],
        "denoising_error": means["denoising_error_last"],
        **{name: means[name] for name in ("gain", "kl", "recognised")},
        "worst": min(known["recognised"], default=math.nan),
    }  # fmt: skip


_MEANS = ("score_first", "score_last", "denoising_error_first", "denoising_error_last",
          "gain", "kl", "recognised")  # fmt: skip


RECOGNISED = 0.7
"""Least mean of what the classifier still recognises, as in the rule that chose the rates."""


def rates() -> Table:
    """How wide the window of rates is in which each method beats the base model on `incompress`.

    Of the tries at the published settings but for the rate, two seeds each.
    """
    tried = [
        {"method": row["method"], "lr": row["set"]["learning_rate"], **row}
        for row in rows("methods")
        if {word.partition("=")[0] for word in row["settings"].split()} <= OF_ITS_OWN
    ]
    return windows(tried, floor=RECOGNISED)


def feedback() -> Table:
    """The tries behind the settings of normalcy: the rate of every round."""
    columns = {
        "method": text("method"),
        "options": lambda row: f"`{row['settings']}`",
        "seed": number("seed", ".0f"),
        "normalcy rate, round 0, 1, ...": lambda row: " ".join(
            f"{float(rate):.3f}" for rate in row["rates"].split()
        ),
    }
    rates = "normalcy rate, round 0, 1, ..."
    return Table(rows("feedback"), columns, left=("method", "options", rates))


# ---- paper against code

CHANGED = {
    "default": "D3PO, preset `quick`",
    "joint": "`log_prob=sum beta=76.8`: 0.1 on the joint density of 768 elements, as Eq. 14 reads",
    "no-clip": "`clip=none`",
    "one-sided-clip": "`clip=one_sided`",
    "reference-sampling": "`reference=sampling`",
    "update-per-timestep": "`update_every=timestep` (four times as many updates)",
    "own-noise": "`shared_noise=false`",
    "two-images": "two images of a prompt: 768 pairs from as many images, in as many updates",
    "adam": "`optimizer=adam`: the decay passes through Adam's normalisation",
    "one-of-two-copies": "half of the pairs, one pair per update: a copy that never synchronises",
    "dpok-gaussian": "DPOK, preset `quick`",
    "dpok-noise-mse": "`kl=noise_mse`",
    "dpok-none": "`kl=none`: DDPO",
    "dpok-fast": "DPOK, `learning_rate=6e-3`",
    "ddpo-clip": "DDPO, `clip_range=1e-4`, as published",
    "ddpo-batch-wise": "DDPO, `buffer=0`: advantages over the round, not the prompt",
}
"""Name of a try -> what was changed, in the order of the table."""


def fidelity() -> Table:
    """What one difference between paper and code changes, a row each."""
    found = {k: [*part] for k, part in groupby(rows("fidelity"), lambda r: r["run"].split("/")[1])}
    records = [{"name": k, "changed": what, **_means(found[k])} for k, what in CHANGED.items()]
    return Table(records, {"changed": text("changed"), **_OF_SEEDS}, left=("changed",))


def confirm() -> Table:
    """D3PO with preset `quick` on seeds that no setting was chosen by."""
    return Table([_means(rows("confirm"))], _OF_SEEDS)


def _means(seeds: Sequence[Record]) -> Record:
    gains = np.array([seed["gain"] for seed in seeds])
    low, high = interval(gains)
    means = {k: float(np.mean([seed[k] for seed in seeds])) for k in ("gain", "kl", "recognised")}
    return {"seeds": len(seeds), "low": float(low), "high": float(high), **means}


_OF_SEEDS = {
    "seeds": text("seeds"), "gain, kB (95 % interval)": spread("gain", ""),
    "KL at the end": number("kl", ".3f"), "recognised at the end": number("recognised", ".2f"),
}  # fmt: skip


# ---- what `verify --rerun` tells apart

OF_ITS_OWN = {"eval_every", "learning_rate"}
"""Settings that a try may have of its own to be compared with published runs."""


def rerun_power() -> Table:
    """What `verify --rerun` would say of published runs and tries.

    Each is compared with the published seeds of its method on its objective, as another seed,
    which needs no training; the intervals of the same seed do, and are not used here. A run at a
    wrong rate is also compared with one of its own seed at the published rate, by its first round.
    """
    places = sorted({run.folder.parent for run in find_runs([TINY])})
    cells = {(place.parent.name, place.name): _seeds(place) for place in places}
    own = [_outside(seed, [s for s in seeds if s is not seed])
           for seeds in cells.values() for seed in seeds]  # fmt: skip
    fresh: list[bool] = []
    right: dict[tuple[str, str, int], Record] = {}
    wrong: dict[str, list[tuple[Record, bool]]] = {}
    for run in _whole(cells):
        rates = float(run["set"]["learning_rate"]), run["published_rate"]
        alarm = _outside(run, cells[run["objective"], run["method"]])
        if rates[0] == rates[1]:
            right[_cell(run)] = run
            fresh.append(alarm)
        else:
            name = f"a wrong rate: {run['method']}, {rates[0]:g} for {rates[1]:g}"
            wrong.setdefault(name, []).append((run, alarm))
    records = [
        _said("published seeds, each against the other four", own),
        _said("fresh seeds with the published settings", fresh),
        *(
            _said(name, [alarm for _, alarm in runs],
                  sum(any(_off(right[_cell(run)], run)) for run, _ in runs))
            for name, runs in wrong.items()
        ),
    ]  # fmt: skip
    columns = {
        "runs": text("runs"), "number": text("number"),
        "not reproduced, by the end": text("by_end"),
        "by the first round of the same seed": lambda r: shown(r["by_start"], ".0f"),
    }  # fmt: skip
    return Table(records, columns, left=("runs",))


def _said(name: str, alarms: Sequence[bool], by_start: float = math.nan) -> Record:
    return {"runs": name, "number": len(alarms), "by_end": sum(alarms), "by_start": by_start}


def _cell(run: Record) -> tuple[str, str, int]:
    return run["method"], run["objective"], int(run["seed"])


def _seeds(place: Path) -> list[Record]:
    """The runs of a method on an objective, as rows of search.csv have them."""
    found = [tries.record(run, run.folder.name) for run in find_runs([place])]
    return [{**row, "set": tries.settings_of(row["command"])} for row in found]


def _whole(cells: Mapping[tuple[str, str], list[Record]]) -> Iterator[Record]:
    """Finished runs elsewhere of the published settings, or of these at another rate."""
    for run in [*rows("confirm"), *rows("alignment"), *rows("d3po"), *rows("methods")]:
        if (run["objective"], run["method"]) not in cells or math.isnan(run["gain"]):
            continue
        own, published = run["set"], cells[run["objective"], run["method"]][0]["set"]
        differing = {k for k in own if own[k] != published[k]}
        if differing <= OF_ITS_OWN and run["rounds"] == int(published["rounds"]):
            yield {**run, "published_rate": float(published["learning_rate"])}


def _outside(run: Record, seeds: Sequence[Record]) -> bool:
    """Whether a run ends where no further seed does, in gain or drift."""
    found = rerun.ends(run["gain"], run["kl"])
    others = [rerun.ends(seed["gain"], seed["kl"]) for seed in seeds]
    confidence = 1 - rerun.FALSE_ALARM / (2 * len(found))
    intervals = {k: another_seed([end[k] for end in others], confidence) for k in found}
    return any(not low <= found[k] <= high for k, (low, high) in intervals.items())


def _off(then: Record, now: Record) -> list[bool]:
    """Whether each number of the first round is farther off than rounding moves it on a CPU."""
    first = [{k: row[f"{old}_first"] for k, old in _START.items()} for row in (then, now)]
    allowed = rerun.allowed(int(then["images_first"]), exact=True)
    return [off is None or off > allowed for off in rerun.apart(*first).values()]


_START = {"score_mean": "score", "loss": "loss", "grad_norm": "grad_norm"}
"""What `--rerun` compares of the first round -> its name in search.csv."""
