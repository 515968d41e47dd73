"""The grids of the comparison on version 2, as PROTOCOL.md's rule chooses their settings.

    python -m results.grids runs/tune2/trials.csv results/tiny2

writes grid.toml, of the main rows and the control, further.toml, and steps.toml, of the ablation,
into the second folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from d3po_bench import registry
from d3po_bench.errors import said_in_one_line
from d3po_bench.launch.grid import as_set
from d3po_bench.runs.files import read_csv, write_atomically
from results.version2 import CONTROL, MAIN, OBJECTIVES, SEEDS, chosen_of

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

TEST = {
    "command": "d3po-bench sweep results/tiny2/{name} --out runs/version2",
    "captions": "geneval-held-out", "noise": 1,
}  # fmt: skip
ABLATION = {
    "command": "python -m results.steps runs/steps", "objectives": '"incompress", "compress"',
    "captions": "geneval-dev", "noise": 0, "every": 16,
}  # fmt: skip

STEPS = ("ddpo", "d3po_of_two")
"""Rows of the ablation of steps."""


@click.command()
@click.argument("trials", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=PATH)
@click.option("--seeds", type=click.IntRange(1), help="Of the test runs, the first ones alone.")
@click.option(
    "--objective", "objectives", multiple=True, type=click.Choice(OBJECTIVES), default=OBJECTIVES
)
def main(trials: Path, target: Path, seeds: int | None, objectives: tuple[str, ...]) -> None:
    """Write the grids for the settings that a search has chosen, into TARGET."""
    rows = read_csv(trials)
    methods = [*dict.fromkeys(row["method"] for row in rows)]
    found = {m: chosen_of([row for row in rows if row["method"] == m])[1] for m in methods}
    further = {m: of for m, of in found.items() if m not in MAIN}
    target.mkdir(parents=True, exist_ok=True)

    def write(name: str, title: str, found: Mapping[str, Mapping[str, str]], every: int) -> None:
        part = {"objectives": _listed(objectives), "every": every, **TEST}
        _write(target / name, title, found, SEEDS[name][:seeds], **part)

    if len(further) < len(found):
        rival = {name: as_set(value) for name, value in registry.variant(MAIN[0])[1].items()}
        first = {m: found[m] for m in MAIN} | {CONTROL: rival | found[MAIN[0]]}
        write("grid.toml", "Main rows and control", first, 8)
        steps = {m: found[m] for m in STEPS}
        _write(target / "steps.toml", "Which steps to learn from", steps, (902, 903), **ABLATION)
    if further:
        write("further.toml", "Further rows", further, 16)


def _write(
    path: Path, title: str, found: Mapping[str, Mapping[str, str]], seeds: Sequence[int],
    **part: Any,
) -> None:  # fmt: skip
    part["command"] = part["command"].format(name=path.name)
    head = HEAD.format(
        title=title, methods=_listed(found), seeds=", ".join(map(str, seeds)), **part
    )
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
