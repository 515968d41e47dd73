"""Draw a round as `feedback new` was asked to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from d3po_bench.config import FEEDBACK, make
from d3po_bench.errors import UserError
from d3po_bench.feedback.rounds import Round
from d3po_bench.feedback.sampling import (
    FIXED,
    Before,
    Sampling,
    Told,
    adapter_bytes,
    chosen_prompts,
    draw,
)
from d3po_bench.feedback.study import Study
from d3po_bench.models.sources import model_source
from d3po_bench.prompts import read_prompts
from d3po_bench.training.inputs import model_today


def draw_round(
    folder: Path, study: Study, prompts: str, *, count: int | None = None,
    images: int | None = None, before: Path | None = None, model: str = "tiny",
    preset: str | None = None, seed: int = 0, settings: Mapping[str, str] | None = None,
    device: str = "auto", beside: Path = Path(), told: Told = lambda done, total: None,
) -> Round:  # fmt: skip
    """Draw a round's images into `folder`; the same call continues where it was interrupted.

    Args:
        folder: of the round.
        study: what people will be asked.
        prompts: name of a list, or a file.
        count: of prompts; None for each once.
        images: of a prompt; None for 2, where all questions are of one or two, else 7.
        before: folder of a finished training whose weights draw. Model, seed and settings are
            then those of the rounds before.
        model: what draws the first round.
        preset: settings to start from; None for the one made for the model.
        seed: of all draws.
        settings: what differs from the preset.
        device: to draw on.
        beside: where the paths of the study's own pictures begin.
        told: called with how far it is.

    Raises:
        UserError: bad input, or another round lies in the folder.
    """
    images = _images(study, images)
    trained = Before.read(before) if before else None
    model = trained.settings["model"] if trained else model
    config, execution = make(
        "d3po", FEEDBACK, preset or model_source(model).preset, settings or {}, model=model
    )
    changed = next((key for key in settings or {} if key in FIXED), None)
    if trained and changed:
        raise UserError(f"--set {changed} does not go with --from, which keeps the settings of the "
                        "rounds before. Leave it out.")  # fmt: skip
    seed, number = (trained.seed, trained.number + 1) if trained else (seed, 0)
    sampling = Sampling(
        settings=trained.settings if trained else {name: getattr(config, name) for name in FIXED},
        seed=seed, number=number, images=images,
        adapter=hashlib.sha256(adapter_bytes(trained.weights)).hexdigest() if trained else "",
        prompts=tuple(chosen_prompts(read_prompts(prompts), count, seed, number)),
        block=max(1, execution.usual().sample_batch // images),
        inputs=model_today(model_source(model)),
    )  # fmt: skip
    weights = trained.weights if trained else None
    return draw(folder, sampling, (study, beside), weights, replace(execution, device=device), told)


def _images(study: Study, images: int | None) -> int:
    """Of each prompt: 2 where all questions are of one or two, else 7, unless told otherwise."""
    few = all(question.kind in ("pairs", "scale") for question in study.question)
    images = images or (2 if few else 7)
    if study.plain and study.question[0].kind == "pairs" and images != 2:
        raise UserError(f"A pair has 2 images, not {images}. Leave --images out.")
    return images
