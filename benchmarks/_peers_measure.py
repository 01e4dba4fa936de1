"""Time and memory of a call on PyTorch, for the benchmark against peers."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

# from here on other layers' traces in the caches no longer matter
SHORT = 0.02
# seconds from which few repeats are taken, and from which one is
LONG, VERY_LONG = 0.1, 1.0


@dataclass(frozen=True)
class Measured:
    """One call.

    Args:
        seconds: median.
        reference: median seconds of the reference, taken in turns with it.
        memory: bytes, as :func:`peak_memory` counts them.
    """

    seconds: float
    reference: float
    memory: int

    @property
    def ratio(self) -> float:
        """Times the reference."""
        return self.seconds / self.reference


def forward_call(module: nn.Module, x: Tensor) -> Call:
    """One forward call for evaluation, recording nothing for gradients."""

    def run() -> object:
        with torch.no_grad():
            return module(x)

    module.eval()
    return run


def step_call(module: nn.Module, x: Tensor) -> Call:
    """One training step: forward, loss, gradients of parameters and input, plain SGD."""
    module.train()
    x = x.clone().requires_grad_()
    # so small that repeats do not change what is computed
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

    def run() -> None:
        result = module(x)
        output, extra = result if isinstance(result, tuple) else (result, None)
        loss = output.square().mean()
        if extra is not None:
            loss = loss + extra.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return run


def measure(call: Call, reference: Call, seconds: float) -> Measured:
    """Memory of a call, and its time taken in turns with the reference's."""
    gc.collect()
    # counting comes first and warms up
    memory, once = peak_memory(call)
    if once > 5 * VERY_LONG:
        _timed(reference)
        return Measured(once, median(_timed(reference) for _ in range(3)), memory)
    mine, theirs = in_turns(call, reference, seconds)
    return Measured(mine, theirs, memory)


def in_turns(call: Call, reference: Call, seconds: float) -> tuple[float, float]:
    """Median seconds of both; turns alternate, so that a busy machine slows both alike.

    A short call runs twice in its turn and the second run counts. What ran in between may have
    filled the caches with gigabytes of experts; no layer should pay for its neighbours.
    """
    once = _timed(call)
    _timed(reference)
    least = 1 if once > VERY_LONG else 3 if once > LONG else 9
    pair: list[tuple[Call, list[float]]] = [(call, []), (reference, [])]
    mine, theirs = pair[0][1], pair[1][1]
    end = perf_counter() + seconds
    while len(mine) < least or perf_counter() < end:
        pair.reverse()
        for each, taken in pair:
            if each is reference or once < SHORT:
                each()
            taken.append(_timed(each))
    return median(mine), median(theirs)


def peak_memory(call: Call) -> tuple[int, float]:
    """Bytes of tensors alive at the worst moment of a call, and the seconds that it took.

    Counted are the allocations and frees that PyTorch's CPU allocator reports to its profiler:
    results, temporaries, what is saved for the backward pass, gradients. Not counted are what was
    there before (input and parameters), workspaces that libraries take from the system, and Python.
    """
    # its log says on stderr that a profile began and ended
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        once = _timed(call)
    found = recorded.profiler
    assert found is not None
    events = found.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        alive += change
        peak = max(peak, alive)
    return peak, once


def _timed(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
