"""Parts of a pipeline from their files: a network is what its files say, or it is not loaded."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from d3po_bench.errors import UserError, is_out_of_memory

NAMED = 3
"""Tensors that a refusal names."""

MARK = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")
"""What stands before `.safetensors` in the name of a variant of the weights, such as `.fp16`."""


def load_part(kind: str, path: str, revision: str | None, name: str, dtype: torch.dtype) -> Any:
    """A part of a pipeline, from its subfolder `name`.

    Args:
        kind: its class in diffusers or transformers.
        path: folder or hub id of the pipeline.
        revision: of a hub id.
        name: of the part.
        dtype: of a network's weights.

    Raises:
        UserError: it does not load, does not fit its files, or has weights that are not
            safetensors.
    """
    import diffusers
    import transformers

    library = diffusers if hasattr(diffusers, kind) else transformers
    given: dict[str, Any] = {"revision": revision, "subfolder": name}
    with refused(
        f"The {name} of the pipeline in {path} does not load:",
        "Fetch or save the pipeline again, with its weights as .safetensors: no others are loaded.",
    ):
        made = getattr(library, kind)
        if issubclass(made, torch.nn.Module):
            folder = files_of(path, revision)
            variant = _variant(folder / name) if folder else None
            if folder:
                _require_own_shards(folder / name)
            return complete(made, path, variant=variant, dtype=dtype, **given)
        part = made.from_pretrained(path, **given)
        if getattr(part, "model_max_length", 0) > 10**6:
            raise OSError("its tokenizer is not there.")  # made up, for want of any file
        return part


@contextmanager
def refused(fault: str, remedy: str) -> Iterator[None]:
    """Around the loading of files of others: whatever that raises becomes one line.

    Args:
        fault: what cannot be done, before the loaders' own words.
        remedy: what helps, after them.

    Raises:
        UserError: of both; what is one already stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # a damaged file or a strange config can raise anything
        if is_out_of_memory(problem):
            raise
        raise UserError(f"{fault} {in_a_line(problem)} {remedy}") from problem


def complete(kind: Any, path: str | Path, **given: Any) -> Any:
    """A network whose every tensor is from its files, and whose files have no other tensors.

    Names that the libraries translate, such as those of old VAEs, count as what they become.

    Args:
        kind: class of the network.
        path: folder or hub id.
        given: to its `from_pretrained`.

    Raises:
        ValueError: naming the first tensors that are missing or left over.
    """
    network, found = kind.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, **given
    )
    # Of weights in several files, diffusers compares the index alone.
    absent = {name for name, tensor in network.state_dict().items() if tensor.is_meta}
    missing = sorted({*found["missing_keys"], *absent})
    left = sorted(found["unexpected_keys"])
    if any(".lora_" in name or ".base_layer." in name for name in left):
        raise ValueError(
            "it was saved with a LoRA on it. Call fuse_lora() and unload_lora_weights() before "
            f"save_pretrained(); its files have {_some(left)}."
        )
    if missing or left:
        lacks = [f"its files lack {_some(missing)}"] if missing else []
        more = [f"its files have {_some(left)}, for which it has no place"] if left else []
        raise ValueError(f"{' and '.join(lacks + more)}.")
    return network


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more tensors" if rest > 0 else "")


def files_of(path: str, revision: str | None) -> Path | None:
    """Where the files of a folder or a hub id lie on this machine; None before they came."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).exists():
        return Path(path)
    index = try_to_load_from_cache(path, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def _require_own_shards(folder: Path) -> None:
    """Refuse weights that lie elsewhere: nothing says whether those stay as they are.

    Raises:
        ValueError: naming the file.
    """
    for index in sorted(folder.glob("*.index.json")):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        for name in shards:
            if Path(name).name != name:
                raise ValueError(f"{index.name} names {name!a}, which is not a file beside it.")


def _variant(folder: Path) -> str | None:
    """The variant of the weights in a folder that has only one, such as fp16."""
    marks = [MARK.search(file.name) for file in folder.glob("*.safetensors")]
    names = {mark[1] if mark else None for mark in marks}
    return names.pop() if len(names) == 1 else None


def require_followed(
    parts: Mapping[str, Any], network: str, not_followed: Mapping[str, Mapping[str, str]]
) -> tuple[int, ...]:
    """Refuse parts that ask for more than latents, a time and prompts.

    Args:
        parts: of the pipeline.
        network: the name of the part that trains.
        not_followed: part -> field of its config -> what a part that sets it asks for.

    Returns:
        The shape [C, H, W] of the network's latents.

    Raises:
        UserError: the network has other channels than the VAE or no size; or a config has such a
            field.
    """
    shape = _latent_shape(parts, network)
    for part, fields in not_followed.items():
        for field, wish in fields.items():
            value = getattr(parts[part].config, field, None)
            if value not in (None, False):
                raise UserError(
                    f"The {part} of this pipeline asks for {wish} ({field} {value}), which is "
                    "not supported. Give --model another pipeline."
                )
    return shape


def _latent_shape(parts: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The latents of a network that can be called with them alone, as text-to-image calls it."""
    network = parts[name].config
    takes, gives, has = (
        network.in_channels, network.out_channels, parts["vae"].config.latent_channels
    )  # fmt: skip
    if not takes == gives == has:
        raise UserError(
            f"The {name} of this pipeline takes {takes} channels and gives {gives}, and its VAE "
            f"has {has}: it is no text-to-image network, but one that also takes a picture or a "
            "mask, as for inpainting. Give --model another pipeline."
        )
    size = network.sample_size
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(
            f"{name}/config.json of this pipeline does not say how large its pictures are. Set "
            '"sample_size" there to the side of its latents, such as 64 for 512 pixels.'
        )
    return (takes, *sides)


def quieten() -> None:
    """Switch off the loaders' progress bars and notes: they say nothing that a run needs."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # diffusers passes on an argument that the hub client no longer knows.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")


def in_a_line(problem: BaseException) -> str:
    """What an exception says, as a sentence in one line of no great length."""
    line = " ".join(str(problem).split()) or repr(problem)
    line = line if len(line) <= 240 else line[:240].rsplit(" ", 1)[0] + " ..."
    return line if line.endswith(".") else line + "."
