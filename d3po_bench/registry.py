"""A name on the command line -> the file that answers to it. No table to edit.

A method is a file with `METHOD = ...` beside `d3po.py` or in `baselines/`; a scorer one with
`def load(` in `eval/scorers/`; an objective one with `OBJECTIVE = ...`; a model one with
`SOURCE = ...`. Packages elsewhere add methods and scorers through the entry points
`d3po_bench.methods` and `d3po_bench.scorers`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from d3po_bench.errors import UserError
from d3po_bench.types import Method, Objective, Scorer

Kind = Literal["method", "objective", "scorer", "model"]

HOME = Path(__file__).parent.parent
_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "method": ("d3po_bench", "baselines"),
    "objective": ("d3po_bench.objectives",),
    "scorer": ("eval.scorers",),
    "model": ("d3po_bench.models",),
}
_MARKS: dict[Kind, str] = {
    "method": "\nMETHOD",
    "objective": "\nOBJECTIVE",
    "scorer": "\ndef load(",
    "model": "\nSOURCE",
}


@cache
def _package(name: str) -> Path:
    """Folder of one of our packages; refuses a stranger's package of the same name."""
    path = Path(*name.split("."))
    found = Path(str(importlib.import_module(name).__file__)).parent
    if found.resolve() != (HOME / path).resolve():
        raise UserError(
            f"Expected the package {name!r} beside d3po_bench in {HOME}, got {found}. Another "
            "project with that import name comes first: use an environment of its own."
        )
    return found


@cache
def _files(kind: Kind) -> dict[str, tuple[str, Path]]:
    """Name -> (module, file) of everything of a kind that lies in our folders."""
    found = {}
    for package in _FOLDERS[kind]:
        for path in sorted(_package(package).glob("*.py")):
            if _MARKS[kind] in path.read_text(encoding="utf-8") and path.stem != "registry":
                found[path.stem] = (f"{package}.{path.stem}", path)
    return found


def _plugins(kind: Kind) -> dict[str, Any]:
    return {e.name: e for e in entry_points(group=f"d3po_bench.{kind}s")}


def names(kind: Kind) -> list[str]:
    """All names of a kind, ours first."""
    return list(dict.fromkeys([*_files(kind), *_plugins(kind)]))


def summary(kind: Kind, name: str) -> str:
    """The first line of the file's docstring, read without importing it."""
    if name not in _files(kind):
        return f"from {_plugins(kind)[name].value}"
    source = _files(kind)[name][1].read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def unknown(kind: str, name: str, known: Sequence[str], listed: str = "") -> UserError:
    """The error for a name that nothing answers to, with the nearest one that something does.

    Args:
        kind: of what nothing has that name.
        name: what was given.
        known: the names that there are.
        listed: where they are listed, if they are too many for a line.
    """
    article = "an" if kind[0] in "aeiou" else "a"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    rest = f"See {listed}." if listed else f"Known: {', '.join(known)}."
    return UserError(f"Expected {article} {kind}, got {name!r}. {hint}{rest}")


def plugins(used: Iterable[tuple[Kind, str]]) -> dict[str, dict[str, str]]:
    """What other packages bring of what is used, as provenance has it; {} where it is all ours.

    Args:
        used: kinds and names.

    Returns:
        "plugins" -> kind and name -> distribution and version, such as my-methods 0.1.
    """
    found = {
        f"{kind} {name}": _distribution(_plugins(kind)[name])
        for kind, name in used
        if name not in _files(kind) and name in _plugins(kind)
    }
    return {"plugins": found} if found else {}


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "of no distribution"


def _module(kind: Kind, name: str) -> Any:
    if name in _files(kind):
        return importlib.import_module(_files(kind)[name][0])
    if name in _plugins(kind):
        return _loaded(kind, _plugins(kind)[name])
    raise unknown(kind, name, names(kind))


def _loaded(kind: Kind, entry: EntryPoint) -> Any:
    """What another package's entry point names.

    Raises:
        UserError: it does not load, for whatever reason.
    """
    try:
        return entry.load()
    except Exception as problem:
        raise UserError(
            f"Expected the {kind} {entry.name} of {_distribution(entry)} in {entry.value}, got "
            f"{type(problem).__name__}: {problem}. Mend or remove that package."
        ) from problem


def method(name: str) -> Callable[..., Method[Any]]:
    """The class behind a method's name; its arguments are the method's options."""
    module = _module("method", name)
    found: Callable[..., Method[Any]] = getattr(module, "METHOD", module)
    return found


def objective(name: str) -> Objective:
    """The objective of that name."""
    found: Objective = _module("objective", name).OBJECTIVE
    return found


def require_scorer(name: str) -> None:
    """Refuse a scorer, with or without :weights, that nothing answers to; loads nothing.

    Raises:
        UserError: with the nearest name.
    """
    if name.partition(":")[0] not in names("scorer"):
        raise unknown("scorer", name, names("scorer"))


def takes_weights(name: str) -> bool:
    """Whether a scorer's weights can be chosen."""
    return "weights" in inspect.signature(_loader(name)).parameters


def _loader(name: str) -> Callable[..., Scorer]:
    module = _module("scorer", name)
    found: Callable[..., Scorer] = getattr(module, "load", module)
    return found


def load_scorer(name: str, device: Any, weights: str = "official") -> Scorer:
    """A scorer that has not been checked yet: see `scorer`."""
    base, colon, own = name.partition(":")
    load = _loader(base)
    if takes_weights(base):
        return load(device, own if colon else weights)
    if colon:
        raise UserError(
            f"Expected the scorer {base} alone, which has no weights to choose, got {name!r}. "
            "Leave the colon and the rest out."
        )
    return load(device)


def scorer(name: str, device: Any, weights: str = "official") -> Scorer:
    """The scorer of that name, loaded on `device`, after it gave its golden scores.

    Args:
        name: of the scorer, or name:weights, such as aesthetic:tiny.
        device: where its network runs, if it has one.
        weights: which ones to take where the name does not say.

    Raises:
        UserError: no such scorer, it takes no weights, they are not there, or it says something
            else than it once did.
    """
    found = load_scorer(name, device, weights)
    chosen = ":" not in name and takes_weights(name)
    selfcheck().check(f"{name}:{weights}" if chosen else name, found)
    return found


def model_source(name: str) -> Any:
    """Where the model of that name comes from (a `models.stable_diffusion.Source`)."""
    return _module("model", name).SOURCE


def evaluator() -> ModuleType:
    """The evaluator: `eval` is not imported before a run needs it."""
    _package("eval")
    return importlib.import_module("eval.evaluator")


def selfcheck() -> ModuleType:
    """The golden scores of scorers."""
    _package("eval")
    return importlib.import_module("eval.golden")
