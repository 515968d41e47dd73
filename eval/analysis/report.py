"""`d3po-bench report`: tables of any runs, or a page of them, in several formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from d3po_bench.errors import UserError
from eval.analysis import tries
from eval.analysis.efficiency import efficiency
from eval.analysis.fronts import by_step, fronts
from eval.analysis.gains import Groups, contrast, cost, gains
from eval.analysis.lm_eval import results
from eval.analysis.pictures import crossed, measure
from eval.analysis.runs import read_groups
from eval.analysis.settings import settings
from eval.analysis.tables import Record, Table, as_csv, finite
from eval.figures.html import page

TABLES: dict[str, Callable[[Groups], Table | list[Table]]] = {
    "gains": gains,
    "contrast": contrast,
    "cost": cost,
    "efficiency": efficiency,
    "drift": fronts,
    "steps": by_step,
    "settings": settings,
    "crossed": crossed,
}
"""Name -> what makes it. One more, "runs", takes runs that have not ended, too."""


Made = Mapping[str, Sequence[Table]]
"""Name -> its tables."""


def _records(made: Made) -> dict[str, list[Record]]:
    return {name: [r for t in tables for r in t.records] for name, tables in made.items()}


def _csv(made: Made) -> str:
    texts = {as_csv(records) for records in _records(made).values()}
    if len(texts) > 1:  # gains and cost are two views of the same records
        raise UserError(f"A CSV file holds one table, not {' and '.join(made)}. Name one of them.")
    return texts.pop().rstrip("\n")


def _json(made: Made) -> str:
    return json.dumps({name: finite(found) for name, found in _records(made).items()}, indent=1)


FORMATS: dict[str, Callable[[Made], str]] = {
    "md": lambda made: "\n\n".join(t.markdown() for tables in made.values() for t in tables),
    "csv": _csv,
    "json": _json,
    "latex": lambda made: "\n\n".join(t.latex() for tables in made.values() for t in tables),
}
"""Name -> how it writes tables."""

WHOLE: dict[str, Callable[[Sequence[Path]], str]] = {
    "html": page,
    "lm-eval": lambda runs: results(read_groups(runs)),
}
"""Name -> how it writes runs, and no table of them."""

ENDINGS = {".csv": "csv", ".htm": "html", ".html": "html", ".json": "json", ".tex": "latex"}
"""Of a file -> what it holds unless something else is asked for; of others, Markdown."""


def report(
    runs: Sequence[Path],
    names: Sequence[str] = (),
    form: str = "md",
    *,
    measured: bool = False,
    told: Callable[[str], None] = lambda text: None,
) -> str:
    """The tables of those names, or a page of the runs.

    Args:
        runs: run folders, or folders of them at any depth.
        names: of `TABLES`, or "runs"; gains and cost if there is none.
        form: of `FORMATS` or `WHOLE`; md and latex are for people, csv and json have every number.
        measured: measure first what the runs' models draw, which `crossed` and the diversity in
            `cost` need; takes minutes.
        told: called with what is being measured.

    Raises:
        UserError: the runs cannot be read, do not belong together, or lack what a table needs.
    """
    if form in WHOLE and names:
        raise UserError(
            f"The format {form} shows the runs themselves and no table. Leave --table out, or "
            f"choose --format {', '.join(FORMATS)}."
        )
    chosen = list(names) or ["gains", "cost"]
    tables = form in FORMATS and {*chosen} != {"runs"}
    groups: Groups = read_groups(runs) if tables or measured else {}
    if measured:
        measure([run for members in groups.values() for run in members], told)
    if form in WHOLE:
        return WHOLE[form](runs)
    return FORMATS[form]({name: _made(name, runs, groups) for name in chosen})


def _made(name: str, runs: Sequence[Path], groups: Groups) -> list[Table]:
    made = tries.table(runs) if name == "runs" else TABLES[name](groups)
    found = made if isinstance(made, list) else [made]
    if not any(table.records for table in found):
        need = NEEDS.get(name, "other runs")
        raise UserError(f"The table {name} has no row of these runs. It needs {need}.")
    return found


NEEDS = {"contrast": "a method's runs on objectives of both signs, such as incompress and compress"}
"""Table -> the runs that it is about, where not all are."""
