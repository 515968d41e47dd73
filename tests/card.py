"""Time and memory of a device, for the GPU report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from d3po_bench.models.adapters import DiffusersModel


class Card:
    """Time and memory of a device; a CPU has no peak."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.device = device.type == "cuda", device

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of some work, until the device has done it."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], Any]) -> tuple[float, float | None]:
        """Seconds of some work, and the most gigabytes that tensors took meanwhile."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(work)
        most = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else None
        return seconds, most

    @contextlib.contextmanager
    def inside(self, model: DiffusersModel) -> Iterator[Callable[[], float]]:
        """Gives the seconds that the device spends in the network, forward and backward."""
        marks: list[tuple[Any, Any]] = []

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                first = self._mark()
                result = call(*args, **kwargs)
                marks.append((first, self._mark()))
                return result

            return wrapped

        backward = Tensor.backward
        model._call = timed(model._call)  # type: ignore[method-assign]
        Tensor.backward = timed(backward)  # type: ignore[method-assign]
        try:
            yield lambda: self._between(marks)
        finally:
            del model._call
            Tensor.backward = backward  # type: ignore[method-assign]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: Sequence[tuple[Any, Any]]) -> float:
        self.wait()
        if self.cuda:
            return float(sum(first.elapsed_time(last) for first, last in marks)) / 1000
        return float(sum(last - first for first, last in marks))
