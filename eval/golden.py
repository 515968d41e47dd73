"""Golden scores: what each scorer said of fixed pictures, and must say again before it is used.

`golden.json` holds them for each scorer and each set of weights. Another library version, a
damaged file or a changed preprocessing then stops a run instead of moving its numbers. Weights
that ship with the package all have golden scores; others that have none are used, and named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.digests import sha256_of, short
from d3po_bench.errors import UserError
from d3po_bench.scoring import Sum
from d3po_bench.types import Scorer, ScorerWithColumns
from eval.scorers._clip import SHIPPED

GOLDEN = Path(__file__).parent / "golden.json"

TOLERANCE = 2e-3
"""Largest difference, as a share of the golden scores' own spread or of 1, whichever is more."""

PROMPTS = (
    "a cat on a red background",
    "a dog on a blue striped background",
    "a fish on a green plain background",
    "a zebra on a yellow checked background",
) * 2

PACKAGES = ("numpy", "pillow", "torch", "transformers")


def pictures() -> Tensor:
    """Eight pictures [8, 3, 64, 64] uint8 from whole-number arithmetic: the same everywhere."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    waves = [(x * (3 + k) + y * (7 - k)) % 256 for k in range(4)]
    discs = [(x - 32) ** 2 + (y - 24 - 4 * k) ** 2 for k in range(4)]
    flat = [torch.where(d < 300, 40 * k + 90, 255 - 50 * k) for k, d in enumerate(discs)]
    planes = [torch.stack([p, (p * 2) % 256, 255 - p]) for p in (*waves, *flat)]
    return torch.stack(planes).to(torch.uint8)


def columns(name: str, scorer: Scorer) -> dict[str, list[float]]:
    """What the scorer says of the pictures, by column."""
    images = pictures()
    if isinstance(scorer, ScorerWithColumns):
        found = scorer.columns(images, PROMPTS)
    else:
        found = {name: scorer(images, PROMPTS)}
    return {column: [round(float(s), 6) for s in scores] for column, scores in found.items()}


def fingerprint(scorer: Scorer) -> str:
    """Twelve hex digits that name the files a scorer was loaded from; "code" without any.

    A scorer that comes from no file but not from code alone has a `digest` of its own.

    Raises:
        OSError: a file cannot be read.
    """
    own = getattr(scorer, "digest", None)
    if own is not None:
        return str(own)
    sources = getattr(scorer, "sources", ())
    if not sources:
        return "code"
    return short("".join(sha256_of(path) for path in sources))


def check(name: str, scorer: Scorer) -> bool:
    """Compare a scorer with its golden scores.

    Args:
        name: of the scorer, with :weights where they can be chosen.
        scorer: what has that name.

    Returns:
        Whether there are any for its weights.

    Raises:
        UserError: it says something else, or there are none though its weights ship with us.
    """
    base, _, weights = name.partition(":")
    known, files = recorded().get(base, {}), fingerprint(scorer)
    if files in known:
        for column, found in columns(base, scorer).items():
            _compare(base, column, known[files], found)
        return True
    if known and weights in ("", *SHIPPED):
        raise UserError(
            f"The weights of {base} ({files}) are not those that ship with the package "
            f"({', '.join(known)}): a file is damaged or was exchanged. Install the package again; "
            "weights of your own need `d3po-bench doctor --record`."
        )
    return False


def checked_scorer(name: str, device: torch.device, weights: str = "official") -> Scorer:
    """The scorer of that name, loaded on `device`, after it gave its golden scores.

    Args:
        name: of the scorer, or name:weights, such as aesthetic:tiny; or a sum of objectives.
        device: where its network runs, if it has one.
        weights: which ones to take where the name does not say.

    Raises:
        UserError: no such scorer, it takes no weights, they are not there, or it says something
            else than it once did.
    """
    if parts := registry.summands(name):
        loaded = {
            part: (weight, checked_scorer(text, device, weights))
            for part, (text, weight) in parts.items()
        }
        return Sum(registry.name_of("objective", name), loaded)
    found = registry.load_scorer(name, device, weights)
    chosen = ":" not in name and registry.usual_weights(name) is not None
    check(f"{name}:{weights}" if chosen else name, found)
    return found


def unchecked(scorers: Mapping[str, Scorer]) -> list[str]:
    """Names of those that have no golden scores for their weights, with or without :weights.

    What is the user's own is not told of: its text is on record.
    """
    return sorted(
        name
        for name, scorer in scorers.items()
        if not getattr(scorer, "own", False)
        and fingerprint(scorer) not in recorded().get(name.partition(":")[0], {})
    )


def note(names: Sequence[str]) -> str:
    """What people are told of scorers that are `unchecked`."""
    return (
        f"there are no golden scores for the weights of {', '.join(names)}: nothing checks that "
        "they score as they once did"
    )


def _compare(name: str, column: str, expected: dict[str, Any], found: list[float]) -> None:
    then, now = (torch.tensor(v).double() for v in (expected["scores"][column], found))
    same = then.isnan() == now.isnan()
    spread = then[~then.isnan()].std(correction=0).clamp(min=1) if (~then.isnan()).any() else 1
    off = (then - now).nan_to_num().abs() / spread
    if bool(same.all()) and bool((off <= TOLERANCE).all()):
        return
    at = int((off + (~same) * 1e9).argmax())
    recorded_with, here = (
        ", ".join(f"{package} {number}" for package, number in found.items())
        for found in (expected["versions"], versions())
    )
    raise UserError(
        f"The scorer {name} ({column}) gives {now[at]:.6g} for its golden picture {at}, with "
        f"{here}; it gave {then[at]:.6g} with {recorded_with}. Install the pinned versions: pip "
        "install -c constraints.txt d3po-bench."
    )


def versions() -> dict[str, str]:
    """The libraries that a score can depend on."""
    return {package: version(package) for package in PACKAGES}


@cache
def recorded() -> dict[str, dict[str, dict[str, Any]]]:
    """Scorer -> fingerprint of its weights -> scores by column, and versions."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


def record(name: str, scorer: Scorer) -> None:
    """Write what a scorer says now into golden.json.

    Raises:
        UserError: the file cannot be written.
    """
    entry = {"scores": columns(name, scorer), "versions": versions()}
    everything = json.loads(GOLDEN.read_text(encoding="utf-8"))
    everything.setdefault(name, {})[fingerprint(scorer)] = entry
    text = json.dumps(everything, indent=1, sort_keys=True) + "\n"
    try:
        GOLDEN.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(
            f"{GOLDEN} cannot be written: {problem.strerror}. Record in a clone of the project "
            "that is yours, installed with pip install -e."
        ) from problem
    recorded.cache_clear()
