"""``tensormoe calibrate``: this machine's roofline, from times of layers of one library."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from tensormoe._extras import require
from tensormoe._format import format_bytes, format_count, format_time
from tensormoe._validation import choice
from tensormoe.cli._benches import BENCHES, Bench, Experts
from tensormoe.cli._console import make_console, make_table, print_json
from tensormoe.cli._profile import THIS_MACHINE, save_profile
from tensormoe.errors import SpecError
from tensormoe.factorizations import (
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
from tensormoe.planning import Cost, Roofline, fit_roofline

__all__ = [
    "LIBRARIES",
    "SAMPLES",
    "Samples",
    "measure_roofline",
    "measure_samples",
    "run_calibrate",
]

LIBRARIES = tuple(BENCHES)
Clock = Callable[[], float]


@dataclass(frozen=True)
class Samples:
    """Calls of one layer whose times are measured.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        experts: one size per level.
        factorization: of the experts.
        batches: numbers of inputs, forward and in training.
    """

    in_features: int
    out_features: int
    experts: Experts
    factorization: Factorization
    batches: tuple[int, ...] = (1, 24, 400)

    @property
    def layer(self) -> tuple[int, int, Experts, Factorization]:
        """Sizes, experts and factorization."""
        return self.in_features, self.out_features, self.experts, self.factorization


SAMPLES = (
    Samples(256, 256, 64, CP(128)),
    Samples(512, 128, 16, CP(384), (1, 5, 400)),
    Samples(128, 512, (8, 16), CP(64), (2, 24, 400)),
    Samples(320, 448, 640, CP(96), (1, 400)),
    Samples(512, 512, 32, CP(512), (1, 1600)),
    Samples(256, 192, 48, TensorRing((3, 5, 32)), (1, 5, 400)),
    Samples(192, 320, (8, 12), TensorRing((3, 3, 4, 48))),
    Samples(320, 256, 96, TensorTrain((8, 48)), (1, 5, 400)),
    Samples(192, 256, (12, 8), TensorTrain((4, 8, 40)), (1, 400)),
    Samples(256, 256, 40, Tucker((8, 32, 48))),
    Samples(320, 192, (6, 16), Tucker((4, 6, 32, 48)), (1, 5, 400)),
    Samples(512, 448, 256, Hadamard(), (1, 5, 400)),
    Samples(192, 160, 64, SharedBasis((3, 24))),
    Samples(128, 192, (8, 12), SharedBasis((3, 16)), (1, 24, 800)),
    Samples(256, 320, 128, BaseDelta(3), (1, 5, 1200)),
    Samples(192, 256, 48, SharedDelta(5)),
    Samples(160, 128, (8, 12), SharedDelta(4), (1, 24, 800)),
    Samples(128, 192, 24, Dense()),
    # more than the last cache of most machines holds
    Samples(512, 448, 96, Dense(), (1, 8)),
    Samples(320, 256, 352, SharedBasis((4, 40)), (1,)),
    Samples(288, 224, 24, SharedDelta(3), (48, 1400)),
)
"""Every factorization with one level of experts and with two, small batches and large ones."""

# other programs may run: the fastest of many short runs is what the machine can do
_SECONDS = 0.06
_LEAST_RUNS = 3
# layers that are measured besides, which no profile was fitted to
_CHECKED = (
    Samples(768, 768, 512, CP(288), (64, 1024)),
    Samples(768, 768, 512, TensorRing((4, 4, 94)), (64, 1024)),
)


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Measure, show, and keep the profile unless told otherwise."""
    library = choice(arguments.backend, LIBRARIES, "--backend", SpecError)
    require("tensormoe calibrate", (library,), library)
    if not arguments.json:
        make_console()  # before seconds of work, not after
    bench = BENCHES[library]()
    measured = list(measure_samples(bench, SAMPLES))
    roofline = _fitted(library, bench, measured)
    checks = list(_checks(bench, roofline))
    path = None if arguments.dry_run else save_profile(library, roofline)
    within = _within([time / roofline.time(cost) for cost, time in measured])
    if arguments.json:
        print_json(
            {
                "command": "calibrate",
                "backend": library,
                "roofline": roofline.to_dict(),
                "samples": len(measured),
                "within_1.5": within,
                "checks": checks,
                "path": None if path is None else str(path),
            }
        )
        return
    console = make_console()
    console.print()
    console.print(_table(roofline, library))
    console.print()
    check = make_table("a layer, 768 → 768, 512 experts", "batch", "predicted", "measured")
    for each in checks:
        check.add_row(
            each["layer"] + (", training" if each["training"] else ""),
            str(each["batch"]),
            format_time(each["predicted"]),
            format_time(each["measured"]),
        )
    console.print(check)
    console.print()
    console.print(
        f"{within:.0%} of the {len(measured)} times that the profile was fitted to are within a "
        "factor of 1.5 of its predictions."
    )
    if path is None:
        console.print("A dry run: nothing was kept.")
    else:
        console.print(f"Kept in {path}", soft_wrap=True)
        console.print("tensormoe rank and tensormoe plan now predict times for this machine.")


def measure_roofline(
    library: str = "numpy",
    clock: Clock = perf_counter,
    seconds: float | None = None,
    samples: Iterable[Samples] = SAMPLES,
) -> Roofline:
    """The profile of a library on this machine, fitted to times of its layers.

    Args:
        library: "numpy", "torch" or "jax".
        clock: gives seconds; of the processor, for figures that other programs disturb less.
        seconds: for each of the calls.
        samples: the layers and batches.
    """
    bench = BENCHES[library]()
    return _fitted(library, bench, list(measure_samples(bench, samples, clock, seconds)))


def measure_samples(
    bench: Bench,
    samples: Iterable[Samples],
    clock: Clock = perf_counter,
    seconds: float | None = None,
) -> Iterable[tuple[Cost, float]]:
    """Costs and seconds of calls, forward and in training."""
    for each in samples:
        layer = bench.layer(*each.layer)
        for batch in each.batches:
            for training in (False, True):
                call = layer.call(batch, training)
                time = _best(call, clock, _SECONDS if seconds is None else seconds)
                yield layer.cost(batch, training), time


def _fitted(library: str, bench: Bench, measured: list[tuple[Cost, float]]) -> Roofline:
    threads = bench.threads
    name = f"{THIS_MACHINE}, {library}, {threads} thread{'s' if threads > 1 else ''}"
    return fit_roofline(name, measured, threads)


def _checks(bench: Bench, roofline: Roofline) -> Iterable[dict[str, Any]]:
    """Predicted and measured times of layers that the profile was not fitted to."""
    for each in _CHECKED:
        label = "CP" if isinstance(each.factorization, CP) else "tensor ring"
        calls = [(batch, training) for batch in each.batches for training in (False, True)]
        for (batch, training), (cost, time) in zip(
            calls, measure_samples(bench, (each,)), strict=True
        ):
            yield {
                "layer": label,
                "batch": batch,
                "training": training,
                "predicted": roofline.time(cost),
                "measured": time,
            }


def _table(roofline: Roofline, library: str) -> Any:
    """The profile in words."""
    table = make_table(f"this machine, {library}, float32", "measured")
    table.add_row("threads", str(roofline.threads))
    table.add_row("matrix products", f"{format_count(roofline.matmul_rate)}FLOP/s")
    if roofline.padding is not None:
        rows, summed, columns = (f"{each:.0f}" for each in roofline.padding)
        sides = f"{rows} rows, {summed} summed, {columns} columns"
        table.add_row("sides of a product are longer by", sides)
    table.add_row("elementwise work of gates", f"{format_count(roofline.elementwise_rate)}FLOP/s")
    table.add_row("memory traffic", f"{format_bytes(roofline.bandwidth)}/s")
    for name, size, per in (
        ("after a cache of", roofline.cache, ""),
        ("results in new memory", roofline.fresh_bandwidth, "/s"),
    ):
        if size is not None:
            table.add_row(name, format_bytes(size) + per)
    for name, seconds in (
        ("a call", roofline.call_overhead),
        ("starting a step", roofline.overhead),
        ("starting one of a backward pass", roofline.backward_overhead),
        ("a further operation", roofline.operation_overhead),
        ("one product of many", roofline.product_overhead),
        ("a run through memory", roofline.run_overhead),
    ):
        if seconds is not None:
            table.add_row(name, format_time(seconds))
    return table


def _within(ratios: list[float]) -> float:
    """Share of ratios between 1/1.5 and 1.5."""
    return sum(1 / 1.5 <= ratio <= 1.5 for ratio in ratios) / len(ratios)


def _best(run: Callable[[], object], clock: Clock, seconds: float) -> float:
    """Seconds of the fastest run, the first one left out."""
    run()
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < _LEAST_RUNS or perf_counter() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)
