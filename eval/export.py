"""`d3po-bench export`: the LoRA of a run as a file that other programs load, with a model card."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_bench import __version__, registry
from d3po_bench.config import FEEDBACK, RunConfig
from d3po_bench.errors import UserError
from d3po_bench.models.sources import Source, model_source
from d3po_bench.runs.files import readable, write_atomically
from d3po_bench.runs.run import LORA, RunFolder

if TYPE_CHECKING:
    from d3po_bench.models.exchange import Form

SHOWN = 5
"""Most prompts with pictures on a card."""

SMALLEST = 96
"""Pixels a side of a picture on a card, at least."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What the command line asked for."""

    run: Path
    form: Form
    out: Path
    card: Path | None = None
    """None for README.md beside `out`."""
    force: bool = False
    """Replace what is there."""


def export(request: ExportRequest) -> list[Path]:
    """Write the LoRA of a finished run, its model card and, where it kept some, its pictures.

    Returns:
        What was written, the LoRA first.

    Raises:
        UserError: it is no finished run with a LoRA, its files are not those that it ended with,
            `form` has no names for its layers, or a file is there already. Nothing is written.
    """
    from safetensors.torch import load_file

    from d3po_bench.models.exchange import facts_of, file_bytes, renamed
    from d3po_bench.models.lora import NAME

    run = _finished(request.run)
    source = model_source(run.config.model)
    file = run.folder / LORA / NAME
    with readable(file):
        layers = load_file(file)
    tensors = renamed(layers, request.form, source)
    shown = pictures(run)
    card = request.card or request.out.with_name("README.md")
    sheet = request.out.with_suffix(".png") if shown else None
    written = [path for path in (request.out, card, sheet) if path]
    _require_free(request, written, run)
    facts = {**described(run), **facts_of(layers, source)}
    facts["ss_output_name"] = request.out.stem
    if sheet:
        write_atomically(sheet, shown)
    beside = os.path.relpath(request.out.parent, card.parent)
    write_atomically(card, card_of(run, source, Path(beside, request.out.name), sheet).encode())
    write_atomically(request.out, file_bytes(tensors, facts))
    return written


def _finished(folder: Path) -> RunFolder:
    """A run that has ended, whose LoRA and base model are those that it ended with.

    Raises:
        UserError: it is not.
    """
    from d3po_bench.training.inputs import require_unchanged

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a run. Give the folder of one, such as "
            "runs/tiny/incompress/d3po/seed-0."
        )
    run = RunFolder(folder)
    if not run.finished:
        raise UserError(
            f"The run in {folder} is not finished. Run its command again: it resumes from the "
            "last checkpoint."
        )
    if run.config.full:
        raise UserError(
            f"The run in {folder} trained the whole network, so there is no LoRA to export. Load "
            "the network in its folder lora/ with from_pretrained."
        )
    require_unchanged(run, LORA, None)
    return run


def _require_free(request: ExportRequest, written: list[Path], run: RunFolder) -> None:
    """Refuse to write over anything, or into the run.

    Raises:
        UserError: naming the file.
    """
    if request.out.suffix != ".safetensors":
        raise UserError(
            f"--out {request.out} has to end in .safetensors: other programs look for that."
        )
    if len({path.resolve() for path in written}) < len(written):
        raise UserError(f"--card {request.card} would replace another file of the export. Give "
                        "another --card.")  # fmt: skip
    for path in written:
        if path.resolve().is_relative_to(run.folder.resolve()):
            raise UserError(f"{path} lies in the run's own folder. Give a place outside of it.")
        if path.exists() and not (request.force and path.is_file()):
            other = "--card" if path == written[1] else "--out"
            replace = ", or --force to replace it" if path.is_file() else ""
            raise UserError(f"{path} is there already. Give another {other}{replace}.")


def described(run: RunFolder) -> dict[str, str]:
    """What the file says of where it comes from."""
    config = run.config
    title = f"{config.method} on {config.objective}, {short_name(config.model)}"
    return {
        "d3po_bench.base_model": config.model, "d3po_bench.method": config.method,
        "d3po_bench.objective": config.objective, "d3po_bench.seed": str(config.seed),
        "d3po_bench.run_id": config.run_id, "d3po_bench.version": __version__,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers",
        "modelspec.title": title, "modelspec.date": str(run.facts["ended"]),
        "modelspec.description": f"{title}; run {config.run_id} of d3po-bench.",
        "ss_sd_model_name": short_name(config.model),
    }  # fmt: skip


def short_name(model: str) -> str:
    """The last part of a model's folder or hub id, which says nothing of the machine."""
    return Path(model).name or model


# ---- the card


def card_of(run: RunFolder, source: Source, out: Path, sheet: Path | None) -> str:
    """A model card in Markdown, as the Hugging Face hub shows them.

    Args:
        run: a finished one.
        source: its base model.
        out: the LoRA, as seen from the card.
        sheet: a picture beside it, if there is one.
    """
    config = run.config
    hub = not Path(source.path).exists()
    head = [f"base_model: {source.path}"] if hub else []
    of = "the votes of people" if config.objective == FEEDBACK else f"`{config.objective}`"
    parts = [
        "\n".join(["---", *head, "library_name: diffusers", "pipeline_tag: text-to-image",
                   "tags:", "- lora", f"- {config.method}", "---"]),
        f"# {config.method} on {config.objective}, {short_name(config.model)}",
        f"A LoRA for `{short_name(config.model)}`, trained with `{config.method}` for {of} by "
        f"d3po-bench {__version__}: {config.rounds} rounds, seed {config.seed}, run "
        f"`{config.run_id}`." + _began(config),
        gain_of(run),
        "## Use",
        snippet(config, source, out),
    ]  # fmt: skip
    if sheet:
        told = "Above the model before training, below after it: the same prompts and noise."
        parts += ["## Pictures", f"![before and after]({out.with_suffix('.png').as_posix()})", told]
    return "\n\n".join(parts) + "\n"


def _began(config: RunConfig) -> str:
    return " It began with another LoRA, not with the base model." if config.lora else ""


def gain_of(run: RunFolder) -> str:
    """A sentence on what the run's own evaluation says it gained."""
    from eval.analysis.scores import shown_score
    from eval.analysis.statistics import between, interval

    objective = run.config.objective
    rows = [row for row in run.evaluation if row["sampler"] == "eta1"]
    rounds = sorted({row["round"] for row in rows})
    if len(rounds) < 2:
        return "The run was not evaluated, so nothing says what it gained."
    before, after = ({(row["prompt"], row["index"]): row["score"] for row in rows
                      if row["round"] == round_} for round_ in (rounds[0], rounds[-1]))  # fmt: skip
    changes: dict[str, list[float]] = {}
    for image, score in before.items():
        if image in after and math.isfinite(change := after[image] - score):
            changes.setdefault(image[0], []).append(change)
    if not changes:
        return "No evaluation image has a score, so nothing says what the run gained."
    means = [sum(values) / len(values) for values in changes.values()]
    told = between(sum(means) / len(means), *map(float, interval(means)))
    sign = 0 if objective == FEEDBACK else shown_score(run).sign
    better = f"; {'larger' if sign > 0 else 'smaller'} is better" if sign else ""
    return (
        f"Score on held-out noise: {told} from before training to its end{better}. The mean and "
        f"its 95 % interval are over {len(means)} prompts of this one run; other seeds differ."
    )


def snippet(config: RunConfig, source: Source, out: Path) -> str:
    """Python that draws with the file in stock diffusers."""
    place, lines = json.dumps(source.path), ["from diffusers import DiffusionPipeline"]
    if config.model in registry.names("model") and Path(source.path).exists():
        place = f'model_source("{config.model}").path'
        lines.append("from d3po_bench.models.sources import model_source")
    pinned = f', revision="{source.revision}"' if source.revision else ""
    lines += [
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({place}{pinned})",
        f"pipeline.load_lora_weights({json.dumps(str(out.parent))}, "
        f"weight_name={json.dumps(out.name)})  # from the folder of this card",
    ]
    return "\n".join(["```python", *lines, "```"])


def pictures(run: RunFolder) -> bytes:
    """A PNG of some prompts before training, and below after it; b"" where the run kept none.

    Raises:
        UserError: a picture is damaged.
    """
    import numpy as np
    import torch

    from d3po_bench.pictures import open_picture
    from d3po_bench.runs.files import png_bytes

    folders = sorted(run.folder.glob("samples/round-*"))
    if len(folders) < 2:
        return b""
    first, last = folders[0], folders[-1]
    names = [p.name for p in sorted(first.glob("*.png")) if (last / p.name).is_file()][:SHOWN]
    if not names:
        return b""
    with readable(run.folder / "samples"):  # of pictures that are not of one size
        sheet: Any = np.concatenate([
            np.concatenate([np.asarray(open_picture(folder / name)) for name in names], 1)
            for folder in (first, last)
        ])  # fmt: skip
    times = -(-SMALLEST // max(len(sheet) // 2, 1))  # every pixel of small ones stays visible
    large = sheet.repeat(times, 0).repeat(times, 1)
    return png_bytes(torch.from_numpy(large).permute(2, 0, 1))
