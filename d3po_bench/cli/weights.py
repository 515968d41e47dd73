"""`d3po-bench doctor` and `weights`."""

from __future__ import annotations

import click

from d3po_bench.cli.options import Answering, Commands, Result


@click.command(cls=Answering)
@click.option("--record", is_flag=True, help="Write the golden scores of the weights found here.")
def doctor(record: bool) -> Result:
    """Say what is installed, which weights are present, and what each missing one needs.

    Scorers score eight fixed pictures and must give the scores that are on record for their
    weights; --record puts them on record.

    \b
    Example:
        d3po-bench doctor
    """  # noqa: D301
    from eval import doctor as doctor_

    if record:
        recorded = doctor_.record()
        return Result(recorded, lambda: list(recorded))
    return Result.of_sections(doctor_.everything())


@click.group(cls=Commands)
def weights() -> None:
    """List and fetch the checkpoints of the scorers.

    \b
    Example:
        d3po-bench weights list
        d3po-bench weights fetch clip laion_aesthetic
    """  # noqa: D301


@weights.command(name="list", cls=Answering)
def weights_list() -> Result:
    """List addresses, checksums, licences, and what is here.

    \b
    Example:
        d3po-bench weights list
    """  # noqa: D301
    from eval import doctor as doctor_

    return Result(doctor_.list_weights(), doctor_.weights)


@weights.command(name="fetch", cls=Answering)
@click.argument("names", nargs=-1, required=True)
def weights_fetch(names: tuple[str, ...]) -> Result:
    """Fetch the weights NAMES into the cache, checked; a broken download resumes.

    \b
    Example:
        d3po-bench weights fetch clip laion_aesthetic
    """  # noqa: D301
    from eval import doctor as doctor_

    return Result.of_paths(doctor_.fetch(names))
