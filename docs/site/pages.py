"""The pages of the site that are made from the code: methods, the Python door, the leaderboard."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sphinx.pycode import ModuleAnalyzer

import d3po_bench
from d3po_bench import config, registry, types
from d3po_bench.presets import PRESET_SUMMARIES, PRESETS
from eval.analysis.report import report


def write(source: Path, site: Path) -> None:
    """Write all pages anew.

    Args:
        source: the repository; pages go to its folder reference/, which git ignores.
        site: where the site is built; the leaderboard's own page goes there.
    """
    made = source / "reference"
    shutil.rmtree(made, ignore_errors=True)
    (made / "methods").mkdir(parents=True)
    names = [name for name in registry.names("method") if not registry.variant(name)[1]]
    texts = {f"methods/{name}.md": method(name) for name in names}
    texts["api.md"] = api()
    texts["leaderboard.md"] = leaderboard(source / "results" / "tiny2", site / made.name)
    for name, text in texts.items():
        (made / name).write_text(text, encoding="utf-8")


# ---- methods


def method(name: str) -> str:
    """The page of a method: its docstrings, its options, and what the presets make of them."""
    made: Any = registry.method(name)
    module = sys.modules[made.__module__]
    file = Path(str(module.__file__))
    return PAGE.format(
        name=name,
        about=inspect.getdoc(module),
        loss=inspect.getdoc(made.loss),
        defaults=inspect.getdoc(made),
        options=options(name),
        variants=variants(name),
        settings=settings(name),
        presets="\n".join(f"- `{preset}`: {said}." for preset, said in PRESET_SUMMARIES.items()),
        file=file.name,
        path=Path("..", "..", file.relative_to(registry.HOME)).as_posix(),
    )


PAGE = """\
# {name}

{about}

## Loss

{loss}

## Options

{defaults}

`--set NAME=VALUE` changes them. A preset's column is empty where it keeps the default.

{options}
{variants}
Presets:

{presets}

Where the paper, its code and this project differ, and why: [fidelity](../../docs/fidelity.md).

## Settings of every run

Those that a preset changes; `d3po-bench list --settings` names all.

{settings}

## The file

<details><summary><code>{file}</code></summary>

```{{literalinclude}} {path}
:language: python
```

</details>
"""


def options(name: str) -> str:
    """A row for each option of a method."""
    columns = {said: config.method_of(run) for said, run in _configs(name).items()}
    return _table(columns, [field.name for field in fields(columns["default"])])


def variants(name: str) -> str:
    """What else `--method` knows that is this method, with settings of its own."""
    known = {n: registry.variant(n) for n in registry.names("method")}
    lines = [f"- `--method {n}`: {registry.summary('method', n)}." for n, (of, own) in known.items()
             if of == name and own]  # fmt: skip
    return "\n".join(["", "Under names of their own:", "", *lines, ""]) if lines else ""


def settings(name: str) -> str:
    """A row for each setting of every run that a preset changes."""
    columns = _configs(name)
    names = [field.name for field in fields(config.RunConfig) if field.name != "options"]
    usual = columns["default"]
    changed = [
        n for n in names if any(getattr(run, n) != getattr(usual, n) for run in columns.values())
    ]
    return _table(columns, changed)


def _configs(name: str) -> dict[str, config.RunConfig]:
    """Without a preset and with each: a run's config, with the method's own number of images."""
    images = registry.method(name)().images_per_prompt
    default = config.RunConfig(method=name, objective="incompress")
    runs = {"default": default}
    runs |= {f"`{p}`": config.make(name, default.objective, p, {})[0] for p in PRESETS}
    return {
        said: replace(run, images_per_prompt=run.images_per_prompt or images)
        for said, run in runs.items()
    }


def _table(columns: Mapping[str, Any], names: Sequence[str]) -> str:
    """A row for each of those fields of the columns, nothing where one is as the default."""
    kind = type(columns["default"])
    told = ModuleAnalyzer.for_module(kind.__module__).find_attr_docs()
    head = ["name", *columns, "what it is"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        usual, *rest = (_said(getattr(column, name)) for column in columns.values())
        values = [usual, *("" if value == usual else value for value in rest)]
        about = " ".join(told.get((kind.__name__, name), [])).strip()
        lines.append([f"`{name}`", *values, about.replace("|", "\\|")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _said(value: object) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- the Python door


def api() -> str:
    """What `import d3po_bench` offers, and the types that a method, model or scorer has."""
    offered = {name: getattr(d3po_bench, name) for name in d3po_bench.__all__}
    own = {name for name, thing in offered.items() if thing.__module__ != types.__name__}
    classes = {name for name in own if inspect.isclass(offered[name])}
    parts = [f".. autofunction:: d3po_bench.{name}\n" for name in sorted(own - classes)]
    parts += [f".. autoclass:: d3po_bench.{name}\n   :members:\n" for name in sorted(classes)]
    return API.format(
        door="\n".join(parts), types=", ".join(f"`{name}`" for name in sorted(offered.keys() - own))
    )


API = """\
# Python API

[The guide](../docs/python.md) shows how these are used.

## What `import d3po_bench` offers

```{{eval-rst}}
{door}
```

## Types

What passes between a method, a model and a scorer: `d3po_bench.types`. `import d3po_bench` offers
{types} of these.

```{{eval-rst}}
.. automodule:: d3po_bench.types
   :members:
   :undoc-members:
```
"""


# ---- the leaderboard


def leaderboard(runs: Path, place: Path) -> str:
    """The published runs as tables; their page, which sorts and filters, is written beside it."""
    place.mkdir(parents=True, exist_ok=True)
    made = report((runs,), (), "html", measured=False, told=print)
    (place / f"{runs.name}.html").write_text(made, encoding="utf-8")
    return LEADERBOARD.format(
        page=f"{runs.name}.html",
        tables=report((runs,), ("gains", "cost"), "md", measured=False, told=print),
    )


LEADERBOARD = """\
# Leaderboard

**<a href="{page}">Open the interactive page</a>**: it sorts and filters the published runs, draws
their curves, and shows the seeds and the command behind each number. Below are its numbers as plain
tables; [results](../docs/results.md) says what they mean.

{tables}
"""
