"""Parts that the benchmarks share: interleaved timing, and a sort-based entmax to compare with."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Call = Callable[[], object]


def sorted_entmax15(logits: Array) -> Array:
    """Entmax-1.5 from the sorted logits (Peters, Niculae & Martins 2019, algorithm 2)."""
    z = (logits - logits.max(axis=-1, keepdims=True)) / 2
    order = np.sort(z, axis=-1)[:, ::-1]
    count = np.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = np.cumsum(order, axis=-1) / count
    square = np.cumsum(order * order, axis=-1) / count
    tau = mean - np.sqrt(np.maximum((1 - count * (square - mean * mean)) / count, 0))
    support = np.count_nonzero(tau <= order, axis=-1)
    chosen = np.take_along_axis(tau, support[:, None] - 1, axis=-1)
    weights: Array = np.maximum(z - chosen, 0) ** 2
    return weights


def interleaved(
    calls: Sequence[Call],
    seconds: float,
    clock: Callable[[], float] = perf_counter,
    *,
    turn: Callable[[Call], float] | None = None,
) -> list[float]:
    """Median seconds of each call; repeats take turns, so that a busy machine slows all alike.

    Args:
        calls: to compare.
        seconds: for all of them together; each has seven turns at least.
        clock: gives seconds.
        turn: gives the seconds of a call instead, where a call returns before its work is done.
    """
    for call in calls:
        call()
    timed = turn or partial(_once, clock)
    times: list[list[float]] = [[] for _ in calls]
    end = perf_counter() + seconds
    pairs = list(zip(calls, times, strict=True))
    while perf_counter() < end or len(times[0]) < 7:
        # another first each time: what ran before leaves the caches warm or cold
        pairs.append(pairs.pop(0))
        for call, taken in pairs:
            taken.append(timed(call))
    return [median(taken) for taken in times]


def _once(clock: Callable[[], float], call: Call) -> float:
    start = clock()
    call()
    return clock() - start


def settings() -> str:
    """The versions and the machine, for the head of a table."""
    return f"NumPy {np.__version__}, Python {platform.python_version()}, {platform.machine()}"
