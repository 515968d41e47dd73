"""Methods, scorers and objectives that are no installed package's: files, modules' and objects.

./my_reward.py             its `reward` or OBJECTIVE, or its METHOD
./my_reward.py:NAME        something else in it
package.module:NAME        what can be imported
module:NAME                an object that a Python caller gave, under the name that it has there
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pickle
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from d3po_bench.digests import sha256_of, short
from d3po_bench.errors import UserError
from d3po_bench.types import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>[^\W\d]\w*))?", re.DOTALL)
_IMPORTED = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")

UNKNOWN = "unknown"
"""Stands for the text of what was typed where nothing keeps it."""

PLAIN = (bool, int, float, str)
"""Types of what tells two instances of a class apart in a config."""

_HELD: dict[str, Any] = {}
"""What Python callers gave as objects, by the text that stands for it in a config."""


@dataclass(frozen=True)
class Own:
    """Something of the user's, loaded."""

    text: str
    """What it was asked for by."""
    found: Any
    beside: Mapping[str, Any]
    """What else its module defines."""
    digest: str
    """Twelve hex digits that name the text of its file, or of itself where it has none."""


# ---- names


def is_name(text: str) -> bool:
    """Whether something may be called so: names become those of folders, files and columns.

    None looks like a Python file, which would be loaded where the name is looked up.
    """
    known = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text)
    return known is not None and _FILE.fullmatch(text) is None


def is_own(text: str) -> bool:
    """Whether a text names something of the user's; loads nothing."""
    if text in _HELD or _FILE.fullmatch(text):
        return True
    imported = _IMPORTED.fullmatch(text)
    if imported is None:
        return False
    package, dot, _ = imported["module"].partition(".")
    try:
        with _here():
            # A word that is no module is a slip in another name, such as aestetic:tiny.
            return bool(dot) or importlib.util.find_spec(package) is not None
    except ValueError:  # the __main__ of a script has no spec
        return True


def normal(text: str) -> str:
    """The same file in one spelling, so that ./a.py and a.py are one: configs are compared."""
    named = None if text in _HELD else _FILE.fullmatch(text)
    return text if named is None else Path(named["path"]).as_posix() + text[named.end("path") :]


def name_of(text: str) -> str:
    """What it is called: as it is in its module, or as its file is.

    Raises:
        UserError: that is no name that a folder and a column can have.
    """
    named = _FILE.fullmatch(text) or _IMPORTED.fullmatch(text)
    found = (named["name"] or Path(named["path"]).stem) if named else ""
    if text in _HELD:
        found = _called(_HELD[text])
    if not is_name(found):
        raise UserError(
            f"{text} would be called {found!a} in run folders. Rename it: a name is letters, "
            "digits, dots, dashes and underscores."
        )
    return found


def _called(thing: Any) -> str:
    if isinstance(thing, Objective) and isinstance(thing.scorer, str):
        named = name_of(thing.scorer) if _FILE.fullmatch(thing.scorer) else thing.scorer
        # Beside the objective that may have the scorer's name.
        return f"{named.replace(':', '-')}-{'up' if thing.sign == 1 else 'down'}"
    if isinstance(thing, Objective):
        return _called(thing.scorer)
    return str(getattr(thing, "__name__", type(thing).__name__))


# ---- loading


def load(text: str, *usual: str) -> Own:
    """What a text stands for.

    Args:
        text: a file, a module's, or what `hold` returned.
        usual: what is looked for in a file that is named alone, the first that is there.

    Raises:
        UserError: it is not there, or its file or module fails when it is loaded.
    """
    if text in _HELD:
        thing = _HELD[text]
        module = sys.modules.get(_home(thing).__module__)
        return Own(text, thing, vars(module) if module else {}, _digest_of(thing))
    named = _FILE.fullmatch(text) or _IMPORTED.fullmatch(text)
    if named is None:
        raise UserError(f"{text!a} is no file.py and no package.module:NAME. Give one of these.")
    module, digest = _module(named.groupdict())
    wanted = [named["name"]] if named["name"] else usual
    for name in wanted:
        if hasattr(module, name):
            return Own(text, getattr(module, name), vars(module), digest)
    raise UserError(
        f"{text} has no {' or '.join(wanted)}. Add it: docs/own-reward.md and CONTRIBUTING.md "
        "show what it looks like."
    )


def _module(named: Mapping[str, str | None]) -> tuple[ModuleType, str]:
    if path := named.get("path"):
        loaded = from_file(Path(path))
        return loaded, str(loaded.__dict__["__digest__"])
    name = str(named.get("module"))
    with told(name), _here():
        loaded = importlib.import_module(name)
    file = Path(getattr(loaded, "__file__", None) or "")
    return loaded, sha256_of(file)[:12] if file.is_file() else UNKNOWN


@contextmanager
def _here() -> Iterator[None]:
    """Let modules of the present folder be imported, after all that are installed."""
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def from_file(path: Path) -> ModuleType:
    """The module in a Python file of the user's; loaded again once its text is another.

    Raises:
        UserError: it cannot be read, or fails when it is loaded.
    """
    try:
        return _from_text(path, path.read_bytes())
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{path} cannot be read: {reason}. Give the path of a Python file.") from (
            problem
        )


@cache
def _from_text(path: Path, text: bytes) -> ModuleType:
    # Not by a loader, which would take a compiled file of the same second for the newest.
    digest = hashlib.sha256(text).hexdigest()[:12]
    name = f"d3po_bench_user_{path.stem}_{short(str(path.absolute()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{path} is not a Python file. Give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__digest__"] = digest
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    with told(str(path)):
        exec(compile(text, str(path), "exec"), module.__dict__)
    return module


@contextmanager
def told(what: str) -> Iterator[None]:
    """Around code of the user's: whatever it raises becomes a line, and torch stays as it was."""
    from d3po_bench.scoring import undisturbed

    try:
        with undisturbed():
            yield
    except UserError:
        raise
    except (Exception, SystemExit) as problem:
        missing = isinstance(problem, ModuleNotFoundError)
        raise UserError(
            f"{what} does not load: {said(problem, what)}. "
            f"{'Install what is missing, or correct' if missing else 'Correct'} that file."
        ) from problem


def said(problem: BaseException, text: str) -> str:
    """An exception in words, with the line of the file in `text` where it arose, if it did."""
    named = _FILE.fullmatch(text)
    path = named["path"] if named else ""
    lines = [f.lineno for f in traceback.extract_tb(problem.__traceback__) if f.filename == path]
    return f"{type(problem).__name__}: {problem}" + (f" (line {lines[-1]})" if lines else "")


# ---- objects of Python callers


def hold(thing: Any, text: str = "") -> str:
    """Keep an object of the caller's, and return the text that stands for it in configs.

    Args:
        thing: a class, a function, or an instance of a class.
        text: what shall stand for it; by default its module, its name there and, of an instance,
            the numbers and texts that it keeps.
    """
    home = _home(thing)
    found = text or f"{home.__module__}:{home.__qualname__}"
    if not text and home is not thing:
        plain = {k: v for k, v in getattr(thing, "__dict__", {}).items() if type(v) in PLAIN}
        found += f"({', '.join(f'{name}={value!r}' for name, value in plain.items())})"
    _HELD[found] = thing
    return found


def adopt(objects: Mapping[str, Any]) -> None:
    """Keep what another process held."""
    _HELD.update(objects)


def held(texts: Sequence[str]) -> dict[str, Any]:
    """Of those texts, the ones that stand for objects, with these: a worker process needs them."""
    return {text: _HELD[text] for text in texts if text in _HELD}


def require_portable(objects: Mapping[str, Any]) -> None:
    """Refuse objects that another process cannot load.

    Raises:
        UserError: naming one.
    """
    for text, thing in objects.items():
        typed = _home(thing).__module__ == "__main__"
        try:
            if typed and not hasattr(sys.modules["__main__"], "__file__"):
                raise TypeError("it is defined in a notebook or at a prompt")
            pickle.dumps(thing)
        except Exception as problem:  # an object's own code may raise anything
            raise UserError(
                f"{text} cannot go to another process: {problem}. Define it at the top of a "
                "module, or give jobs=1."
            ) from problem


def _home(thing: Any) -> Any:
    """The class or function that says where an object comes from."""
    return thing if hasattr(thing, "__qualname__") else type(thing)


def _digest_of(thing: Any) -> str:
    """Names the source of an object."""
    try:
        return short(inspect.getsource(_home(thing)))
    except (OSError, TypeError):
        return UNKNOWN
