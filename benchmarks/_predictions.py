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
from tensormoe.functional import BlockConfig, LayerConfig, Options
from tensormoe.planning import Cost, Library

Call = Callable[[], object]
Experts = int | tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One prediction: a layer or block, a batch, and whether it trains.

    Args:
        backend: "numpy", "torch" or "jax".
        sizes: of a layer's input and output; of a block's input, hidden features and output.
        kind: how the experts are stored.
        experts: one size per level.
        batch: number of inputs.
        training: forward and backward, instead of forward alone.
    """

    backend: str
    sizes: tuple[int, ...]
    kind: Factorization
    experts: Experts
    batch: int
    training: bool

    @property
    def key(self) -> str:
        """Name of the row in a file of results."""
        way = "training" if self.training else "forward"
        sizes = "→".join(map(str, self.sizes))
        return f"{self.backend} {sizes} {self.kind!r} {self.experts} {self.batch} {way}"

    @property
    def layer(self) -> tuple[Any, ...]:
        """Key of the layer, which several rows share."""
        return self.backend, self.sizes, self.kind, self.experts

    def config(self) -> LayerConfig | BlockConfig:
        """The configuration of the layer or block."""
        options = Options(self.experts, self.kind)
        if len(self.sizes) == 2:
            return options.layer(*self.sizes)
        return options.block(*self.sizes, "gelu", 0.0)


@dataclass(frozen=True)
class Suite:
    """Rows of one purpose.

    Args:
        sizes: as :class:`Row`.
        experts: numbers of experts.
        batches: numbers of inputs.
        kinds: factorizations by whether there are several levels.
        dense: the largest number of inputs times experts of ``Dense``.
    """

    sizes: tuple[tuple[int, ...], ...]
    experts: tuple[Experts, ...]
    batches: tuple[int, ...]
    kinds: Callable[[bool], list[Factorization]]
    dense: int


def _tuned(more: bool) -> list[Factorization]:
    """Every factorization, at ranks of some hundred thousand parameters where that is possible."""
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


def _held_out(more: bool) -> list[Factorization]:
    """Every factorization, at other ranks."""
    return [
        CP(320),
        TensorRing((3, 3, 3, 80) if more else (6, 6, 48)),
        TensorTrain((6, 12, 48) if more else (12, 96)),
        Tucker((6, 10, 48, 80) if more else (12, 80, 48)),
        Hadamard(),
        SharedBasis((6, 24)),
        BaseDelta(6),
        SharedDelta(3),
        Dense(),
    ]


def _of_blocks(more: bool) -> list[Factorization]:
    return [CP(160), _held_out(more)[1], Hadamard()]


SUITES = {
    # where the form of the time model was chosen
    "tuned": (Suite(((384, 256),), (32, 512, (16, 32)), (1, 64, 2048), _tuned, 32768),),
    # sizes that played no part in that
    "held out": (
        Suite(((640, 768),), (24, 256, (8, 48)), (4, 200, 1000), _held_out, 4800),
        Suite(((256, 768, 320),), (48, (12, 20)), (1, 128, 1500), _of_blocks, 0),
    ),
}


def rows(suite: str, backends: tuple[str, ...]) -> Iterator[Row]:
    """All rows of a suite, layer by layer."""
    for backend in backends:
        for part in SUITES[suite]:
            for sizes in part.sizes:
                for experts in part.experts:
                    yield from _rows(part, backend, sizes, experts)


def _rows(part: Suite, backend: str, sizes: tuple[int, ...], experts: Experts) -> Iterator[Row]:
    more = isinstance(experts, tuple)
    count = 1
    for each in experts if isinstance(experts, tuple) else (experts,):
        count *= each
    for kind in part.kinds(more):
        for batch in part.batches:
            if isinstance(kind, Dense) and count * batch > part.dense and count > 32:
                continue
            for training in (False, True):
                yield Row(backend, sizes, kind, experts, batch, training)


def cost_of(row: Row) -> Cost:
    """The cost of a row's call, as its library runs it."""
    return row.config().cost(row.batch, training=row.training, library=_library(row.backend))


def _library(backend: str) -> Library:
    if backend == "numpy":
        from tensormoe_numpy import BACKEND

        return BACKEND.library
    if backend == "jax":
        from tensormoe_jax import LIBRARY

        return LIBRARY
    import torch

    from tensormoe_torch._adapter import library

    return library(torch.float32)


def build(row: Row) -> Any:
    """The layer of a row, its gate as after training: logits differ."""
    return _BUILD[row.backend](row)


def _numpy_layer(row: Row) -> Any:
    import numpy as np

    import tensormoe_numpy

    if len(row.sizes) == 2:
        made: Any = tensormoe_numpy.MuMoE(*row.sizes, row.experts, row.kind, seed=0)
    else:
        made = tensormoe_numpy.MuMoEMLP(
            *row.sizes, experts=row.experts, factorization=row.kind, seed=0
        )
    rng = np.random.default_rng(1)
    for name, array in made.parameters.items():
        if name.startswith("gate."):
            array[...] = rng.standard_normal(array.shape) * row.sizes[0] ** -0.5
    return made


def _torch_layer(row: Row) -> Any:
    import torch

    import tensormoe_torch

    torch.manual_seed(0)
    if len(row.sizes) == 2:
        layer: Any = tensormoe_torch.MuMoE(*row.sizes, row.experts, row.kind)
    else:
        layer = tensormoe_torch.MuMoEMLP(*row.sizes, experts=row.experts, factorization=row.kind)
    with torch.no_grad():
        for parameter in layer.gate.parameters():
            parameter.normal_(0.0, row.sizes[0] ** -0.5)
    return layer


@dataclass(frozen=True)
class JaxLayer:
    """A configuration and its parameters, as JAX's pure functions take them."""

    config: LayerConfig | BlockConfig
    parameters: dict[str, Any]


def _jax_layer(row: Row) -> JaxLayer:
    import jax

    import tensormoe_jax

    config = row.config()
    parameters = tensormoe_jax.initialize(config, jax.random.key(0))
    for name, array in parameters.items():
        if name.startswith("gate."):
            drawn = jax.random.normal(jax.random.key(1), array.shape)
            parameters[name] = drawn * row.sizes[0] ** -0.5
    return JaxLayer(config, parameters)


_BUILD: dict[str, Callable[[Row], Any]] = {
    "numpy": _numpy_layer,
    "torch": _torch_layer,
    "jax": _jax_layer,
}


def prepared(row: Row, layer: Any) -> Call:
    """The call of a row on a layer."""
    return _CALL[row.backend](row, layer)


def _numpy_call(row: Row, layer: Any) -> Call:
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((row.batch, row.sizes[0]), dtype="float32")
    if not row.training:
        return lambda: layer(x)
    cotangent = rng.standard_normal((row.batch, row.sizes[-1]), dtype="float32")

    def train() -> object:
        output, pull = layer.vjp(x)
        return output, pull(cotangent)

    return train


def _torch_call(row: Row, layer: Any) -> Call:
    import torch

    x = torch.randn(row.batch, row.sizes[0])
    if not row.training:

        def forward() -> object:
            with torch.no_grad():
                return layer(x)

        return forward
    x.requires_grad_()
    cotangent = torch.randn(row.batch, row.sizes[-1])

    def train() -> object:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output = layer(x)
        output.backward(cotangent)
        return output

    return train


def _jax_call(row: Row, layer: JaxLayer) -> Call:
    """A compiled call, whose ``memory`` is what XLA says that it takes."""
    import jax

    from tensormoe_jax import apply

    keys = jax.random.split(jax.random.key(2))
    x = jax.random.normal(keys[0], (row.batch, row.sizes[0]))
    cotangent = jax.random.normal(keys[1], (row.batch, row.sizes[-1]))

    def forward(parameters: Any, x: Any) -> Any:
        return apply(layer.config, parameters, x)

    def train(parameters: Any, x: Any, cotangent: Any) -> Any:
        output, pull = jax.vjp(forward, parameters, x)
        return output, pull(cotangent)

    given = (layer.parameters, x, cotangent) if row.training else (layer.parameters, x)
    compiled = jax.jit(train if row.training else forward).lower(*given).compile()

    def call() -> object:
        return jax.block_until_ready(compiled(*given))

    found = compiled.memory_analysis()
    call.memory = found.temp_size_in_bytes + found.output_size_in_bytes  # type: ignore[attr-defined]
    return call


_CALL: dict[str, Callable[[Row, Any], Call]] = {
    "numpy": _numpy_call,
    "torch": _torch_call,
    "jax": _jax_call,
}


def clock_of(backend: str) -> Callable[[], float]:
    """The clock for calls of a library: that of the processor, but for work in other threads."""
    return perf_counter if backend == "jax" else process_time


def fastest(call: Call, seconds: float, clock: Callable[[], float] = process_time) -> float:
    """Seconds of the fastest of several calls; on one thread, others' work is not in them.

    Three calls at least, unless one takes four times as long as there is time for all.
    """
    call()
    best, end, count = float("inf"), perf_counter() + seconds, 0
    while (count < 3 and best < 4 * seconds) or perf_counter() < end:
        start = clock()
        call()
        best = min(best, clock() - start)
        count += 1
    return best


def peak_memory(row: Row, call: Call) -> int:
    """Bytes that a call allocates at its worst moment, beyond what was there before."""
    call()
    gc.collect()
    if row.backend == "jax":
        planned: int = call.memory  # type: ignore[attr-defined]
        return planned
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
