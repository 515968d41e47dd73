"""`d3po-bench export`: a run's LoRA for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from d3po_bench.cli.options import PLACE, RUNS, Answering, Result


@click.command(cls=Answering)
@click.argument("run", type=RUNS)
@click.option(
    "--format", "form", type=click.Choice(["diffusers", "kohya", "comfyui"]), required=True,
    help="Whose names its layers get: of diffusers, of kohya's tools and web UIs, or of ComfyUI.",
)  # fmt: skip
@click.option("--out", type=PLACE, required=True, help="A file that ends in .safetensors.")
@click.option("--card", type=PLACE, help="The model card; default: README.md beside OUT.")
@click.option("--force", is_flag=True, help="Replace files that are there already.")
def export(
    run: Path, form: Literal["diffusers", "kohya", "comfyui"], out: Path, card: Path | None,
    force: bool,
) -> Result:  # fmt: skip
    """Write the LoRA of the finished RUN as a file that other programs load.

    Beside it a model card, with what the run gained and how to load the file, and a picture of
    before and after where the run kept samples. What is there already is never written over.

    \b
    Example:
        d3po-bench export runs/tiny/incompress/d3po/seed-0 --format kohya --out my-style.safetensors
    """  # noqa: D301
    from eval.export import ExportRequest
    from eval.export import export as write

    request = ExportRequest(run=run, form=form, out=out, card=card, force=force)
    return Result.of_paths(write(request))
