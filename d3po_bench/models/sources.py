"""Where models come from: names, folders and hub ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from d3po_bench import registry
from d3po_bench.errors import UserError
from d3po_bench.runs.digests import sha256_once


def model_source(name: str) -> Source:
    """A named model, or a diffusers folder, or a hub id.

    Raises:
        UserError: `name` looks like neither.
    """
    if name in registry.names("model"):
        source: Source = registry.model_source(name)
        return source
    if Path(name).exists() or (name.count("/") == 1 and not name.startswith((".", "/"))):
        return Source(path=name)
    raise registry.unknown("model", name, [*registry.names("model"), "FOLDER", "HUB/ID"])


LOADED = (".json", ".safetensors", ".txt")
"""What a pipeline is made of: configs, weights, vocabularies. Pickles (.bin) are never loaded."""


@dataclass(frozen=True)
class Source:
    """Where a named model comes from, and the preset that suits it."""

    path: str
    """A folder, or a hub id."""
    revision: str | None = None
    """The pinned commit of a hub id."""
    preset: str = "paper"
    size: str = ""
    """How much there is to download, for people."""
    scorers: str = "official"
    """Weights of the scorers that suit its pictures."""
    pin: Path | None = None
    """A file with the sha256 that the folder's content must have; see `content`."""


def fingerprint(source: Source) -> str:
    """Twelve hex digits that name the content of a pipeline folder; a hub id with its revision."""
    folder = Path(source.path)
    if not folder.is_dir():
        return f"{source.path}@{source.revision or 'main'}"
    return content(folder)[:12]


def content(folder: Path) -> str:
    """sha256, hex, of all that a pipeline in `folder` is loaded from: names, sizes and bytes."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in LOADED):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        whole.update(bytes.fromhex(sha256_once(path)))
    return whole.hexdigest()


def commit(source: Source) -> str | None:
    """The commit of a hub id's files on this machine; None for a folder, and before they came."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source.path).exists():
        return None
    index = try_to_load_from_cache(source.path, "model_index.json", revision=source.revision)
    return Path(index).parent.name if isinstance(index, str) else None


def require_pinned(source: Source) -> None:
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
            f"Expected the model in {source.path} with the sha256 {expected}, got {found}: a file "
            "of it is damaged or was exchanged. Install the package again."
        )


def absent(source: Source) -> UserError:
    """The error for a model that is neither here nor can be fetched."""
    folder = Path(source.path)
    if folder.exists():
        return UserError(
            f"Expected a diffusers pipeline folder with a model_index.json, got {source.path} "
            "without one that can be read. Give --model a folder saved by save_pretrained, a hub "
            "id, or tiny."
        )
    pinned = f" --revision {source.revision}" if source.revision else ""
    size = f" ({source.size})" if source.size else ""
    return UserError(
        f"Expected the model {source.path}{size} on this machine or a connection to fetch it, "
        f"got neither. Run `hf download {source.path}{pinned}` where there is a network, or "
        "give --model the path of a pipeline folder."
    )
