"""Models in one file, as model sites have them: diffusers makes a folder of one."""

from __future__ import annotations

from pathlib import Path

from d3po_bench.errors import UserError


def find(place: Path) -> Path | None:
    """The file itself, or the first in a folder; None if there is none."""
    files = [place] if place.is_file() else sorted(place.glob("*"))
    return next((file for file in files if file.suffix in {".safetensors", ".ckpt"}), None)


def in_one_file(checkpoint: Path) -> UserError:
    """What to say of one: the command that makes a folder of it."""
    return UserError(
        f"{checkpoint} is a whole model in one file. Make a folder of it, with `python -c "
        f'"from diffusers import {_pipeline(checkpoint)} as P; '
        f"P.from_single_file('{checkpoint}').save_pretrained('FOLDER')\"`, and give "
        "--model FOLDER."
    )


def _pipeline(checkpoint: Path) -> str:
    """The class of diffusers whose `from_single_file` reads a checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="pt") as opened:
            names = " ".join(opened.keys())
    except SafetensorError:  # a .ckpt
        names = ""
    if "joint_blocks." in names:
        return "StableDiffusion3Pipeline"
    return "StableDiffusionXLPipeline" if "conditioner." in names else "StableDiffusionPipeline"
