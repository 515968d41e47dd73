"""Where models come from: names, folders, hub ids, and Python files with a family of their own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_bench import own, registry, types
from d3po_bench.digests import files_below, sha256_of
from d3po_bench.errors import UserError
from d3po_bench.models.one_file import find, in_one_file

if TYPE_CHECKING:
    import torch

    from d3po_bench.models.adapters import Training
    from d3po_bench.types import Model

LOADED = (".json", ".safetensors", ".txt", ".model")
"""What a pipeline is made of: configs, weights, vocabularies. Pickles (.bin) are never loaded."""


@dataclass(frozen=True)
class Source:
    """Where a named model comes from, and the preset that suits it."""

    path: str
    """A folder, a hub id, or a Python file that defines FAMILY."""
    revision: str | None = None
    """The pinned commit of a hub id."""
    preset: str = "paper"
    size: str = ""
    """How much there is to download, for people."""
    scorers: str = "official"
    """Weights of the scorers that suit its pictures."""
    prompts: str = ""
    """A list of held-out prompts that suits its pictures."""
    small: bool = False
    """Whether a run is fastest on one thread, and several fit side by side."""
    pin: Path | None = None
    """A file with the sha256 that the folder's content must have; see `content`."""

    @property
    def is_code(self) -> bool:
        """Whether it is a Python file."""
        return Path(self.path).suffix == ".py"


def model_source(name: str) -> Source:
    """A named model, or a diffusers folder, a hub id, or a Python file.

    Raises:
        UserError: `name` looks like none of them.
    """
    if name in registry.names("model"):
        source: Source = registry.model_source(name)
        return source
    if (name and Path(name).exists()) or (name.count("/") == 1 and not name.startswith((".", "/"))):
        return Source(path=name)
    raise registry.unknown("model", name, [*registry.names("model"), "FOLDER", "HUB/ID", "FILE.py"])


def load(source: Source, device: torch.device, training: Training) -> Model:
    """Load a model, without an adapter, by the family that knows its pipeline class.

    Raises:
        UserError: it is not there, no family loads it, it is not what ships, or a part of it does
            not load.
    """
    if source.is_code:
        return _of_file(source.path, device, training)
    from d3po_bench.models.parts import refused

    _require_pinned(source)
    index = model_index(source)
    # All parts of a hub id come from one commit, whatever happens to its branch meanwhile.
    found = commit(source)
    kind = str(index.get("_class_name", "pipeline without a _class_name"))
    family = registry.family(kind, source.path)
    with refused(
        f"The pipeline in {source.path} cannot be drawn with:",
        "Correct the config of its scheduler, tokenizer or VAE, or save the pipeline again.",
    ):
        model: Model = family.load(source.path, found or source.revision, index, device, training)
    model.commit = found
    return model


def _of_file(path: str, device: torch.device, training: Training) -> Model:
    family = getattr(own.from_file(Path(path)), "FAMILY", None)
    if not callable(getattr(family, "load", None)):
        raise UserError(
            f"{path} has no FAMILY with a function load. Add it, as docs/own-model.md shows."
        )
    model = family.load(path, None, {}, device, training)  # type: ignore[union-attr]
    if isinstance(model, types.Model):
        return model
    raise UserError(
        f"The FAMILY of {path} loads a {type(model).__name__}, which lacks a part of "
        "d3po_bench.types.Model. docs/own-model.md names them all."
    )


def threads_of(source: Source, wanted: int = 0) -> int:
    """CPU threads of a run: `wanted`, or one for a small model, of which two beat one on two."""
    import torch

    return wanted or (1 if source.small else torch.get_num_threads())


def fingerprint(source: Source) -> str:
    """Twelve hex digits that name the content of a folder or file; a hub id with its revision."""
    place = Path(source.path)
    if place.is_file():
        return sha256_of(place)[:12]
    if not place.is_dir():
        return f"{source.path}@{source.revision or 'main'}"
    return content(place)[:12]


def content(folder: Path) -> str:
    """sha256, hex, of all that a pipeline in `folder` is loaded from: names, sizes and bytes."""
    whole = hashlib.sha256()
    for path in (p for p in files_below(folder) if p.suffix in LOADED):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        whole.update(bytes.fromhex(sha256_of(path)))
    return whole.hexdigest()


def commit(source: Source) -> str | None:
    """The commit of a hub id's files on this machine; None for a folder, and before they came."""
    from d3po_bench.models.parts import files_of

    found = None if Path(source.path).exists() else files_of(source.path, source.revision)
    return found.name if found else None


def _require_pinned(source: Source) -> None:
    """Refuse a folder that ships with the package and is not as it was.

    Raises:
        UserError: naming both checksums.
    """
    if source.pin is None:
        return
    try:
        expected, found = source.pin.read_text(encoding="utf-8").strip(), content(Path(source.path))
    except (OSError, ValueError) as problem:
        expected, found = "on record", str(problem)
    if found != expected:
        raise UserError(
            f"The model in {source.path} is damaged or was exchanged: its sha256 is {found}, not "
            f"{expected}. Install the package again."
        )


def model_index(source: Source) -> dict[str, Any]:
    """The pipeline's model_index.json.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    from diffusers import DiffusionPipeline

    from d3po_bench.models.parts import quieten

    quieten()
    try:
        index = DiffusionPipeline.load_config(source.path, revision=source.revision)
        return dict(index)
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        checkpoint = find(Path(source.path))
        if checkpoint:
            raise in_one_file(checkpoint) from problem
        if Path(source.path).exists():
            raise UserError(
                f"{source.path} has no model_index.json that can be read. Give --model a folder "
                "saved by save_pretrained, a hub id, or tiny."
            ) from problem
        pinned = f" --revision {source.revision}" if source.revision else ""
        size = f" ({source.size})" if source.size else ""
        raise UserError(
            f"The model {source.path}{size} is not on this machine and cannot be fetched. Run "
            f"`hf download {source.path}{pinned}` where there is a network, or give --model the "
            "path of a pipeline folder."
        ) from problem
