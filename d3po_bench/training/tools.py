"""What scores and measures a run. `eval` brings it, and the command line hands it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from d3po_bench.config import RunConfig
    from d3po_bench.diffusion.process import Sampler, Spacing
    from d3po_bench.types import Model, Scorer

Row = dict[str, Any]

SHOWN = 10
"""Prompts whose evaluation images are kept as PNG files."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """What is drawn at every evaluation: `images` of each prompt, from fixed noise."""

    prompts: Sequence[str]
    images: int = 1
    steps: int = 20
    guidance: float = 5.0
    sampler: Sampler | Literal["auto"] = "auto"
    """Of training, with its `eta`."""
    eta: float = 1.0
    timestep_spacing: Spacing = "model"
    batch: int = 128
    decode_batch: int = 16
    noise: int = 0
    """Which of the fixed noises."""
    first: int = 0
    """Number of the first prompt in a longer list, whose other parts are drawn elsewhere."""
    samplers: Sequence[str] = ("eta1", "eta0")
    """The training sampler, and the deployment sampler, which adds no noise."""
    untrained: bool = False
    """The model is still the pretrained one, from which it has not drifted."""


@dataclass(frozen=True)
class Tools:
    """Functions of `eval`, which stands on this package."""

    scorer: Callable[[str, torch.device, str], Scorer]
    """The scorer of a name, on a device, with weights; checked against its golden scores."""
    evaluate: Callable[
        [Model, EvaluationSet, Mapping[str, Scorer], Callable[[float], None]],
        tuple[list[Row], dict[str, Tensor]],
    ]
    """Rows of an evaluation, and the pictures [N, 3, h, w] uint8 of each sampler. What comes last
    is called with the share that is done."""
    fingerprint: Callable[[Any], str]
    """What names a scorer's weights."""
    unchecked: Callable[[Mapping[str, Scorer]], list[str]]
    """The scorers without golden scores for their weights."""
    note: Callable[[Sequence[str]], str]
    """What to tell people about those."""
    command: Callable[[RunConfig, Path], str]
    """The command line that makes the run of a config in a folder."""


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """At most `count` of the prompts, evenly spread over the list.

    Each once: an evaluation image is known by its prompt and its number among that prompt's.
    """
    known = list(dict.fromkeys(prompts))
    if len(known) <= count:
        return known
    return [known[i * len(known) // count] for i in range(count)]
