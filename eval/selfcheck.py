"""Does a scorer still say what it said? Fixed pictures and prompts, and the scores they had.

`golden.json` holds, for each scorer and each set of weights, the scores of these pictures. Before
a scorer is used it must give them again: another library version, a damaged file or a changed
preprocessing then stops a run instead of moving its numbers. Weights that ship with the package
are all in it; those of others that are not are used, and named as such.
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
from d3po_bench.digests import short
from d3po_bench.errors import UserError
from d3po_bench.types import Scorer, ScorerWithColumns
from eval import weights

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
    """
    own = getattr(scorer, "digest", None)
    if own is not None:
        return str(own)
    sources = getattr(scorer, "sources", ())
    if not sources:
        return "code"
    together = "".join(weights.fingerprint(path) for path in sources)
    return short(together)


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
    base, _, own = name.partition(":")
    expected = _expected(base, scorer)
    if expected is None:
        if own in ("", "tiny"):
            _require_none_ship(base, scorer)
        return False
    for column, found in columns(base, scorer).items():
        _compare(base, column, expected, found)
    return True


def checked_scorer(name: str, device: torch.device, weights: str = "official") -> Scorer:
    """The scorer of that name, loaded on `device`, after it gave its golden scores.

    Args:
        name: of the scorer, or name:weights, such as aesthetic:tiny.
        device: where its network runs, if it has one.
        weights: which ones to take where the name does not say.

    Raises:
        UserError: no such scorer, it takes no weights, they are not there, or it says something
            else than it once did.
    """
    found = registry.load_scorer(name, device, weights)
    chosen = ":" not in name and registry.takes_weights(name)
    check(f"{name}:{weights}" if chosen else name, found)
    return found


def unchecked(scorers: Mapping[str, Scorer]) -> list[str]:
    """Names of those that have no golden scores for their weights, with or without :weights."""
    return sorted(n for n, s in scorers.items() if _expected(n.partition(":")[0], s) is None)


def note(names: Sequence[str]) -> str:
    """What people are told of scorers that are `unchecked`."""
    return (
        f"no golden scores for the weights of {', '.join(names)}: what they say is not compared "
        "with what they once said"
    )


def _expected(name: str, scorer: Scorer) -> dict[str, Any] | None:
    return golden().get(name, {}).get(fingerprint(scorer))


def _require_none_ship(name: str, scorer: Scorer) -> None:
    """Refuse weights in the place of those that ship: all of these have golden scores."""
    known = golden().get(name)
    if known:
        raise UserError(
            f"Expected the weights of {name} that ship with the package ({', '.join(known)}), got "
            f"others ({fingerprint(scorer)}): a file is damaged or was exchanged. Install the "
            "package again; weights of your own making need `d3po-bench doctor --record`."
        )


def _compare(name: str, column: str, expected: dict[str, Any], found: list[float]) -> None:
    then, now = (torch.tensor(v).double() for v in (expected["scores"][column], found))
    same = then.isnan() == now.isnan()
    spread = then[~then.isnan()].std(correction=0).clamp(min=1) if (~then.isnan()).any() else 1
    off = (then - now).nan_to_num().abs() / spread
    if bool(same.all()) and bool((off <= TOLERANCE).all()):
        return
    at = int((off + (~same) * 1e9).argmax())
    raise UserError(
        f"Expected {then[at]:.6g} from the scorer {name} ({column}) for its golden picture {at}, "
        f"recorded with {_said(expected['versions'])}; got {now[at]:.6g} with {_said(versions())}. "
        "Install the pinned versions: pip install -c constraints.txt d3po-bench."
    )


def _said(found: dict[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in found.items())


def versions() -> dict[str, str]:
    """The libraries that a score can depend on."""
    return {package: version(package) for package in PACKAGES}


@cache
def golden() -> dict[str, dict[str, dict[str, Any]]]:
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
            f"Expected to write {GOLDEN}, got: {problem.strerror}. Record in a clone of the "
            "project that is yours, installed with pip install -e."
        ) from problem
    golden.cache_clear()
