"""Links between the documents, and what the docs site takes from the methods."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import click
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from d3po_bench import registry
from d3po_bench.cli import cli
from tests.commands import ROOT

MARKDOWN = MarkdownIt("commonmark").enable("table")
PLACES = (
    "*.md",
    "docs/*.md",
    "docs/notes/*.md",
    "results/**/*.md",
    "eval/**/*.md",
    "d3po_bench/**/*.md",
)
DOCUMENTS = sorted(
    path for place in PLACES for path in ROOT.glob(place)
    if ".template" not in path.suffixes
)  # fmt: skip


@cache
def anchors(document: Path) -> set[str]:
    """What a link to a heading of a document may name, as GitHub and the site make it."""
    tokens = MARKDOWN.parse(document.read_text(encoding="utf-8"))
    headings = (text for mark, text in pairwise(tokens)
                if mark.type == "heading_open")  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", h.content.lower()).replace(" ", "-") for h in headings}


def links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        yield from (str(token.attrs[key]) for key in ("href", "src") if key in token.attrs)
        yield from links(token.children or [])


def broken(document: Path) -> list[str]:
    """The links of a document that lead nowhere in the repository."""
    found = []
    for link in links(MARKDOWN.parse(document.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        if re.match(r"\w+:", link):
            continue
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


OURS = re.compile(r"(?:srun )?(?:d3po-bench|(?:torchrun|accelerate launch) .*-m d3po_bench) (.*)")


def printed(document: Path) -> Iterator[list[str]]:
    """The words of every command of ours in a document's blocks of code."""
    for token in MARKDOWN.parse(document.read_text(encoding="utf-8")):
        if token.type == "fence":
            for line in token.content.replace("\\\n", " ").splitlines():
                if found := OURS.match(line.strip()):
                    yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize(
    "page",
    ["docs/several-gpus.md", "docs/clusters.md", "docs/own-model.md", "results/sd15/README.md"],
)
def test_its_commands_have_options_that_exist(page: str) -> None:
    commands = [c for c in printed(ROOT / page) if not any("://" in word for word in c[:2])]
    assert len(commands) > 4
    for words in commands:
        name, command, rest = cli.resolve_command(click.Context(cli), words)
        while isinstance(command, click.Group):
            name, command, rest = command.resolve_command(click.Context(command), rest)
        assert command is not None
        with command.make_context(name, [*rest]) as context:
            assert context.params


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_links_lead_to_files_and_headings_that_are_there(document: Path) -> None:
    assert broken(document) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# `One` heading, 0.5\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[good](other.md#one-heading-05) [bad](other.md#another) [gone](gone.md)\n"
        "![gone](gone.png) [elsewhere](https://example.org)\n\n| a |\n|---|\n| [cell](folder/) |\n"
    )
    assert broken(page) == ["other.md#another", "gone.md", "gone.png", "folder/"]


@pytest.mark.parametrize(
    "name", [n for n in registry.names("method") if not registry.variant(n)[1]]
)
def test_the_page_of_a_method_has_its_equation(name: str) -> None:
    told = registry.method(name).loss.__doc__ or ""  # type: ignore[attr-defined]
    assert re.search(r"\$\$\n.*=.*\$\$", told, re.DOTALL), "loss needs an equation between $$"
