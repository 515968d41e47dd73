"""What the shell offers after Tab. Loads no torch, and none of the user's files."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    import click

    from d3po_bench.registry import Kind

    Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def of(kind: Kind, *, several: bool = False) -> Complete:
    """Names of a kind, or files where the word looks like one.

    Args:
        kind: of what they are names.
        several: whether there may be more, with commas between them.
    """

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from d3po_bench import registry

        before, comma, word = incomplete.rpartition(",") if several else ("", "", incomplete)
        return _among(registry.names(kind), word, before + comma)

    return complete


def preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of presets."""
    from d3po_bench.presets import PRESETS

    return _among(PRESETS, incomplete)


def prompts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of prompt lists, or files."""
    from d3po_bench.prompts import names

    return _among(names(), incomplete)


def setting(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What may stand before the = of `--set`; the options of the method that was named, too."""
    from d3po_bench.config import ELSEWHERE, Execution, RunConfig

    taken = {*ELSEWHERE, "options", "sources"}
    known = [f.name for kind in (RunConfig, Execution) for f in fields(kind) if f.name not in taken]
    known += _options(ctx.params.get("method") or "d3po")
    return _among((f"{name}=" for name in known), incomplete)


def _options(method: str) -> list[str]:
    """The fields of a method of ours, read without importing it; none of another."""
    from d3po_bench.registry import HOME, variant

    paths = (HOME / place / f"{variant(method)[0]}.py" for place in ("d3po_bench", "baselines"))
    body = [node for p in paths if p.is_file() for node in ast.parse(p.read_text("utf-8")).body]
    chosen = {ast.unparse(node.value) for node in body
              if isinstance(node, ast.AnnAssign) and node.value}  # fmt: skip
    return [
        ast.unparse(line.target)
        for node in body if isinstance(node, ast.ClassDef) and node.name in chosen
        for line in node.body
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
    ]  # fmt: skip


def _among(names: Iterable[str], word: str, before: str = "") -> list[CompletionItem]:
    if "/" in word or word.startswith((".", "~")):
        return [CompletionItem(word, type="file")]
    return [CompletionItem(before + name) for name in names if name.startswith(word)]
