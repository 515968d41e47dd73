"""Prompts as tensors: what the text encoders of several model families share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d3po_bench.errors import UserError


def token_ids(tokenizer: Any, prompts: list[str], limit: int | None = None) -> Tensor:
    """Token numbers [P, limit], padded.

    Args:
        tokenizer: of the pipeline.
        prompts: P texts.
        limit: tokens; None for the tokenizer's own.

    Raises:
        UserError: a prompt has more tokens than the text encoder reads.
    """
    limit = limit or int(tokenizer.model_max_length)
    for prompt in prompts:
        count = len(tokenizer(prompt).input_ids)
        if count > limit:
            marks = tokenizer.num_special_tokens_to_add()
            raise UserError(
                f"A prompt has {count - marks} tokens, and the text encoder reads "
                f"{limit - marks}: {prompt[:60]!r}. Shorten it; the rest would be ignored."
            )
    ids: Tensor = tokenizer(
        prompts, padding="max_length", max_length=limit, return_tensors="pt"
    ).input_ids
    return ids


def clip_text(tokenizer: Any, encoder: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What SDXL and SD3 read of a CLIP text encoder: all but its last layer, and its first output.

    Returns:
        Hidden states [P, L, E] before the last layer, and the first output: the projected
        pooled embedding [P, F] of a CLIPTextModelWithProjection.

    Raises:
        UserError: a prompt has more tokens than the text encoder reads.
    """
    found = encoder(token_ids(tokenizer, prompts).to(encoder.device), output_hidden_states=True)
    return found.hidden_states[-2], found[0]
