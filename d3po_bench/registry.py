"""A name on the command line -> the file that answers to it. No table to edit.

A method is a file with `METHOD = ...` beside `d3po.py` or in `baselines/`, or of its VARIANTS; a
scorer a file with `def load(` in `eval/scorers/`; objectives, models, families of models, trackers
and places that make runs have `OBJECTIVE = ...`, `SOURCE = ...` and so on. Packages elsewhere add
methods and scorers through the entry points `d3po_bench.methods` and `d3po_bench.scorers`. Methods,
scorers and objectives may be the user's own (`own`), and objectives sums (`rewards.sums`).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d3po_bench import own
from d3po_bench.contracts import fault_of
from d3po_bench.errors import UserError
from d3po_bench.own import is_name
from d3po_bench.presets import ELSEWHERE
from d3po_bench.rewards import http, sums
from d3po_bench.rewards.declared import declared
from d3po_bench.types import Method, Objective, Scorer
from d3po_bench.variants import said, variants_in

if TYPE_CHECKING:
    from d3po_bench.scoring import Guarded

Kind = Literal["method", "objective", "scorer", "model", "family", "tracker", "place"]

HOME = Path(__file__).parent.parent
_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "method": ("d3po_bench", "baselines"), "objective": ("d3po_bench.objectives",),
    "scorer": ("eval.scorers",), "model": ("d3po_bench.models",),
    "family": ("d3po_bench.models",), "tracker": ("d3po_bench.training.trackers",),
    "place": ("d3po_bench.launch.places",),
}  # fmt: skip
_MARKS: dict[Kind, str] = {"scorer": "\ndef load(", "model": "\nSOURCE"}
"""What begins a line of its file, else the kind in capitals."""


@cache
def _package(name: str) -> Path:
    """Folder of one of our packages; refuses a stranger's package of the same name."""
    path = Path(*name.split("."))
    found = Path(str(importlib.import_module(name).__file__)).parent
    if found.resolve() != (HOME / path).resolve():
        raise UserError(
            f"The package {name!r} was found in {found}, not beside d3po_bench in {HOME}. Another "
            "project with that import name comes first: use an environment without it."
        )
    return found


@cache
def _files(kind: Kind) -> dict[str, tuple[str, Path]]:
    """Name -> (module, file) of everything of a kind that lies in our folders."""
    found, mark = dict[str, tuple[str, Path]](), _MARKS.get(kind, f"\n{kind.upper()}")
    for package in _FOLDERS[kind]:
        for path in sorted(_package(package).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if mark in text and path.stem != "registry" and path.stem[0] != "_":
                known = [path.stem, *variants_in(text)]
                found |= dict.fromkeys(known, (f"{package}.{path.stem}", path))
    return found


def variant(name: str) -> tuple[str, dict[str, Any]]:
    """Of a method's name or text: whose variant it is, and its settings; itself if it is none."""
    if name not in _files("method"):
        return name, {}
    _, path = _files("method")[name]
    return path.stem, variants_in(path.read_text(encoding="utf-8")).get(name, {})


def _plugins(kind: Kind) -> dict[str, EntryPoint]:
    """What other packages bring of a kind."""
    group = "families" if kind == "family" else f"{kind}s"
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"d3po_bench.{group}"):
        name, other = entry.name, found.setdefault(entry.name, entry)
        if other.value != entry.value:  # which one comes first is an accident of their places
            raise UserError(
                f"Two packages bring a {kind} called {name!a}: {_distribution(other)} and "
                f"{_distribution(entry)}. Remove one of them, or rename it there."
            )
        if not is_name(name):
            raise UserError(
                f"The package {_distribution(entry)} brings a {kind} called {name!a}. A name "
                "is letters, digits, dots, dashes and underscores: fix or remove that package."
            )
    return found


def names(kind: Kind) -> list[str]:
    """All names of a kind, ours first."""
    return list(dict.fromkeys([*_files(kind), *_plugins(kind)]))


def summary(kind: Kind, name: str) -> str:
    """The first line of the file's docstring, read without importing it."""
    if name not in _files(kind):
        return f"from {_plugins(kind)[name].value}"
    if kind == "method" and variant(name)[1]:
        return said(*variant(name))
    source = _files(kind)[name][1].read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def name_of(kind: Kind, text: str) -> str:
    """What run folders and tables call something: its name, or one made from a text.

    Args:
        kind: of what it is.
        text: a name, a file, package.module:NAME, an address or a sum.

    Raises:
        UserError: it would be called as something that there is, or as no folder can be.
    """
    if _is_ours(kind, text):
        return text
    if kind == "objective" and (parts := sums.parts_of(text)):
        return sums.name_of({name_of(kind, part): weight for part, weight in parts.items()})
    if not is_own(kind, text):
        return text
    found = http.name_of(text) if http.is_address(text) else own.name_of(text)
    if _is_ours(kind, found):
        raise UserError(
            f"{text} would be called {found}, as the {kind} that there is. Rename the file, or "
            "what it is called in it."
        )
    return found


def is_own(kind: Kind, text: str) -> bool:
    """Whether a text stands for something of the user's, which no package brings."""
    return not _is_ours(kind, text) and (http.is_address(text) or own.is_own(text))


def _is_ours(kind: Kind, text: str) -> bool:
    """Whether a name, with or without :weights, is one that a file or a package has."""
    base = text.partition(":")[0] if kind == "scorer" else text
    return base in _files(kind) or base in _plugins(kind)


def unknown(kind: str, name: str, known: Sequence[str], listed: str = "") -> UserError:
    """The error for a name that nothing answers to, with the nearest one that something does.

    Args:
        kind: of what nothing has that name.
        name: what was given.
        known: the names that there are.
        listed: where they are listed, if they are too many for a line.
    """
    usual = ELSEWHERE.get(name.lstrip("-"), "")
    named = [k for k in known if usual and k.lstrip("-") == usual]
    near = named or difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    rest = f"See {listed}." if listed else f"Known: {', '.join(known)}."
    return UserError(f"No {kind} is called {name!r}. {hint}{rest}")


def plugins(used: Iterable[tuple[Kind, str]]) -> dict[str, dict[str, str]]:
    """What other packages bring of what is used, as provenance has it; {} where it is all ours.

    Args:
        used: kinds and names.

    Returns:
        "plugins" -> kind and name -> distribution and version, such as my-methods 0.1, or the text
        that stands for what is the user's own.
    """
    found: dict[str, str] = {}
    for kind, text in used:
        base = text.partition(":")[0] if kind == "scorer" else text
        if base not in _files(kind) and base in _plugins(kind):
            found[f"{kind} {base}"] = _distribution(_plugins(kind)[base])
        elif kind in ("method", "objective", "scorer") and is_own(kind, text):
            found[f"{kind} {name_of(kind, text)}"] = text
    return {"plugins": found} if found else {}


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "of no distribution"


def _module(kind: Kind, name: str) -> Any:
    if name in _files(kind):
        return importlib.import_module(_files(kind)[name][0])
    if name not in _plugins(kind):
        raise unknown(kind, name, names(kind))
    entry = _plugins(kind)[name]
    from d3po_bench.scoring import undisturbed

    try:
        with undisturbed():
            return entry.load()
    except (Exception, SystemExit) as problem:  # of another package: whatever its code raises
        raise UserError(
            f"The {kind} {name} of {_distribution(entry)} does not load from {entry.value}: "
            f"{type(problem).__name__}: {problem}. Fix or remove that package."
        ) from problem


def method(name: str) -> Callable[..., Method[Any]]:
    """The class behind a method's name or text; its arguments are the method's options.

    Raises:
        UserError: there is none, or what a package brings by that name is something else.
    """
    mine = is_own("method", name)
    module = own.load(name, "METHOD").found if mine else _module("method", name)
    found: Callable[..., Method[Any]] = getattr(module, "METHOD", module)
    if fault := fault_of(found):
        raise UserError(
            f"The method {name} {fault}. Correct it where it is defined; CONTRIBUTING.md shows one."
        )
    return found


def objective(name: str) -> Objective:
    """The objective of that name or text; its scorer is a name or text, too.

    Raises:
        UserError: there is none, or what there is is something else.
    """
    if parts := sums.parts_of(name):
        found = [objective(part).prompts for part in parts]
        return Objective(prompts=found[0] if len({*found}) == 1 else "", scorer=name, sign=1)
    if not is_own("objective", name):
        if "+" in name:
            raise UserError(f"Give each part of {name} a weight, as in aesthetic:0.7+clip:0.3.")
        module = _module("objective", name)
        return _checked(name, getattr(module, "OBJECTIVE", module))
    if not http.is_address(name):
        loaded = own.load(name, "OBJECTIVE", "reward")
        if isinstance(loaded.found, Objective):
            return _checked(name, loaded.found)
    reward = declared(name)
    return Objective(prompts=reward.prompts, scorer=name, sign=reward.sign)


def _checked(name: str, found: Any) -> Objective:
    """An objective whose scorer is a text.

    Raises:
        UserError: it is none.
    """
    if isinstance(found, Objective) and callable(found.scorer):
        found = replace(found, scorer=own.hold(found.scorer))
    if (
        not isinstance(found, Objective)
        or found.sign not in (-1, 1)
        or not all(isinstance(part, str) for part in (found.prompts, found.scorer))
    ):
        raise UserError(
            f"The objective {name} is {ascii(found)[:80]}. Make it, for example, "
            "OBJECTIVE = Objective(prompts='animals', scorer='jpeg_size', sign=1)."
        )
    return found


def summands(text: str) -> dict[str, tuple[str, float]]:
    """Of a sum: name of each scorer -> its text, and its weight with the sign of its objective.

    Raises:
        UserError: two parts have one scorer.
    """
    found: dict[str, tuple[str, float]] = {}
    for part, weight in sums.parts_of(text).items():
        asked = objective(part)
        scorer = str(asked.scorer)
        name = name_of("scorer", scorer)
        if name in found:
            raise UserError(f"Two parts of {text} are scored by {name}. Leave one out.")
        found[name] = (scorer, weight * asked.sign)
    return found


def scorers_of(text: str) -> tuple[str, ...]:
    """Texts of the scorers of an objective: of each part, if it is a sum."""
    return tuple(s for s, _ in summands(text).values()) or (str(objective(text).scorer),)


def require_scorer(name: str) -> None:
    """Refuse a scorer, with or without :weights, that nothing answers to; loads no weights.

    Raises:
        UserError: with the nearest name.
    """
    if is_own("scorer", name):
        name_of("scorer", name)
        declared(name)
    elif not _is_ours("scorer", name):
        raise unknown("scorer", name, names("scorer"))


def require_apart(texts: Sequence[str]) -> None:
    """Refuse different scorers of one name, which is that of a column.

    Raises:
        UserError: naming it.
    """
    named: dict[str, str] = {}
    for text in texts:
        name = name_of("scorer", text)
        if named.setdefault(name, text) != text:
            raise UserError(f"Two scorers are called {name}: {named[name]} and {text}. Rename one.")


def usual_weights(name: str) -> str | None:
    """The weights that a scorer loads by itself; None where they cannot be chosen."""
    given = None if is_own("scorer", name) else inspect.signature(_loader(name)).parameters
    return given["weights"].default if given and "weights" in given else None


def _loader(name: str) -> Callable[..., Scorer]:
    found: Callable[..., Scorer] = getattr(module := _module("scorer", name), "load", module)
    if not callable(found):
        raise UserError(
            f"The scorer {name} is {ascii(found)[:80]}. Let its package name a function "
            "load(device) that returns the scorer."
        )
    return found


def load_scorer(name: str, device: Any, weights: str = "official") -> Guarded:
    """The scorer of that name or text, on `device`; not compared with its golden scores yet.

    It is a `scoring.Guarded`: only what a scorer may do comes through.

    Args:
        name: of the scorer, or name:weights, such as aesthetic:tiny.
        device: where its network runs, if it has one.
        weights: which ones to take where the name does not say.

    Raises:
        UserError: no such scorer, it takes no weights, they are not there, or what its package
            brings is no scorer.
    """
    from d3po_bench.scoring import Guarded, undisturbed

    if is_own("scorer", name):
        reward = declared(name)
        return Guarded(name_of("scorer", name), reward.make(device), reward.unit, reward.digest)
    base, colon, asked = name.partition(":")
    load, usual = _loader(base), usual_weights(base)
    if colon and usual is None:
        raise UserError(
            f"The scorer {base} has no weights to choose, as {name!r} does. Leave out the colon "
            "and what follows it."
        )
    given = (device,) if usual is None else (device, asked if colon else weights)
    try:
        inspect.signature(load).bind(*given)
    except TypeError as problem:
        raise UserError(
            f"The scorer {name} cannot be loaded as load(device): {problem}. Let its package name "
            "a function that takes the device and returns the scorer."
        ) from problem
    with undisturbed():
        return Guarded(name, load(*given))


def model_source(name: str) -> Any:
    """Where the model of that name comes from (a `models.sources.Source`)."""
    return _module("model", name).SOURCE


def family(pipeline: str, path: str) -> Any:
    """The family of models that loads a pipeline class of diffusers.

    Args:
        pipeline: the `_class_name` in model_index.json.
        path: of the pipeline, for people.

    Raises:
        UserError: none does.
    """
    families = [_module("family", name).FAMILY for name in names("family")]
    found = next((f for f in families if pipeline in f.PIPELINES), None)
    if found is None:
        known = ", ".join(name for f in families for name in f.PIPELINES)
        raise UserError(
            f"{path} is a {pipeline}, which no model family here loads. Known: {known}. "
            "A family is one file: see CONTRIBUTING.md."
        )
    return found


def part(kind: Literal["tracker", "place"], name: str) -> Any:
    """A class of `training.tracking.Tracker`, or a `launch.place.Place`."""
    return getattr(_module(kind, name), kind.upper())
