"""A table of text, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

Cells = dict[str, str]


def markdown(table: Sequence[Cells]) -> str:
    """The rows as a Markdown table."""
    names = list(table[0])
    lines = [names, *([row[name] for name in names] for row in table)]
    body = ["| " + " | ".join(cells) + " |" for cells in lines]
    rule = "|---|" + "--:|" * (len(names) - 1)
    return "\n".join([body[0], rule, *body[1:]])


def latex(table: Sequence[Cells]) -> str:
    """The rows as a LaTeX tabular for the package booktabs."""
    names = list(table[0])
    lines = [names, *([row[name] for name in names] for row in table)]
    head, *rest = (" & ".join(map(_escaped, cells)) + " \\\\" for cells in lines)
    spec = "l" + "r" * (len(names) - 1)
    return "\n".join(
        [f"\\begin{{tabular}}{{{spec}}}", "\\toprule", head, "\\midrule", *rest, "\\bottomrule",
         "\\end{tabular}"]
    )  # fmt: skip


def _escaped(text: str) -> str:
    for plain, said in (("_", "\\_"), ("%", "\\%"), ("†", "$\\dagger$")):
        text = text.replace(plain, said)
    return text
