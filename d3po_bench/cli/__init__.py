"""The command line: parse, call one function, print."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

from d3po_bench import __version__
from d3po_bench.cli import export, feedback, results, run, show, tune, weights
from d3po_bench.cli import list as listing
from d3po_bench.cli.options import Commands
from d3po_bench.errors import UserError, fail, install, of_system

EXTRA = ("fastapi", "itsdangerous", "jinja2", "krippendorff", "sqlalchemy", "uvicorn")
"""Modules that the extra `feedback` brings."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="d3po-bench")
def cli() -> None:
    """Fine-tune text-to-image diffusion models from preferences and rewards.

    \b
    Example, minutes on a laptop, no download:
        d3po-bench run --method d3po --objective incompress --seeds 5
        d3po-bench plot
    """  # noqa: D301


for _command in (
    run.run, results.plot, results.report, results.compare, run.sweep, tune.tune,
    results.evaluate, results.table1, export.export, results.verify, show.show, listing.list_,
    weights.doctor, weights.weights, feedback.feedback,
):  # fmt: skip
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one line on stderr and an exit status of 1 or 2.

    Args:
        arguments: what follows the program's name; None for the process's own.
    """
    try:
        cli(arguments, "d3po-bench", standalone_mode=False)
        sys.stdout.flush()  # what cannot be written is said here, not when Python ends
    except NoArgsIsHelpError as problem:
        click.echo(problem.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as problem:
        fail(_said(problem), 2)
    except (click.Abort, KeyboardInterrupt):
        fail("Interrupted. The same command resumes from the last checkpoint.", 1)
    except UserError as problem:
        fail(str(problem), problem.exit_code)
    except ModuleNotFoundError as problem:
        if problem.name not in EXTRA:
            raise
        fail(f"The extra `feedback` is not installed: there is no module {problem.name}. Run: "
             f"{install('feedback')}", 2)  # fmt: skip
    except OSError as problem:
        told = of_system(problem)
        if told is None and problem.errno != errno.EPIPE:
            raise
        if problem.filename is None:  # perhaps stdout, which Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if told is None:  # `d3po-bench list | head`
            sys.exit(1)
        fail(str(told), told.exit_code)


def _said(problem: click.ClickException) -> str:
    """A mistake that click found, and where the right use is shown."""
    from d3po_bench.registry import unknown

    context: click.Context | None = getattr(problem, "ctx", None)
    manual = f"`{context.command_path if context else 'd3po-bench'} --help`"
    if isinstance(problem, click.NoSuchOption) and context:
        known = [name for option in context.command.get_params(context) for name in option.opts]
        return str(unknown("option", problem.option_name, known))
    return f"{problem.format_message()} See {manual}."
