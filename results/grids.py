"""The grids of the comparison on version 2, as PROTOCOL.md's rule chooses their settings.

    python -m results.grids runs/tune2/trials.csv results/tiny2

writes grid.toml, of the main rows and the control, further.toml, and steps.toml, of the ablation,
into the second folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import click

from d3po_bench import registry
from d3po_bench.errors import said_in_one_line
from d3po_bench.launch.grid import as_set
from d3po_bench.runs.files import read_csv, write_atomically
from d3po_bench.setting import pairs_of
from results.steps import SEARCH
from results.tuning import chosen_of
from results.version2 import CONTROL, MAIN, OBJECTIVES, SEEDS

PATH = click.Path(path_type=Path)
Settings = Mapping[str, str]

USUAL = {"prompts": SEARCH["prompts"], **pairs_of(SEARCH["settings"])}
"""Settings of the search, which are those of the ablation, too."""

TEST = {"eval_list": "geneval-held-out", "eval_noise": "1"}

HEAD = """\
# {title}, of PROTOCOL.md. Written by `python -m results.grids` from trials.csv, for
# `{command}`.
methods = [{methods}]
objectives = [{objectives}]
seeds = [{seeds}]
model = "{model}"
preset = "quick"
"""
SWEEP = "d3po-bench sweep results/tiny2/{name} --out runs/version2"

STEPS = ("ddpo", "d3po_of_two")
"""Rows of the ablation of steps."""


@click.command()
@click.argument("trials", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=PATH)
@click.option(
    "--seeds", "seeds_of", type=click.IntRange(1), help="In grid.toml, the first ones alone."
)
@click.option(
    "--objective", "objectives", multiple=True, type=click.Choice(OBJECTIVES), default=OBJECTIVES,
    help="In grid.toml, these alone.",
)  # fmt: skip
def main(trials: Path, target: Path, seeds_of: int | None, objectives: tuple[str, ...]) -> None:
    """Write the grids for the settings that a search has chosen, into TARGET."""
    rows = read_csv(trials)
    methods = [*dict.fromkeys(row["method"] for row in rows)]
    found = {m: chosen_of([row for row in rows if row["method"] == m])[1] for m in methods}
    further = {m: of for m, of in found.items() if m not in MAIN}
    target.mkdir(parents=True, exist_ok=True)

    def write(
        name: str, title: str, found: Mapping[str, Settings], every: int,
        objectives: Sequence[str] = OBJECTIVES, seeds_of: int | None = None,
    ) -> None:  # fmt: skip
        seeds, settings = SEEDS[name][:seeds_of], {**USUAL, **TEST, "eval_every": str(every)}
        command = SWEEP.format(name=name)
        _write(target / name, title, command, found, objectives, seeds, settings)

    if len(further) < len(found):
        rival = {name: as_set(value) for name, value in registry.variant(MAIN[0])[1].items()}
        first = {m: found[m] for m in MAIN} | {CONTROL: rival | found[MAIN[0]]}
        write("grid.toml", "Main rows and control", first, 8, objectives, seeds_of)
        both, steps = (SEARCH["objective"], SEARCH["against"]), {m: found[m] for m in STEPS}
        _write(target / "steps.toml", "Which steps to learn from",
               "python -m results.steps runs/steps", steps, both, (902, 903), USUAL)  # fmt: skip
    if further:
        write("further.toml", "Further rows", further, 16)


def _write(
    path: Path, title: str, command: str, found: Mapping[str, Settings],
    objectives: Sequence[str], seeds: Sequence[int], settings: Settings,
) -> None:  # fmt: skip
    head = HEAD.format(
        title=title, command=command, methods=_listed(found), objectives=_listed(objectives),
        seeds=", ".join(map(str, seeds)), model=SEARCH["model"],
    )  # fmt: skip
    tables = {"set": settings, **{f"method.{name}": of for name, of in found.items()}}
    lines = [line for name, of in tables.items() for line in _table(name, of)]
    write_atomically(path, (head + "\n".join(lines) + "\n").encode())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _table(name: str, settings: Settings) -> Iterator[str]:
    yield f"[{name}]"
    for name, value in settings.items():
        yield f'{name} = "{value}"'


if __name__ == "__main__":
    with said_in_one_line():
        main()
