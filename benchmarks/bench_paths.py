"""The planner's paths against those of other rules, in FLOPs and in time.

Random layers of every factorization: one to three levels of experts, 16 to 1024 features, batches
of 1 to 2048. Rules: the planner's with other weights of written entries; without plans that
multiply coefficients out first; and opt_einsum's exact search for the fewest FLOPs.
Programs that differ run in turns on one thread: forward calls without the gate, medians of
processor time.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/bench_paths.py
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from math import exp, log
from time import perf_counter, process_time
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before a library reads it

import numpy as np  # noqa: E402
from _paths import (  # noqa: E402
    Layer,
    apart,
    fewest_flops,
    flops,
    layers,
    operands,
    path_of,
    planned,
    weight,
)
from _shared import interleaved, settings  # noqa: E402

from tensormoe.execution import execute  # noqa: E402
from tensormoe.planning import Program  # noqa: E402
from tensormoe.planning._path import WRITE_WEIGHT  # noqa: E402

OURS, FEWEST = "the planner's", "fewest FLOPs"
RULES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    **{f"weight {each}": partial(weight, each) for each in (0, 8, 16, 32, 64, 128)},
    "not joined": apart,
    FEWEST: fewest_flops,
}
RULES.pop(f"weight {WRITE_WEIGHT}")

Programs = dict[str, Program]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--backends", default="numpy,torch", help="with commas between")
    parser.add_argument("--seconds", type=float, default=0.05, help="time for each program")
    parser.add_argument("--most", type=float, default=100.0, help="seconds for each backend")
    options = parser.parse_args()
    print(f"{datetime.now(UTC):%d %B %Y}; {settings()}; one thread", flush=True)
    found = [(layer, programs(layer)) for layer in layers(options.layers)]
    print(
        f"\n{'FLOPs ÷ the planner’s':24} {'paths differ':>12} {'mean':>6} {'least':>6} {'most':>6}"
    )
    for rule in RULES:
        ratios = [flops(p[rule], batch) / flops(p[OURS], batch) for (_, batch), p in found]
        differ = sum(path_of(p[rule]) != path_of(p[OURS]) for _, p in found)
        print(f"{rule:24} {differ:12} {row(ratios)}", flush=True)
    # in any order, so that what is measured is a sample where time runs out
    random.Random(0).shuffle(found)
    for backend in options.backends.split(","):
        measured = timed(found, backend, options.seconds, options.most)
        print(
            f"\n{f'{backend}: time ÷ the planner’s':24} {'layers':>12} {'mean':>6} {'least':>6} "
            f"{'most':>6} {'> 1.2':>6} {'< 0.83':>6}"
        )
        for rule in RULES:
            ratios = [times[rule] / times[OURS] for _, times in measured if rule in times]
            slow, fast = (
                sum(each > 1.2 for each in ratios),
                sum(each < 1 / 1.2 for each in ratios),
            )
            print(f"{rule:24} {len(ratios):12} {row(ratios)} {slow:6} {fast:6}")
        named = [each for each in measured if FEWEST in each[1]]
        named.sort(key=lambda each: each[1][FEWEST] / each[1][OURS])
        print(f"{backend}: fewest FLOPs, the five fastest and the five slowest")
        for (spec, batch), times in [*named[:5], *named[5:][-5:]]:
            ratio, ours = times[FEWEST] / times[OURS], times[OURS] * 1e6
            print(f"{ratio:6.2f} of {ours:6.0f} µs, batch {batch:4}: {spec}", flush=True)


def programs(layer: Layer) -> Programs:
    """The program of every rule."""
    made = {OURS: planned(layer)}
    for rule, planning in RULES.items():
        with planning():
            made[rule] = planned(layer)
    return made


def timed(
    found: Sequence[tuple[Layer, Programs]], name: str, seconds: float, most: float
) -> list[tuple[Layer, dict[str, float]]]:
    """Seconds of ours and of every rule whose path is another, layer by layer."""
    backend, made = library(name)
    rng, end, rows = np.random.default_rng(0), perf_counter() + most, []
    for count, (layer, each) in enumerate(found):
        if perf_counter() > end:
            print(f"{name}: after {count} of {len(found)} layers, time is up", file=sys.stderr)
            break
        paths = {rule: path_of(program) for rule, program in each.items()}
        distinct = {path: each[rule] for rule, path in paths.items()}
        if len(distinct) == 1:
            continue
        arrays = [made(array) for array in operands(each[OURS], layer[1], rng)]
        calls = [
            lambda program=program, arrays=arrays: execute(program, list(arrays), backend)
            for program in distinct.values()
        ]
        medians = interleaved(calls, seconds * len(calls), process_time)
        by_path = dict(zip(distinct, medians, strict=True))
        others = {r: by_path[path] for r, path in paths.items() if path != paths[OURS]}
        rows.append((layer, {OURS: by_path[paths[OURS]], **others}))
    return rows


def library(name: str) -> tuple[Any, Callable[[Any], Any]]:
    """A backend that runs eagerly, and how it gets arrays."""
    if name == "numpy":
        from tensormoe_numpy import NumpyBackend

        return NumpyBackend(), np.asarray
    import torch

    from tensormoe_torch._adapter import EAGER

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}")
    return EAGER, torch.from_numpy


def row(ratios: Sequence[float]) -> str:
    """Geometric mean, smallest and largest."""
    mean = exp(sum(map(log, ratios)) / max(len(ratios), 1))
    return f"{mean:6.3f} {min(ratios, default=1):6.2f} {max(ratios, default=1):6.2f}"


if __name__ == "__main__":
    main()
