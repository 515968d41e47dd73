"""Who may import whom, what loads late, how long functions are, and that they are documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("d3po_bench", "baselines", "eval")
HEAVY = {
    "torch", "diffusers", "transformers", "peft", "matplotlib", "pandas", "scipy", "fastapi",
    "sqlalchemy", "krippendorff", "pydantic", "pooch", "optuna",
}  # fmt: skip
LONGEST = 50
"""Lines of a function, its docstring included."""
LARGEST = 400
"""Lines of a file, but for the embedded models' recipes."""


def module_name(path: Path) -> str:
    """`a/b/__init__.py` is a.b."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

GROUND = {"errors", "digests", "text", "types"}
CORE = {*GROUND, "diffusion"}
SETTINGS = {
    *GROUND, "own", "rewards", "registry", "presets", "config", "prompts", "objectives", "machine",
}  # fmt: skip

BARE = {"d3po_bench", "d3po_bench.__version__"}

ALLOWED = {
    "d3po_bench.errors": set[str](),
    "d3po_bench.digests": set[str](),
    "d3po_bench.text": set[str](),
    "d3po_bench.cache": set[str](),
    "d3po_bench.setting": {"errors"},
    "d3po_bench.contracts": set[str](),
    "d3po_bench.types": set[str](),
    "d3po_bench.presets": set[str](),
    "d3po_bench.objectives": {"types"},
    "d3po_bench.machine": {"errors"},
    "d3po_bench.prompts": {"errors", "digests", "prompts"},
    "d3po_bench.pictures": {"errors", "prompts"},
    "d3po_bench.own": {"errors", "digests", "types", "scoring"},
    "d3po_bench.rewards": {"errors", "digests", "own", "rewards", "runs.files"},
    "d3po_bench.variants": set[str](),
    "d3po_bench.registry": {
        "presets", "contracts", "errors", "types", "scoring", "own", "rewards", "variants",
    },
    "d3po_bench.scoring": {"errors", "digests", "types"},
    "d3po_bench.config": {
        "errors", "digests", "own", "presets", "registry", "rewards", "setting",
    },
    "d3po_bench.diffusion": CORE,
    "d3po_bench.d3po": CORE,
    "baselines": CORE,
    "d3po_bench.experience": {*CORE, "scoring", "prompts", "pictures", "experience"},
    "d3po_bench.models": {*CORE, "own", "registry", "prompts", "models"},
    "d3po_bench.runs": {*SETTINGS, "cache", "runs"},
    "d3po_bench.training": {
        *SETTINGS, "scoring", "diffusion", "models", "experience", "runs", "training",
    },
    "d3po_bench.launch": {*SETTINGS, "diffusion", "models", "runs", "training", "launch"},
    "d3po_bench.feedback": {
        *SETTINGS, "pictures", "diffusion", "models", "experience", "runs", "training", "feedback",
    },
    "eval.scorers": {
        "types", "errors", "models.embedded", "models.parts", "eval.downloads",
        "eval.scorers._blip", "eval.scorers._blip_match", "eval.scorers._clip",
        "eval.scorers._features", "eval.scorers._geneval",
    },
}  # fmt: skip
"""Module or package -> what of ours it may import, for the type checker or later in a function,
too. Methods never import each other. `eval` may import all but the command line. That and the
Python door, `d3po_bench.api`, put everything together."""

ONLY_IN = {
    "diffusers": ("d3po_bench.models",),
    "peft": ("d3po_bench.models",),
    "accelerate": ("d3po_bench.launch",),
    "optuna": ("d3po_bench.launch",),
    "transformers": ("d3po_bench.models", "eval.embedded", "eval.scorers"),
    "matplotlib": ("eval.figures",),
    "scipy": ("eval", "d3po_bench.feedback"),
    "pandas": ("eval",),
    "fastapi": ("d3po_bench.feedback",),
    "sqlalchemy": ("d3po_bench.feedback",),
    "krippendorff": ("d3po_bench.feedback",),
    "pyarrow": ("d3po_bench.experience",),
}

LIGHT = (
    "d3po_bench", "d3po_bench.cli", "d3po_bench.config", "d3po_bench.digests",
    "d3po_bench.errors", "d3po_bench.models", "d3po_bench.objectives", "d3po_bench.presets",
    "d3po_bench.prompts", "d3po_bench.registry", "d3po_bench.runs.files", "d3po_bench.runs.holder",
    "d3po_bench.runs.packed", "d3po_bench.runs.run",
    "d3po_bench.runs.sessions", "d3po_bench.text", "d3po_bench.types", "baselines", "eval",
    "eval.scorers", "d3po_bench.own", "d3po_bench.rewards", "d3po_bench.setting",
    "d3po_bench.contracts", "d3po_bench.variants",
)  # fmt: skip
"""What `--help` and `list` load; of the packages among them, the `__init__.py`, but for the
command line, all of which is loaded."""


# ---- what a source imports


def _blocks(tree: ast.AST, *, late: bool) -> Iterator[ast.AST]:
    """The nodes that run on import; with `late` also function bodies and TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not late and typing:
            continue
        if not late and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _blocks(node, late=late)


def imported(source: str, *, late: bool = True) -> set[str]:
    """Full names of what is imported: `from a import b` gives a.b, whether b is a module or not."""
    names: set[str] = set()
    for node in _blocks(ast.parse(source), late=late):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names}
    return names


def within(name: str, place: str) -> bool:
    """Whether `name` is the module or package `place`, or lies in it."""
    return f"{name}.".startswith(f"{place}.")


def ours(names: set[str]) -> set[str]:
    """Those of our packages, but for the bare `import d3po_bench` and its version."""
    return {n for n in names if n.split(".")[0] in PACKAGES} - BARE


# ---- the rules, each as the list of what breaks it


def forbidden_imports(module: str, source: str) -> list[str]:
    """Imports of ours that go up, or sideways where that is not allowed."""
    found = ours(imported(source))
    cli = within(module, "d3po_bench.cli") or module == "d3po_bench.__main__"
    door = cli or module in ("d3po_bench", "d3po_bench.api")
    wrong = {n for n in found if within(n, "d3po_bench.cli") and not cli}
    if within(module, "d3po_bench") and not door:
        wrong |= {n for n in found if not within(n, "d3po_bench")}
    places = [place for place in ALLOWED if within(module, place)]
    if within(module, "d3po_bench") and not door and not places:
        return [f"{module} has no place in ALLOWED"]
    for place in places:
        full = [n if n.startswith("eval.") else f"d3po_bench.{n}" for n in ALLOWED[place]]
        wrong |= {n for n in found if not any(within(n, place) for place in full)}
    return sorted(wrong)


def misplaced(module: str, source: str) -> list[str]:
    """Third-party packages that this module must leave to others."""
    found = {name.split(".")[0] for name in imported(source)}
    places = {name: ONLY_IN[name] for name in found & ONLY_IN.keys()}
    return [n for n, where in places.items() if not any(within(module, place) for place in where)]


def early(module: str, source: str) -> list[str]:
    """What a light module loads at once though it is heavy."""
    if module not in LIGHT and not within(module, "d3po_bench.cli"):
        return []
    found = imported(source, late=False)
    inside = {n for n in ours(found) if not any(within(n, light) for light in LIGHT[1:])}
    return sorted(inside | {n for n in found if n.split(".")[0] in HEAVY})


def long_functions(source: str) -> list[str]:
    """Functions of more than LONGEST lines."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST
    ]


def undocumented(source: str) -> list[str]:
    """The module, or public classes, functions and methods in it, without a docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

    def below(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        if ast.get_docstring(node) is None:
            yield getattr(node, "name", "the module")
        for child in node.body:
            if isinstance(child, kinds) and not child.name.startswith("_"):
                if isinstance(child, ast.ClassDef):
                    yield from below(child)
                elif ast.get_docstring(child) is None:
                    yield child.name

    return list(below(ast.parse(source)))


def cycle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, late or for the type checker, too."""
    # `from a import b` needs the module a.b, or else what a itself defines.
    arrows = {
        module: {n if n in sources else n.rpartition(".")[0] for n in imported(source) - BARE}
        for module, source in sources.items()
    }
    while free := [m for m, targets in arrows.items() if not targets - {m} & arrows.keys()]:
        for module in free:
            del arrows[module]
    return sorted(arrows)


def test_imports_follow_the_architecture() -> None:
    wrong = {
        module: found
        for module, source in SOURCES.items()
        if (
            found := forbidden_imports(module, source)
            + misplaced(module, source)
            + early(module, source)
        )
    }
    assert wrong == {}


def test_nothing_imports_in_a_circle() -> None:
    assert cycle(SOURCES) == []
    assert cycle({"a": "import b", "b": "def f():\n  from c import g", "c": "import a"}) == [
        "a", "b", "c",
    ]  # fmt: skip


def test_functions_and_files_are_short_and_documented() -> None:
    assert {m: f for m, s in SOURCES.items() if (f := long_functions(s))} == {}
    assert {m: f for m, s in SOURCES.items() if (f := undocumented(s))} == {}
    long = {m: n for m, s in SOURCES.items() if (n := s.count("\n")) > LARGEST}
    assert {module for module in long if not module.endswith(".recipe")} == set()


def test_only_two_import_by_name() -> None:
    naming = [m for m, source in SOURCES.items() if "import_module" in source]
    assert naming == ["d3po_bench.own", "d3po_bench.registry"]


def test_tests_shadow_no_package() -> None:
    # tests/eval/__init__.py would hide the package eval from every test
    assert not [p for p in PACKAGES if (ROOT / "tests" / p).exists()]


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("d3po_bench.runs.store", "from d3po_bench import cli", ["d3po_bench.cli"]),
        ("eval.measure", "from d3po_bench.cli import main", ["d3po_bench.cli.main"]),
        ("d3po_bench.training.run", "def f():\n  from eval import tools", ["eval.tools"]),
        ("d3po_bench.types", "from d3po_bench.errors import E", ["d3po_bench.errors.E"]),
        ("d3po_bench.types", "if TYPE_CHECKING:\n  import d3po_bench.d3po", ["d3po_bench.d3po"]),
        ("d3po_bench.diffusion.x", "from d3po_bench import models", ["d3po_bench.models"]),
        ("d3po_bench.runs.x", "from d3po_bench import training", ["d3po_bench.training"]),
        ("d3po_bench.training.x", "import d3po_bench.launch", ["d3po_bench.launch"]),
        ("d3po_bench.objectives.x", "from eval.scorers import y", ["eval.scorers.y"]),
        ("d3po_bench.new", "import torch", ["d3po_bench.new has no place in ALLOWED"]),
        ("baselines.ddpo", "from baselines.dpok import f", ["baselines.dpok.f"]),
        ("baselines.ddpo", "from d3po_bench.config import f", ["d3po_bench.config.f"]),
        ("eval.scorers.x", "from eval.scorers.y import f", ["eval.scorers.y.f"]),
        ("eval.scorers.x", "from eval.scorers import _clip", []),
        ("d3po_bench.cli.results", "def f():\n  from eval import figures", []),
        ("d3po_bench.api", "from eval import tools", []),
        ("d3po_bench.api", "from d3po_bench.cli import main", ["d3po_bench.cli.main"]),
        ("d3po_bench.launch.x", "from d3po_bench.api import run", ["d3po_bench.api.run"]),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, found: list[str]) -> None:
    assert forbidden_imports(module, source) == found


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("d3po_bench.training.x", "def f():\n  from diffusers.utils import x", ["diffusers"]),
        ("eval.figures.curves", "from matplotlib import pyplot", []),
        ("eval.analysis.statistics", "import matplotlib", ["matplotlib"]),
        ("eval.scorers.x", "import transformers", []),
        ("d3po_bench.diffusion.x", "import transformers", ["transformers"]),
    ],
)
def test_a_misplaced_import_is_found(module: str, source: str, found: list[str]) -> None:
    assert misplaced(module, source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", ["torch.nn"]),
        ("try:\n  import scipy\nexcept ImportError:\n  pass", ["scipy"]),
        ("from d3po_bench import launch", ["d3po_bench.launch"]),
        ("from d3po_bench.errors import UserError", []),
        ("def f():\n  import torch", []),
        ("if TYPE_CHECKING:\n  import torch", []),
    ],
)
def test_an_early_import_is_found(source: str, found: list[str]) -> None:
    assert early("d3po_bench.config", source) == found


def test_long_and_undocumented_functions_are_found() -> None:
    assert long_functions("def f():\n" + "  x = 1\n" * 49) == []
    assert long_functions("def f():\n" + "  x = 1\n" * 50) == ["f"]
    source = '"""Doc."""\nclass A:\n  def f(self): pass\n  def _g(self): pass\ndef _h(): pass'
    assert undocumented(source) == ["A", "f"]


LOADS_LITTLE = f"""
import contextlib, io, sys, time
from d3po_bench.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
    help_seconds = time.process_time()
    main(["run", "--help"])
    main(["plot", "--help"])
    main(["list"])
print(sorted({HEAVY!r} & sys.modules.keys()), help_seconds)
"""


def test_help_and_list_load_nothing_heavy_and_are_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS_LITTLE], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded, _, seconds = done.stdout.strip().rpartition(" ")
    assert loaded == "[]"
    assert float(seconds) < 0.5
