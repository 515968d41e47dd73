"""Prompts as tensors: what the text encoders of several model families share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from d3po_bench.errors import UserError

TEXT_ENCODER = "text_encoder"
"""What the names of these parts begin with."""


def token_ids(tokenizer: Any, prompts: list[str], limit: int | None = None) -> Tensor:
    """Token numbers [P, limit], padded, or cut as diffusers cuts them.

    Args:
        tokenizer: of the pipeline.
        prompts: P texts.
        limit: tokens; None for the tokenizer's own.
    """
    ids: Tensor = tokenizer(
        prompts, padding="max_length", max_length=limit or tokenizer.model_max_length,
        truncation=True, return_tensors="pt",
    ).input_ids  # fmt: skip
    return ids


@contextmanager
def lent(parts: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Have the text encoders on a device for a while, and its memory back afterwards.

    Args:
        parts: of a pipeline, by name.
        device: where they compute.
    """
    encoders = [part for name, part in parts.items() if name.startswith(TEXT_ENCODER)]
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


NAMED = 5
"""Of the prompts that are too long, so many are named."""


def require_short(
    parts: Mapping[str, Any], limits: Mapping[str, int], prompts: Sequence[str]
) -> None:
    """Refuse prompts that have more tokens than a text encoder reads.

    Args:
        parts: of the pipeline, by name, tokenizers among them.
        limits: tokens of tokenizers whose own limit is another.
        prompts: P texts; an empty one, the unconditional, does not count.

    Raises:
        UserError: naming some of them, with their tokens.
    """
    long: dict[str, str] = {}
    for name in (name for name in parts if name.startswith("tokenizer") and prompts):
        tokenizer, marks = parts[name], parts[name].num_special_tokens_to_add()
        limit = limits.get(name, tokenizer.model_max_length) - marks
        for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
            if len(ids) - marks > limit:
                long.setdefault(prompt, f"{prompt[:40]!r} has {len(ids) - marks} of {limit}")
    if long:
        rest = f", and {len(long) - NAMED} more" if len(long) > NAMED else ""
        count = sum(map(bool, prompts))
        raise UserError(
            f"{len(long)} of {count} prompts have more tokens than the text encoder reads: "
            f"{', '.join(list(long.values())[:NAMED])}{rest}. Shorten them, or have them cut: "
            "--set long_prompts=cut, or --long-prompts cut of `evaluate`."
        )


def clip_text(tokenizer: Any, encoder: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What SDXL and SD3 read of a CLIP text encoder: all but its last layer, and its first output.

    Returns:
        Hidden states [P, L, E] before the last layer, and the first output: the projected
        pooled embedding [P, F] of a CLIPTextModelWithProjection.
    """
    found = encoder(token_ids(tokenizer, prompts).to(encoder.device), output_hidden_states=True)
    return found.hidden_states[-2], found[0]
