"""Sphinx's settings for the docs site: `nox -s docs` builds it into build/site.

Every Markdown file of the repository is a page, README.md the front page, so that a link between
two of them works here as it does in the repository. Pages of the methods, the Python door and the
leaderboard are written before each build, from the code and from results/.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d3po_bench import __version__
from docs.site import pages

project = "d3po-bench"
author = "The d3po-bench authors"
release = __version__
html_title = project
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

root_doc = "README"
include_patterns = ["*.md", "reference/**.md", "docs/**.md", "docs/*.ipynb", "results/README.md",
                    "eval/embedded/CARD.md", "d3po_bench/models/embedded/**.md"]  # fmt: skip
exclude_patterns = ["**/*.template.md", "build", "runs", "dist", ".*", "**/__pycache__"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are kept with what they print
highlight_language = "text"  # of code without a language: mostly commands and what they print

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
html_math_renderer = "mathml"

NAVIGATION = {
    "Start": ["docs/getting-started", "docs/reading-results", "docs/troubleshooting",
              "docs/glossary"],
    "Guides": ["docs/own-model", "docs/own-reward", "docs/human-feedback", "docs/studies",
               "docs/evaluation", "docs/python", "docs/first-results", "docs/lora",
               "docs/several-gpus", "docs/clusters", "docs/gpu-speed"],
    "Methods": ["docs/fidelity", "reference/methods/*"],
    "Results": ["docs/results", "reference/leaderboard", "docs/determinism", "results/README",
                "eval/embedded/CARD", "d3po_bench/models/embedded/CARD",
                "d3po_bench/models/embedded/v2/LICENSES"],
    "Reference": ["reference/api", "CONTRIBUTING", "CHANGELOG"],
    "Lab notebooks": ["docs/notes/*"],
}  # fmt: skip
"""What the sidebar lists. A page that is in no list fails the build."""


def navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the sidebar's lists into the front page, which README.md itself cannot hold."""
    if docname == root_doc:
        for caption, entries in NAVIGATION.items():
            lines = [":hidden:", ":glob:", f":caption: {caption}", *entries]
            source[0] += "\n".join(["\n```{toctree}", *lines, "```\n"])


def equation(display: str) -> Any:
    """A visitor that writes MathML, which browsers draw without a script."""

    def visit(writer: Any, node: nodes.Element) -> None:
        writer.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit


def write_pages(app: Sphinx) -> None:
    """Write what is made from code and results."""
    pages.write(Path(app.srcdir), Path(app.outdir))


def index(app: Sphinx, problem: Exception | None) -> None:
    """Let the site's address show the front page."""
    if problem is None:
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (equation("inline"), None), (equation("block"), None))
    app.connect("builder-inited", write_pages)
    app.connect("source-read", navigation)
    app.connect("build-finished", index)
