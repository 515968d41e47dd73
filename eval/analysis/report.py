"""`d3po-bench report`: tables of any runs, as Markdown, CSV or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from d3po_bench.errors import UserError
from eval.analysis import tries
from eval.analysis.efficiency import efficiency
from eval.analysis.gains import Groups, contrast, cost, gains
from eval.analysis.pictures import crossed, measure
from eval.analysis.runs import read_groups
from eval.analysis.settings import settings
from eval.analysis.tables import Table, as_csv, finite

TABLES: dict[str, Callable[[Groups], Table | list[Table]]] = {
    "gains": gains,
    "contrast": contrast,
    "cost": cost,
    "efficiency": efficiency,
    "settings": settings,
    "crossed": crossed,
}
"""Name -> what makes it. One more, "runs", takes runs that have not ended, too."""


def report(
    runs: Sequence[Path],
    names: Sequence[str] = (),
    form: str = "md",
    *,
    measured: bool = False,
    told: Callable[[str], None] = lambda text: None,
) -> str:
    """The tables of those names.

    Args:
        runs: run folders, or folders of them at any depth.
        names: of `TABLES`, or "runs"; gains and cost if there is none.
        form: md for people, or csv or json, which have every number.
        measured: measure first what the runs' models draw, which `crossed` and the diversity in
            `cost` need; takes minutes.
        told: called with what is being measured.

    Raises:
        UserError: the runs cannot be read, do not belong together, or lack what a table needs.
    """
    chosen = list(names) or ["gains", "cost"]
    groups: Groups = read_groups(runs) if {*chosen} != {"runs"} or measured else {}
    if measured:
        measure([run for members in groups.values() for run in members], told)
    made = {name: _made(name, runs, groups) for name in chosen}
    if form == "md":
        return "\n\n".join(table.markdown() for tables in made.values() for table in tables)
    records = {name: [r for t in tables for r in t.records] for name, tables in made.items()}
    if form == "json":
        return json.dumps({name: finite(found) for name, found in records.items()}, indent=1)
    texts = {as_csv(found): name for name, found in records.items()}
    if len(texts) > 1:  # gains and cost are two views of the same records
        raise UserError(
            f"A CSV file holds one table, not {' and '.join(chosen)}. Name one of them."
        )
    return next(iter(texts)).rstrip("\n")


def _made(name: str, runs: Sequence[Path], groups: Groups) -> list[Table]:
    found = tries.table(runs) if name == "runs" else TABLES[name](groups)
    return found if isinstance(found, list) else [found]
