"""The layers, calls and measures of the benchmark of predictions."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Factorization,
    Hadamard,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)

IN, OUT = 384, 256
EXPERTS = (32, 512, (16, 32))
BATCHES = (1, 64, 2048)

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One prediction: a layer, a batch, and whether it trains."""

    backend: str
    kind: Factorization
    experts: int | tuple[int, ...]
    batch: int
    training: bool

    @property
    def key(self) -> str:
        """Name of the row in a file of results."""
        way = "training" if self.training else "forward"
        return f"{self.backend} {self.kind!r} {self.experts} {self.batch} {way}"


def kinds(experts: int | tuple[int, ...]) -> list[Factorization]:
    """Every factorization, at ranks of some hundred thousand parameters where that is possible."""
    more = isinstance(experts, tuple)
    return [
        CP(256),
        TensorRing((4, 4, 4, 64) if more else (4, 4, 64)),
        TensorTrain((4, 16, 64) if more else (16, 64)),
        Tucker((8, 8, 64, 64) if more else (16, 64, 64)),
        Hadamard(),
        SharedBasis((4, 32)),
        BaseDelta(4),
        SharedDelta(4),
        Dense(),
    ]


def rows(backends: tuple[str, ...]) -> Iterator[Row]:
    """All rows, layer by layer."""
    for backend in backends:
        for experts in EXPERTS:
            for kind in kinds(experts):
                for batch in BATCHES:
                    for training in (False, True):
                        yield Row(backend, kind, experts, batch, training)


def prepared(row: Row, layer: Any) -> Call:
    """The call of a row on a layer."""
    return (_numpy_call if row.backend == "numpy" else _torch_call)(row, layer)


def build(row: Row) -> Any:
    """The layer of a row, its gate as after training: logits differ."""
    if row.backend == "numpy":
        import numpy as np

        import tensormoe_numpy

        made = tensormoe_numpy.MuMoE(IN, OUT, row.experts, row.kind, seed=0)
        rng = np.random.default_rng(1)
        for name, array in made.parameters.items():
            if name.startswith("gate."):
                array[...] = rng.standard_normal(array.shape) * IN**-0.5
        return made
    import torch

    import tensormoe_torch

    torch.manual_seed(0)
    layer = tensormoe_torch.MuMoE(IN, OUT, row.experts, row.kind)
    assert layer.gate is not None
    with torch.no_grad():
        for parameter in layer.gate.parameters():
            parameter.normal_(0.0, IN**-0.5)
    return layer


def _numpy_call(row: Row, layer: Any) -> Call:
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((row.batch, IN), dtype="float32")
    if not row.training:
        return lambda: layer(x)
    cotangent = rng.standard_normal((row.batch, OUT), dtype="float32")

    def train() -> object:
        output, pull = layer.vjp(x)
        return output, pull(cotangent)

    return train


def _torch_call(row: Row, layer: Any) -> Call:
    import torch

    x = torch.randn(row.batch, IN)
    if not row.training:

        def forward() -> object:
            with torch.no_grad():
                return layer(x)

        return forward
    x.requires_grad_()
    cotangent = torch.randn(row.batch, OUT)

    def train() -> object:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output = layer(x)
        output.backward(cotangent)
        return output

    return train


def fastest(call: Call, seconds: float) -> float:
    """Processor seconds of the fastest of several calls: on one thread, others' work is not in it.

    Three calls at least, unless one takes four times as long as there is time for all.
    """
    call()
    best, end, count = float("inf"), perf_counter() + seconds, 0
    while (count < 3 and best < 4 * seconds) or perf_counter() < end:
        start = process_time()
        call()
        best = min(best, process_time() - start)
        count += 1
    return best


def peak_memory(row: Row, call: Call) -> int:
    """Bytes that a call allocates at its worst moment, beyond what was there before."""
    call()
    gc.collect()
    return _traced(call) if row.backend == "numpy" else profiled(call)


def _traced(call: Call) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = call()
        found = tracemalloc.get_traced_memory()[1] - before
        del kept
    finally:
        tracemalloc.stop()
    return found


def profiled(call: Call) -> int:
    """Bytes that a call of PyTorch's holds at its worst moment."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [each for each in results.events() if each.name() == "[memory]"]
    alive = peak = least = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        alive += event.nbytes()
        # gradients of the call before are let go first
        least = min(least, alive)
        peak = max(peak, alive - least)
    return peak
