"""``tensormoe calibrate``: this machine's roofline, measured with a library as layers use it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from mmap import mmap
from time import perf_counter
from typing import Any

from tensormoe._extras import require
from tensormoe._format import format_bytes, format_count, format_time
from tensormoe._validation import choice
from tensormoe.cli._console import make_console, make_table, print_json
from tensormoe.cli._profile import THIS_MACHINE, save_profile
from tensormoe.errors import SpecError
from tensormoe.gates import Gate, activate
from tensormoe.planning import Roofline
from tensormoe.planning._layer_cost import activation_flops

__all__ = ["LIBRARIES", "measure_roofline", "run_calibrate"]

_MATMUL_SIZE = 1024
# weights of a layer that runs again and again stay in the last cache
_WEIGHT_SIZE = 1024
_FRESH_BYTES = 2**23
# of the results of a call, about one in two gets memory that another has just let go
_REUSED = 2
_GATE_ROWS, _GATE_EXPERTS = 256, 512
# other programs may run: the fastest of many short runs is what the machine can do
_SECONDS = 0.6

Clock = Callable[[], float]


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Measure, show, and keep the profile unless told otherwise."""
    library = choice(arguments.backend, LIBRARIES, "--backend", SpecError)
    require("tensormoe calibrate", (library,), library)
    if not arguments.json:
        make_console()  # before seconds of work, not after
    roofline = measure_roofline(library)
    checks = _checks(roofline, library)
    path = None if arguments.dry_run else save_profile(roofline)
    if arguments.json:
        print_json(
            {
                "command": "calibrate",
                "backend": library,
                "roofline": roofline.to_dict(),
                "checks": checks,
                "path": None if path is None else str(path),
            }
        )
        return
    console = make_console()
    table = make_table(f"this machine, {library}, float32", "measured")
    table.add_row("matrix products", f"{format_count(roofline.matmul_rate)}FLOP/s")
    table.add_row("elementwise work of gates", f"{format_count(roofline.elementwise_rate)}FLOP/s")
    table.add_row("reading", f"{format_bytes(roofline.bandwidth)}/s")
    assert roofline.fresh_bandwidth is not None
    table.add_row("results in new memory", f"{format_bytes(roofline.fresh_bandwidth)}/s")
    assert roofline.backward_overhead is not None
    table.add_row("starting a step", format_time(roofline.overhead))
    table.add_row("starting one of a backward pass", format_time(roofline.backward_overhead))
    console.print()
    console.print(table)
    console.print()
    check = make_table("a layer, 768 → 768, 512 experts", "batch", "predicted", "measured")
    for each in checks:
        check.add_row(
            each["layer"],
            str(each["batch"]),
            format_time(each["predicted"]),
            format_time(each["measured"]),
        )
    console.print(check)
    console.print()
    if path is None:
        console.print("A dry run: nothing was kept.")
    else:
        console.print(f"Kept in {path}", soft_wrap=True)
        console.print("tensormoe rank and tensormoe plan now predict times for this machine.")


def measure_roofline(
    library: str = "numpy", clock: Clock = perf_counter, seconds: float | None = None
) -> Roofline:
    """The rates of a library on this machine: the best of several runs each.

    Every number is that of something a layer does: a large product, one input times a large matrix,
    the first touch of memory that the system gives, the activation of a gate, and the smallest
    layer there is, forward and in training.

    Args:
        library: "numpy" or "torch".
        clock: gives seconds; of the processor, for figures that other programs disturb less.
        seconds: for each figure.
    """
    bench = _BENCHES[library]()

    def best(run: Callable[[], object], repeats: int = 1) -> float:
        return _best(run, repeats, clock, _SECONDS if seconds is None else seconds)

    left, right = bench.array(_MATMUL_SIZE, _MATMUL_SIZE), bench.array(_MATMUL_SIZE, _MATMUL_SIZE)
    matmul = 2 * _MATMUL_SIZE**3 / best(lambda: bench.backend.matmul(left, right))
    row, weights = bench.array(1, _WEIGHT_SIZE), bench.array(_WEIGHT_SIZE, _WEIGHT_SIZE)
    reading = 4 * _WEIGHT_SIZE**2 / best(lambda: bench.backend.matmul(row, weights), 5)
    content = bytes(_FRESH_BYTES)
    fresh = _REUSED * _FRESH_BYTES / best(lambda: _touch(content))
    gate, logits = Gate(), bench.array(_GATE_ROWS, _GATE_EXPERTS)
    work = activation_flops(gate, _GATE_EXPERTS) * _GATE_ROWS * _GATE_EXPERTS
    elementwise = work / best(lambda: activate(gate, logits, backend=bench.backend))
    layer = bench.layer(*_SMALLEST, factorization="tensor_ring", rank=2)
    x, cotangent = bench.array(1, _SMALLEST[0]), bench.array(1, _SMALLEST[1])
    calls = bench.forward(layer, x), bench.train(layer, x, cotangent)
    costs = layer.cost(1), layer.cost(1, training=True)
    forward, training = (best(call, 10) for call in calls)
    steps = [len(cost.steps) for cost in costs]
    overhead = forward / steps[0]
    backward = max((training - forward) / (steps[1] - steps[0]), overhead)
    return Roofline(THIS_MACHINE, matmul, elementwise, reading, overhead, fresh, backward)


class _NumpyBench:
    """NumPy's arrays and layers."""

    def __init__(self) -> None:
        import numpy as np

        from tensormoe_numpy import BACKEND, MuMoE

        self.backend: Any = BACKEND
        self._layers = MuMoE
        self._rng = np.random.default_rng(0)

    def array(self, *shape: int) -> Any:
        return self._rng.standard_normal(shape, dtype="float32")

    def layer(self, *sizes: Any, **options: Any) -> Any:
        return self._layers(*sizes, **options, seed=0)

    def forward(self, layer: Any, x: Any) -> Callable[[], object]:
        return lambda: layer(x)

    def train(self, layer: Any, x: Any, cotangent: Any) -> Callable[[], object]:
        def call() -> object:
            output, pull = layer.vjp(x)
            return output, pull(cotangent)

        return call


class _TorchBench:
    """PyTorch's tensors on the CPU, and its layers."""

    def __init__(self) -> None:
        import torch

        from tensormoe_torch import MuMoE, TorchBackend

        self.backend: Any = TorchBackend(eager=True)
        self._layers = MuMoE
        self._torch = torch
        self._generator = torch.Generator().manual_seed(0)

    def array(self, *shape: int) -> Any:
        return self._torch.randn(shape, generator=self._generator)

    def layer(self, *sizes: Any, **options: Any) -> Any:
        return self._layers(*sizes, **options)

    def forward(self, layer: Any, x: Any) -> Callable[[], object]:
        def call() -> object:
            with self._torch.no_grad():
                return layer(x)

        return call

    def train(self, layer: Any, x: Any, cotangent: Any) -> Callable[[], object]:
        x = x.requires_grad_()

        def call() -> object:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            output = layer(x)
            output.backward(cotangent)
            return output

        return call


_SMALLEST = (4, 4, 4)
_BENCHES: dict[str, Callable[[], Any]] = {"numpy": _NumpyBench, "torch": _TorchBench}
LIBRARIES = tuple(_BENCHES)


def _checks(roofline: Roofline, library: str) -> list[dict[str, Any]]:
    """Predicted and measured times of real layers."""
    found = []
    bench = _BENCHES[library]()
    for name, label in (("cp", "CP"), ("tensor_ring", "tensor ring")):
        rank = 288 if name == "cp" else (4, 4, 94)
        layer = bench.layer(768, 768, experts=512, factorization=name, rank=rank)
        for batch in (64, 1024):
            x = bench.array(batch, 768)
            measured = _best(bench.forward(layer, x), 1, perf_counter, _SECONDS)
            predicted = roofline.time(layer.cost(batch))
            found.append(
                {"layer": label, "batch": batch, "predicted": predicted, "measured": measured}
            )
    return found


def _touch(content: bytes) -> None:
    # straight from the system: when libraries return memory to it depends on what ran before
    with mmap(-1, len(content)) as memory:
        memory[:] = content


def _best(run: Callable[[], object], repeats: int, clock: Clock, seconds: float) -> float:
    """Seconds of the fastest run; ``repeats`` runs are timed together if one is too short."""
    run()
    best = float("inf")
    end = perf_counter() + seconds
    count = 0
    while count < 3 or perf_counter() < end:
        start = clock()
        for _ in range(repeats):
            run()
        best = min(best, (clock() - start) / repeats)
        count += 1
    return best
