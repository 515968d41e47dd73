"""Where and how a run was made, which a run that was stopped may have been more than once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

FACTS = ("started", "python", "platform", "machine", "cpu", "gpu", "packages", "commit", "dirty",
         "diff", "device", "threads", "deterministic", "execution")  # fmt: skip
"""What provenance says of a run's first session, beside the list of all."""

WHEN = ("started", "after_round", "rounds")
"""What two sessions of one environment differ in; rounds, where a run was extended."""


def sessions(facts: Mapping[str, Any]) -> list[Row]:
    """Each start of a run that left something, in order; of an older version's run the first."""
    found = facts.get("sessions")
    if isinstance(found, list):
        return [dict(session) for session in found]
    return [{name: facts[name] for name in FACTS if name in facts}]


def kept(facts: Mapping[str, Any], after: int) -> list[Row]:
    """The sessions whose rows a process keeps that resumes after round `after`.

    The first wrote the first checkpoint; of the others, one that resumed from the same round or
    a later one has left nothing: a batch too large for the memory is not part of the run.
    """
    first, *later = sessions(facts)
    return [first, *(s for s in later if s.get("after_round", 0) < after)] if facts else []


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fact -> what each of two sessions says of it, where that is not the same; None for nothing.

    What is told of a package or a setting is named as `packages.torch`.
    """
    ours, theirs = (dict(_flat(session)) for session in (one, other))
    names = dict.fromkeys([*ours, *theirs])
    found = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _flat(session: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in session.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{part}", held) for part, held in value.items())
        elif name not in WHEN:
            yield name, value
