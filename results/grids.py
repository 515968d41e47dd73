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
from results.version2 import CONTROL, MAIN, chosen_of

PATH = click.Path(path_type=Path)

HEAD = """\
# {title}, of PROTOCOL.md. Written by `python -m results.grids` from trials.csv, for
# `{command}`.
methods = [{methods}]
objectives = [{objectives}]
seeds = [{seeds}]
model = "tiny2"
preset = "quick"

[set]
prompts = "geneval"
rounds = 16
guidance = 1
eval_every = {every}
eval_list = "{captions}"
eval_noise = {noise}
"""

SWEEP = "d3po-bench sweep results/tiny2/{name} --out runs/version2"
STEPS = ("ddpo", "d3po_of_two")
"""Rows of the ablation of steps."""


@click.command()
@click.argument("trials", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=PATH)
def main(trials: Path, target: Path) -> None:
    """Write the grids for the settings that a search has chosen, into TARGET."""
    rows = read_csv(trials)
    methods = [*dict.fromkeys(row["method"] for row in rows)]
    found = {m: chosen_of([row for row in rows if row["method"] == m])[1] for m in methods}
    further = {m: of for m, of in found.items() if m not in MAIN}
    target.mkdir(parents=True, exist_ok=True)
    if len(further) < len(found):
        rival = {name: as_set(value) for name, value in registry.variant(MAIN[0])[1].items()}
        first = {m: found[m] for m in MAIN} | {CONTROL: rival | found[MAIN[0]]}
        _write(target / "grid.toml", "Main rows and control", first, range(1000, 1020), 8)
        steps = {m: found[m] for m in STEPS}
        command = "python -m results.steps runs/steps"
        _write(target / "steps.toml", "Which steps to learn from", steps, (902, 903), 16, command)
    if further:
        _write(target / "further.toml", "Further rows", further, range(1000, 1010), 16)


def _write(
    path: Path, title: str, found: Mapping[str, Mapping[str, str]], seeds: Sequence[int],
    every: int, command: str = SWEEP,
) -> None:  # fmt: skip
    """Write a grid; seeds of development are evaluated as the search was, on both signs alone."""
    test = min(seeds) >= 1000
    objectives = ("incompress", "compress", "aesthetic") if test else ("incompress", "compress")
    head = HEAD.format(
        title=title, command=command.format(name=path.name), methods=_listed(found),
        objectives=_listed(objectives), seeds=", ".join(map(str, seeds)), every=every,
        captions="geneval-held-out" if test else "geneval-dev", noise=int(test),
    )  # fmt: skip
    lines = [line for name, settings in found.items() for line in _table(name, settings)]
    write_atomically(path, (head + "\n".join(lines) + "\n").encode())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _table(method: str, settings: Mapping[str, str]) -> Iterator[str]:
    yield f"[method.{method}]"
    for name, value in settings.items():
        yield f'{name} = "{value}"'


if __name__ == "__main__":
    with said_in_one_line():
        main()
