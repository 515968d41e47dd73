"""The grids of the comparison on version 2, as PROTOCOL.md's rule chooses their settings.

    python -m results.grids runs/tune2/trials.csv results/tiny2

writes grid.toml, of the main rows and the control, and further.toml into the second folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from d3po_bench import registry
from d3po_bench.errors import said_in_one_line
from d3po_bench.launch.grid import as_set
from d3po_bench.runs.files import read_csv, write_atomically
from results.version2 import CONTROL, MAIN, chosen_of

PATH = click.Path(path_type=Path)

HEAD = """\
# {title} of PROTOCOL.md, by `python -m results.grids` from trials.csv:
# `d3po-bench sweep results/tiny2/{name} --out runs/version2`.
methods = [{methods}]
objectives = ["incompress", "compress", "aesthetic"]
seeds = [{seeds}]
model = "tiny2"
preset = "quick"

[set]
prompts = "geneval"
rounds = 16
guidance = 1
eval_every = {every}
eval_list = "geneval-held-out"
eval_noise = 1
"""


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
    if further:
        _write(target / "further.toml", "Further rows", further, range(1000, 1010), 16)


def _write(
    path: Path, title: str, found: Mapping[str, Mapping[str, str]], seeds: Sequence[int], every: int
) -> None:
    head = HEAD.format(
        title=title, name=path.name, methods=", ".join(f'"{name}"' for name in found),
        seeds=", ".join(map(str, seeds)), every=every,
    )  # fmt: skip
    lines = [line for name, settings in found.items() for line in _table(name, settings)]
    write_atomically(path, (head + "\n".join(lines) + "\n").encode())


def _table(method: str, settings: Mapping[str, str]) -> Iterator[str]:
    yield f"[method.{method}]"
    for name, value in settings.items():
        yield f'{name} = "{value}"'


if __name__ == "__main__":
    with said_in_one_line():
        main()
