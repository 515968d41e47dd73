"""docs/first-results.ipynb: it has its outputs, is small, and runs.

After a change: `jupyter execute --inplace first-results.ipynb` in a folder of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

NOTEBOOK = ROOT / "docs" / "first-results.ipynb"


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_small_and_has_been_executed_from_top_to_bottom() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = code_of(json.loads(text))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert len(text) < 150_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place).execute()
    then, now = (
        [output["data"]["text/plain"] for cell in code_of(found) for output in cell["outputs"]
         if output["output_type"] == "execute_result"]
        for found in (json.loads(NOTEBOOK.read_text(encoding="utf-8")), notebook)
    )  # fmt: skip
    assert len(now) == len(then)
    assert len(list(tmp_path.rglob("lora"))) == 3
