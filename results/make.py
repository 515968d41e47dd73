"""Write every table, number and figure of README.md and docs/ from the rows in this folder.

    python results/make.py            # write what has changed
    python results/make.py --check    # change nothing; exit 1 if something would change
    python results/make.py --names    # the tables and numbers that documents can name

Between the lines `<!-- made: NAME -->` and `<!-- /made -->` of a document stands a table, and
between <!--n NAME--> and <!--/n--> in a sentence a number. NAME:FORMAT prints it otherwise than
usual, as Python formats numbers: incompress.d3po.gain:+.2f. What takes a model or minutes to
measure is in measure.py.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np

# An editable install of another checkout has a folder `results`, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d3po_bench import registry
from d3po_bench.errors import RunError, UserError, said_in_one_line
from d3po_bench.runs.files import read_csv
from eval.analysis import documents, table1
from eval.analysis.gains import Groups, contrast, cost, gains, records
from eval.analysis.runs import read_groups
from eval.analysis.settings import settings
from eval.analysis.tables import Record, Table, number, spread, text
from eval.figures.curves import draw_curves
from results import (
    alignment,
    claims,
    coverage,
    devices,
    feedback,
    gpu,
    gradients,
    memory,
    search,
    sizes,
    steps,
    tries,
    version2,
)

sys.path.pop(0)

HOME = Path(__file__).resolve().parent
V2 = HOME / "tiny2"
PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".pdf")
SHEETS = "samples-*.png"
"""Sheets of samples, which need the pictures of the runs: measure.py publish draws them."""

AXES = {"images": ""}
"""What curves of version 1 are drawn over -> their folder below figures."""


@cache
def tiny() -> Groups:
    """The published runs of the embedded model."""
    return read_groups([HOME / "tiny"])


# ---- tables


def front(groups: Groups) -> Table:
    """A line for each method: gain on every objective, and what a run of it cost."""
    objectives = [name for name in UNITS if any(name == group[1] for group in groups)]
    found: dict[str, Record] = {}
    for r in records(groups):
        empty = {"method": r["method"], **dict.fromkeys(objectives, math.nan)}
        line = found.setdefault(r["method"], empty | {k: [] for k in COSTS})
        gain = {"gain": r["gain"], "gain_low": r["low"], "gain_high": r["high"]}
        line |= {k.replace("gain", r["objective"]): value for k, value in gain.items()}
        for name in COSTS:
            line[name].append(r[name])
    lines = [r | {name: float(np.mean(r[name])) for name in COSTS} for r in found.values()]
    columns = {"method": text("method")}
    columns |= {
        f"gain on {name}, {UNITS[name]} (95 % interval)": spread(name) for name in objectives
    }
    columns |= {heading: number(name, ",.0f") for name, heading in COSTS.items()}
    return Table(lines, columns, left=("method",))


UNITS = {"incompress": "kB", "compress": "kB", "aesthetic": "points"}
COSTS = {"images": "images", "unet_forwards": "UNet passes", "cpu": "CPU seconds a seed"}


def made_table1(folder: Path) -> str:
    """Table 1 from its rows, with the sentence that says what it shows."""
    with tempfile.TemporaryDirectory() as place:
        return table1.write(Path(shutil.copytree(folder, Path(place, "copy"))))


TABLE1 = {
    name: folder
    for name, folder in {
        "table1": HOME / "tiny" / "table1", "v2-table1": HOME / "alignment" / "table1"
    }.items()
    if folder.is_dir()
}  # fmt: skip
"""Table 1 of each version -> its rows."""


FEEDBACK = {
    name: home for name, home in {"feedback": "tiny", "v2-feedback": "tiny2"}.items()
    if home in feedback.homes()
}  # fmt: skip
"""Rounds of feedback of each version -> where they are."""


def step_shares() -> Table:
    """Which denoising steps decide a picture's JPEG size, as measure.py step-shares found."""
    columns = {
        "T": text("T"), "step": text("step"), "timestep": text("timestep"),
        "share of the change": lambda r: f"{float(r['share']):.3f}",
        "sensitivity": lambda r: f"{float(r['sensitivity']):.2f}",
    }  # fmt: skip
    return Table(read_csv(HOME / "step-shares.csv"), columns)


TABLES: Mapping[str, Callable[[], Any]] = {
    "gains": lambda: gains(tiny()),
    "contrast": lambda: contrast(tiny()),
    "cost": lambda: cost(tiny()),
    "settings": lambda: settings(tiny()),
    "confirm": search.confirm,
    **{name: partial(feedback.rounds, home) for name, home in FEEDBACK.items()},
    "feedback-tries": tries.table,
    "feedback-choices": feedback.choices,
    "feedback-scorers": feedback.scorers,
    "fidelity": search.fidelity,
    "search-d3po": search.d3po,
    "search-methods": lambda: search.methods("methods"),
    "search-alignment": lambda: search.methods("alignment"),
    "search-feedback": search.feedback,
    "windows": search.rates,
    "coverage": coverage.table,
    "rerun-power": search.rerun_power,
    "step-shares": step_shares,
    "gpu": gpu.speed,
    "gpu-round": gpu.rounds,
    "gpu-checks": gpu.checks,
    "gpu-hours": gpu.hours,
    "memory": memory.table,
    "memory-each": memory.each,
    **version2.tables(V2, front),
    **devices.tables(),
    **sizes.tables(),
    **steps.tables(),
    **alignment.tables(),
    "gradients": gradients.table,
}
"""What stands between block markers."""

CLAIMS: Mapping[str, Callable[[], str]] = {
    "claims-gains": lambda: claims.gains(tiny()),
    "claims-contrast": lambda: claims.halves(tiny()),
    **{f"claims-{name}": partial(claims.feedback, home) for name, home in FEEDBACK.items()},
    **version2.sentences(V2),
    **steps.sentences(),
    **sizes.sentences(),
    **alignment.sentences(),
    **{name: partial(made_table1, folder) for name, folder in TABLE1.items()},
    **{f"claims-{name}": partial(claims.alignment, folder) for name, folder in TABLE1.items()},
}
"""Likewise, what comes as text: sentences that are made from tests, and Table 1, which has some."""


@cache
def tables(name: str) -> list[Table]:
    """The tables of a name."""
    found = TABLES[name]()
    return found if isinstance(found, list) else [found]


@cache
def block(name: str) -> str:
    """The text of a table.

    Raises:
        UserError: there is none of that name.
    """
    if name in CLAIMS:
        return CLAIMS[name]()
    if name not in TABLES:
        raise registry.unknown("table", name, [*TABLES, *CLAIMS])
    return "\n\n".join(table.markdown() for table in tables(name))


# ---- numbers

COUNTS = "pairs|images|unet_forwards|unet_backwards|seconds|seeds|rounds|steps|trials|kept"
FORMS = (
    (rf".*\.({COUNTS}|budget_.*|.*_to_half)", ",.0f"),
    (r".*\.share_of_excess", "+.0%"),
    (r".*\.(recognised|diversity|probability)\w*", ".2f"),
    (r"choices\..*|.*\.(kl\w*|base|end|mean|error|(first|last|good)\w*)", ".3f"),
)
"""How numbers of a name look unless a document says otherwise; all others have a sign."""


NAMED = {
    "gains": "{objective}.{method}",
    "contrast": "contrast.{method}",
    "fidelity": "fidelity.{name}",
    **dict.fromkeys(FEEDBACK, "feedback.{experiment}.{error:.0%}"),
    "feedback-choices": "choices.{error:.0%}",
    "alignment": "alignment.{captions}.{sampler}.{method}",
    "v2-again": "v2.again.{method}.{trial}",
    **version2.NAMED,
}
"""Table -> how a number of it is called, before the name of its field."""


@cache
def numbers() -> dict[str, float]:
    """Every number that a sentence can name."""
    found = {
        f"{where.format(**record)}.{field}": float(value)
        for name, where in NAMED.items()
        if name in TABLES
        for table in tables(name)
        for record in table.records
        for field, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    }
    return found | dict(_of_table1())


def _of_table1() -> Iterator[tuple[str, float]]:
    """The numbers of its cells: a mean, and the gain over the base model with its interval."""
    for row in read_csv(HOME / "tiny" / "table1" / "table1.csv"):
        for column in ("clip", "blip_itm_logit", "blip_itm_prob", "blip_itc", "image_reward"):
            found = re.findall(r"[+-]?\d+\.\d+", row[column])
            name = f"table1.{row['method'].replace(' ', '-')}.{column}"
            for field, value in zip(("mean", "gain", "low", "high"), found, strict=False):
                yield f"{name}.{field}", float(value)


def inline(name: str) -> str:
    """The text of a number, NAME or NAME:FORMAT.

    Raises:
        UserError: there is none of that name, it was not measured, or the format is none.
    """
    plain, _, form = name.partition(":")
    if plain not in numbers():
        raise registry.unknown("number", plain, list(numbers()), "`python results/make.py --names`")
    usual = next((form for pattern, form in FORMS if re.fullmatch(pattern, plain)), "+.3f")
    try:
        return format(numbers()[plain], form or usual)
    except ValueError:
        raise UserError(f"{form!r} is no format for a number, in {name}. Try +.3f.") from None


# ---- figures and files


def drawn(place: Path) -> Iterator[tuple[Path, Path]]:
    """Every figure and file of this folder that is made from rows, made again below `place`.

    Yields:
        What was published, and what was made.
    """
    of_v2 = version2.main_rows(version2.published(V2)) if version2.there(V2) else {}
    for home, groups, axes in ((HOME / "tiny", tiny(), AXES), (V2, of_v2, version2.AXES)):
        for x, folder in axes.items() if groups else ():
            png, _ = draw_curves(groups, x, place / home.name / x)  # what documents show
            yield home / "figures" / folder / png.name, png
    yield from feedback.draw(place)
    for name, published in TABLE1.items():
        copy = Path(shutil.copytree(published, place / name))
        table1.write(copy)
        for made in sorted(copy.glob("table1.*")):
            yield published / made.name, made


def make(*, check: bool) -> Iterator[str]:
    """Make everything again, and say what was not up to date, or cannot be made.

    Args:
        check: change nothing.

    Raises:
        UserError: a marker is malformed, or rows cannot be read.
    """
    root = HOME.parent
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        name, before = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        try:
            after, changed = documents.made(before, block, inline)
        except UserError as problem:
            raise UserError(f"{name}: {problem}") from problem
        yield from (f"{name}: {what}" for what in (*changed, *documents.loose(before)))
        if after != before and not check:
            path.write_text(after, encoding="utf-8")
    known = {*HOME.rglob(SHEETS)}
    with tempfile.TemporaryDirectory() as place:
        for path, made in drawn(Path(place)):
            known.add(path)
            if documents.write(path, made, check=check):
                yield f"{path.relative_to(root)} has changed"
    for path in sorted({p for p in HOME.rglob("*") if p.suffix.lower() in PICTURES} - known):
        yield f"{path.relative_to(root)} is drawn by nothing in results/make.py"


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if something would change.")
@click.option("--names", is_flag=True, help="Print what documents can name.")
def main(check: bool, names: bool) -> None:
    """Write every table, number and figure of README.md and docs/ from what was measured."""
    if names:
        click.echo("\n".join(f"made: {name}" for name in (*TABLES, *CLAIMS)))
        click.echo("\n".join(f"n {name} = {inline(name)}" for name in numbers()))
        return
    found = list(make(check=check))
    for line in found:
        click.echo(line)
    if check and found:
        raise RunError(f"{len(found)} things are not what the rows say. Run results/make.py.")


if __name__ == "__main__":
    with said_in_one_line():
        main()
