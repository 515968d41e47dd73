"""Several processes on one run, called ranks: the bytes of one process, whatever their number.

Every rank holds the whole rollout and draws from the same streams. Work is cut into pieces that do
not depend on the number of ranks; each piece is done by one of them, and what comes of the pieces
is put together in their order. This is the only place that talks to other ranks.
"""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d3po_bench.errors import RunError, UserError, is_out_of_memory

T = TypeVar("T")


class Lost(RunError):  # noqa: N818
    """Another rank has ended, or did not come in time: nothing can be shared any more."""


@dataclass
class _State:
    """What this process knows of its part in a group."""

    stage: str = "the start"
    """What it is at, for people."""
    limit: float = 0.0
    """Seconds that it waits for the others."""
    lost: bool = False
    settled: int = 0
    """Times that all ranks came to the end of something."""


_state = _State()


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def lost() -> bool:
    """Whether the other ranks are no longer where this one is, and nothing can be shared."""
    return _state.lost


def settle(seconds: float | None) -> None:
    """At the end of a run, which may have failed here alone: see whether it has for all ranks.

    The others may wait for this one in the middle of the run. Then it is lost to them, and has to
    end, so that they hear of it.

    Args:
        seconds: how long to wait for them; None for as long as for anything.
    """
    if world() == 1 or _state.lost:
        return
    _state.settled += 1
    store, name = the_store(), f"d3po-bench/settled-{_state.settled}"
    try:
        store.set(f"{name}/{rank()}", "")
        keys = [f"{name}/{number}" for number in range(world())]
        store.wait(keys, timedelta(seconds=_state.limit if seconds is None else seconds))
    except RuntimeError:
        _state.lost = True


def the_store() -> Any:
    """Small things that the ranks share, which need not be there at one time."""
    return dist.distributed_c10d._get_default_store()


def begin(limit: float) -> None:
    """Say how many seconds a rank waits for the others."""
    _state.limit, _state.lost = limit, False


@contextlib.contextmanager
def at(stage: str) -> Iterator[None]:
    """Around a stage of a run: an error that comes from waiting for other ranks names it."""
    before, _state.stage = _state.stage, stage
    try:
        yield
    finally:
        _state.stage = before


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Around a collective, which every rank calls.

    Raises:
        Lost: the others are not there.
    """
    try:
        yield
    except RuntimeError as problem:  # what torch.distributed raises, whichever the backend
        _state.lost = True
        said = re.sub(r"^\[\S+\] ", "", str(problem).splitlines()[0]).split(". ")[0][:120]
        raise Lost(
            f"Rank {rank()} of {world()} lost the others in the stage {_state.stage}: {said}. One "
            f"of them has ended, or took more than {_state.limit:g} s (--set rank_timeout=...). "
            "Run the same command again: it resumes, with any number of ranks."
        ) from problem


# ---- what happens on every rank, or on none


class _Trace(Exception):  # noqa: N818  # it is no error of its own, but shown with one
    """The traceback of another rank, in one that is printed here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class _Failure:
    """An exception of a rank, as it reaches the others."""

    kind: type[Exception]
    said: str
    trace: str = ""

    @classmethod
    def of(cls, problem: BaseException) -> _Failure:
        if isinstance(problem, UserError):
            return cls(RunError if isinstance(problem, RunError) else UserError, str(problem))
        if is_out_of_memory(problem):
            return cls(MemoryError, str(problem))
        said = f"{type(problem).__name__}: {problem}"
        return cls(RuntimeError, said, "".join(traceback.format_exception(problem)))

    def raised(self, where: str) -> Exception:
        problem = self.kind(where + self.said)
        if self.trace:
            problem.__cause__ = _Trace(self.trace)
        return problem


def together(work: Callable[[], T]) -> T:
    """Do this rank's share; if that fails on any rank, it fails on all of them.

    Raises:
        Exception: as `work` does, or of another rank.
    """
    if world() == 1:
        return work()
    try:
        found, problem = work(), None
    except Lost:
        raise
    except (Exception, SystemExit) as own:  # a plug-in that exits is one that failed
        problem = own
    failures = gather(None if problem is None else _Failure.of(problem))
    if problem is not None:
        raise problem
    for number, failure in enumerate(failures):
        if failure is not None:
            alone = sum(f is not None for f in failures) < world() and number
            raise failure.raised(f"Rank {number}: " if alone else "")
    return found


def share(count: int, work: Callable[[int], None]) -> None:
    """Do the pieces of some work that are this rank's; the owner of piece n is rank n % world().

    Raises:
        Exception: on all ranks, as `work` does on any.
    """

    def own() -> None:
        for number in range(rank(), count, world()):
            work(number)

    together(own)


def lead(work: Callable[[], T]) -> T | None:
    """Let the first rank do what one process must do, such as writing; None on the others.

    Raises:
        Exception: on all of them, as `work` does.
    """
    return together(lambda: work() if rank() == 0 else None)


def tell(work: Callable[[], T]) -> T:
    """Let the first rank do what only it can do alike for all, such as reading; the result.

    Raises:
        Exception: on all of them, as `work` does.
    """
    if world() == 1:
        return work()
    found = [lead(work)]
    with _waiting():
        dist.broadcast_object_list(found, 0)
    result: T = found[0]  # type: ignore[assignment]
    return result


# ---- what goes from rank to rank


def gather(value: T) -> list[T]:
    """What each rank has, in their order. Tensors among it are on the CPU."""
    if world() == 1:
        return [value]
    found: list[T] = [value] * world()
    with _waiting():
        dist.all_gather_object(found, value)
    return found


def send(piece: Tensor, number: int) -> None:
    """Give piece `number`, filled in by the rank that did it, to all others."""
    if world() > 1:
        whole = piece.contiguous()
        with _waiting():
            dist.broadcast(whole, number % world())
        piece.copy_(whole)


def joined(pieces: Sequence[T], work: Callable[[T], Tensor]) -> Tensor:
    """What `work` makes of the pieces, one after the other along the first axis, on the CPU.

    Raises:
        Exception: on all ranks, as `work` does on any.
    """
    own: dict[int, Tensor] = {}

    def do(number: int) -> None:
        own[number] = work(pieces[number]).cpu()

    share(len(pieces), do)
    shares = gather(own)
    return torch.cat([shares[n % len(shares)][n] for n in range(len(pieces))])


def add_in_order(sums: list[Tensor | None], parts: Sequence[Tensor | None], ranks: int) -> None:
    """Add to `sums` what the ranks have, first that of rank 0, as one process would.

    Args:
        sums: in place; None for what nothing was added to yet.
        parts: of this rank, of the shapes of `sums`; None for nothing.
        ranks: the first so many take part; `parts` of the others are not looked at.
    """
    known = gather([None if part is None else (part.shape, part.dtype) for part in parts])
    device = next((p.device for p in (*parts, *sums) if p is not None), torch.device("cpu"))
    for number in range(ranks):
        there = [i for i, kind in enumerate(known[number]) if kind is not None]
        kinds = [kind for kind in known[number] if kind is not None]
        if not there:
            continue
        ours = (
            [part for part in parts if part is not None]
            if number == rank()
            else [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        )
        wide = functools.reduce(torch.promote_types, (dtype for _, dtype in kinds))
        flat = torch.cat([part.flatten().to(wide) for part in ours])
        send(flat, number)
        for i, part, (shape, dtype) in zip(
            there, flat.split([p.numel() for p in ours]), kinds, strict=True
        ):
            found, before = part.view(shape).to(dtype), sums[i]
            sums[i] = found.clone() if before is None else before.add_(found)
