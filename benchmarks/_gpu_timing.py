"""Time on a device that works through a queue: calls return before their work is done.

A turn is as many calls in succession as take a few milliseconds, and one wait at its end: events on
the stream around them in PyTorch, the clock and ``block_until_ready`` in JAX. Seconds per call are
then those of a program that never waits: of the device, or of Python where it cannot fill the
queue. Operands that fit into the L2 cache are there from the call before.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from _shared import Call

MOST_CALLS = 512

Elapsed = Callable[[Call, int], float]
"""Seconds of so many calls in succession."""


class Turns:
    """Seconds per call, by turns; the first turn of a call finds how many calls one takes.

    Args:
        elapsed: seconds of so many calls.
        least: seconds that a turn takes at least.
    """

    def __init__(self, elapsed: Elapsed, least: float) -> None:
        self.elapsed, self.least = elapsed, least
        self._counts: dict[Call, int] = {}

    def __call__(self, call: Call) -> float:
        if call not in self._counts:
            self._counts[call] = self._count(call)
        count = self._counts[call]
        return self.elapsed(call, count) / count

    def _count(self, call: Call) -> int:
        """Calls per turn; the shorter turns before it warm up."""
        self.elapsed(call, 1)
        count = 1
        # the shorter of two: a pause of the machine is no long call
        while count < MOST_CALLS and min(self.elapsed(call, count) for _ in "ab") < self.least:
            count *= 2
        return count


def torch_elapsed(device: str) -> Elapsed:
    """Seconds between two events on PyTorch's current stream, or by the clock on the CPU."""
    import torch

    if device == "cpu":
        return _clocked(lambda result: None)

    def elapsed(call: Call, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return elapsed


def jax_elapsed(device: str) -> Elapsed:
    """Seconds until the last result is there; on the CPU, where calls overlap, each is awaited."""
    import jax

    if device == "cpu":
        return _clocked(jax.block_until_ready)

    def elapsed(call: Call, count: int) -> float:
        start = perf_counter()
        result: Any = None
        for _ in range(count):
            # what is dropped is computed all the same, and the device keeps the order
            result = call()
        jax.block_until_ready(result)
        return perf_counter() - start

    return elapsed


def torch_cold(call: Call, l2_bytes: int, repeats: int = 15) -> float:
    """Median seconds of one call on a GPU after others' data has filled the L2 cache."""
    import torch

    other = torch.empty(max(4 * l2_bytes, 2**27), dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(repeats):
        # takes the device long enough for the calls behind it to be in the queue
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) / 1e3 for start, end in events)


def _clocked(wait: Callable[[object], object]) -> Elapsed:
    def elapsed(call: Call, count: int) -> float:
        start = perf_counter()
        for _ in range(count):
            wait(call())
        return perf_counter() - start

    return elapsed
