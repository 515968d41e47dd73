"""Calling a scorer: whoever wrote it, it gives a number for each picture and changes nothing else.

`registry.load_scorer` hands out no other, so every score of a run, an evaluation or a simulated
rater comes through here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3po_bench.digests import sha256_of, short
from d3po_bench.errors import RunError, UserError
from d3po_bench.types import Scorer, ScorerWithColumns

TAKEN = frozenset({
    "round", "sampler", "prompt", "index", "score", "kl", "drift", "file", "size", "steps",
    "guidance", "weights",
})  # fmt: skip
"""Columns of eval.csv and rows.csv that are ours; one of a scorer's own would overwrite them."""

KL_OF_STEP = re.compile(r"kl_\d+")
"""More of ours: the KL of a denoising step, counted from 1."""


def _ours(name: str) -> bool:
    return name in TAKEN or KL_OF_STEP.fullmatch(name) is not None


class Guarded:
    """A scorer as the rest of the program calls it.

    It is shown copies, its numbers become float32 on the CPU, and torch is afterwards as it was.
    """

    def __init__(self, name: str, scorer: Scorer, unit: str = "", digest: str = "") -> None:
        """Take what `load` of a scorer returned.

        Args:
            name: on the command line, with :weights where they are chosen.
            scorer: what is called.
            unit: of its numbers, where the scorer does not say itself.
            digest: what names its content, likewise.

        Raises:
            UserError: it is no scorer, or its name is that of a column of ours.
        """
        if _ours(name):
            raise UserError(
                f"A scorer cannot be called {name}: evaluations have a column of that name. "
                "Rename it."
            )
        found = unit or getattr(scorer, "unit", None)
        if not callable(scorer) or not isinstance(found, str):
            raise UserError(
                f"The scorer {name} is a {type(scorer).__name__} without a call or a unit. Give "
                "it both: __call__(images, prompts) and, say, unit = 'points'."
            )
        self.name, self.scorer, self.unit = name, scorer, found
        for known in ("sources", "digest", "compares"):
            if hasattr(scorer, known):
                setattr(self, known, getattr(scorer, known))
        self.own = bool(digest)
        """Whether it is the user's, with its text on record."""
        if digest:
            weights = "".join(map(sha256_of, getattr(scorer, "sources", ())))
            self.digest = short(digest + weights) if weights else digest
        if isinstance(scorer, ScorerWithColumns):
            self.columns = self._columns

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N], float32 on the CPU, of images [N, 3, h, w] uint8.

        Raises:
            RunError: the scorer returned anything but a number for each picture.
        """
        return self._numbers(self._asked(self.scorer, images, prompts), len(images))

    def _columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Column name -> scores [N]."""
        found = self._asked(getattr(self.scorer, "columns"), images, prompts)  # noqa: B009
        if not isinstance(found, dict) or any(not isinstance(column, str) for column in found):
            raise RunError(
                f"The columns of the scorer {self.name} are a {type(found).__name__}, not a "
                "dictionary from names to scores. Correct that scorer."
            )
        if odd := [n for n in found if not n.isprintable() or not n.strip()]:
            raise RunError(
                f"The scorer {self.name} has a column {odd[0]!a}, which no table can have. Give it "
                "a name of printable characters in that scorer."
            )
        if wrong := sorted(filter(_ours, found)):
            raise RunError(
                f"The scorer {self.name} has a column {wrong[0]}, as every evaluation has. Rename "
                "it in that scorer."
            )
        return {column: self._numbers(values, len(images)) for column, values in found.items()}

    def _asked(
        self, ask: Callable[[Tensor, Sequence[str]], Any], images: Tensor, prompts: Sequence[str]
    ) -> Any:
        """What the scorer says of copies that it may write into."""
        with undisturbed():
            return ask(images.clone(), list(prompts))

    def _numbers(self, found: Any, count: int) -> Tensor:
        try:
            values = found if isinstance(found, Tensor) else torch.from_numpy(_array(found))
            if values.is_complex():
                raise TypeError("complex numbers")
            if values.is_nested or values.layout != torch.strided:
                raise TypeError("a nested or sparse tensor")
            values = values.detach().to("cpu", torch.float32, copy=True)
        except Exception as problem:  # what it returned may be an object of any package
            raise RunError(
                f"The scorer {self.name} returned no numbers but a {type(found).__name__}: "
                f"{problem}. Correct that scorer."
            ) from problem
        if values.shape == (count, 1):
            values = values.squeeze(1)
        if values.shape != (count,):
            raise RunError(
                f"The scorer {self.name} returned numbers of the shape {tuple(values.shape)} for "
                f"{count} pictures. Correct that scorer: it must give one for each."
            )
        return values


class Sum:
    """A weighted sum of scorers, as a scorer."""

    unit = "weighted sum"

    def __init__(self, name: str, parts: Mapping[str, tuple[float, Scorer]]) -> None:
        """`parts`: name -> weight, with the sign of its direction, and scorer."""
        self.name, self._parts = name, parts
        self.parts = {part: scorer for part, (_, scorer) in parts.items()}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Sums [N] of images [N, 3, h, w] uint8."""
        return self.apart(images, prompts)[0]

    def apart(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums [N], and the scores [N] of each part, in its own unit and direction.

        Raises:
            RunError: a part has none for a picture.
        """
        found: dict[str, Tensor] = {}
        for name, scorer in self.parts.items():
            found[name] = scorer(images, prompts)
            require_scores(scorer, found[name])
        total = sum(weight * found[name] for name, (weight, _) in self._parts.items())
        return torch.as_tensor(total), found


def apart(
    scorer: Scorer, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores [N], and those of each part of a sum; {} for what is none."""
    return scorer.apart(images, prompts) if isinstance(scorer, Sum) else (
        scorer(images, prompts), {}
    )  # fmt: skip


def _array(found: Any) -> Any:
    """Numbers as numpy has them; NaN, so that it says nothing, where one is masked."""
    if np.iscomplexobj(found):  # numpy would drop the imaginary part
        raise TypeError("complex numbers")
    if isinstance(found, np.ma.MaskedArray):  # numpy would take what is beneath the mask
        found = np.ma.filled(found.astype(np.float64), np.nan)
    return np.array(found, dtype=np.float64)


def require_scores(scorer: Scorer, scores: Tensor) -> None:
    """Stop before a NaN or an infinity is trained on.

    Args:
        scorer: where they come from, for people.
        scores: of any shape.

    Raises:
        RunError: naming the scorer.
    """
    wrong = scores[~torch.isfinite(scores)]
    if len(wrong):
        name = getattr(scorer, "name", type(scorer).__name__)
        raise RunError(
            f"The scorer {name} returned {wrong[0]} for {len(wrong)} of {scores.numel()} pictures. "
            "Check that scorer, and whether it can judge these prompts."
        )


# ---- torch's global state


Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How it is read and set."""


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # both of torch's interfaces to it were used
        return "mixed"


def _flushes_denormals() -> bool:
    return not (torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1).item()


def _folder() -> str | None:
    with suppress(OSError):  # it may have been removed
        return os.getcwd()  # noqa: PTH109  # to go back to, not to join
    return None


def _go_back(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _attributes(owner: Any, *names: str) -> Iterator[Setting]:
    for name in names:
        yield partial(getattr, owner, name), partial(setattr, owner, name)


_STATE: tuple[Setting, ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (_precision, torch.set_float32_matmul_precision),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda found: torch.use_deterministic_algorithms(found[0], warn_only=found[1]),
    ),
    (_flushes_denormals, torch.set_flush_denormal),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    *(
        (partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind))
        for kind in ("cpu", "cuda")
    ),
    *(
        (
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled"),
            getattr(torch.backends.cuda, f"enable_{kind}_sdp"),
        )
        for kind in ("flash", "mem_efficient", "math", "cudnn")
    ),
    *_attributes(torch.backends.cudnn, "enabled", "benchmark", "deterministic", "allow_tf32"),
    *_attributes(
        torch.backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
    ),
    (_folder, _go_back),  # a run's folder may be relative
)  # fmt: skip
"""How to read and to set what foreign code changes for a whole process."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Around foreign code: afterwards torch computes, learns and draws as before.

    With autograd left switched off nothing would train, for example, and nothing would say so.
    """
    before = [read() for read, _ in _STATE]
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if used else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for (read, write), value in zip(_STATE, before, strict=True):
            if read() != value:
                write(value)
