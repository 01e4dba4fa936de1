"""Time of everything that happens before arrays: import, planning, look-ups, rank selection.

Caches are emptied before every cold figure; modules are loaded. The smallest of the repeats is
printed, as other programs can only make it larger.

    python benchmarks/bench_planning.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from timeit import timeit

from _shared import settings

from tensormoe import (
    CP,
    Budget,
    Factorization,
    LayerSpec,
    TensorRing,
    TensorTrain,
    Tucker,
    select_rank,
)
from tensormoe.planning import plan_layer, plan_regimes

LEVELS = (16, 8, 4)
RANKS: tuple[Factorization, ...] = (
    CP(256),
    TensorRing((4, 4, 4, 4, 90)),
    TensorTrain((8, 8, 8, 200)),
    Tucker((8, 4, 4, 64, 64)),
)
IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def smallest(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of the fastest of several cold calls."""
    taken = []
    for _ in range(repeats):
        plan_regimes.cache_clear()
        plan_layer.cache_clear()
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return min(taken) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"before any array; {settings()}")
    for statement, bound in (
        ("import tensormoe", "(bound 100)"),
        ("from tensormoe import CP, LayerSpec", "(bound: half of NumPy's)"),
        ("import numpy", ""),
    ):
        command = [sys.executable, "-c", IMPORT.format(statement)]
        tries = range(repeats + 1)  # the first writes bytecode
        runs = [subprocess.run(command, capture_output=True, check=True) for _ in tries]
        print(f"{statement:40}{min(float(run.stdout) for run in runs) * 1e3:22.1f} ms  {bound}")
    for factorization in RANKS:
        spec = LayerSpec(768, 768, LEVELS, factorization)
        cold = smallest(lambda spec=spec: spec.plan(1024), repeats)
        print(f"plan {factorization!r:45} cold {cold:6.1f} ms  (bound 20)")
    cached = timeit(lambda: spec.plan(1024), number=20_000) / 20_000 * 1e6
    print(f"plan, cached{cached:50.2f} µs  (bound 5)")
    budgets: tuple[tuple[str, Budget | str], ...] = (
        ("parameters", "linear"),
        ("FLOPs", Budget(flops=2 * 1024 * 768 * 768)),
        ("memory", Budget(memory=16 * 2**20)),
        ("time", Budget(time=20e-3)),
    )
    for kind, budget in budgets:
        for name in ("cp", "tensor_ring", "tensor_train", "tucker"):
            for experts in (1024, (32, 32), LEVELS):

                def select(
                    name: str = name,
                    experts: int | tuple[int, ...] = experts,
                    budget: Budget | str = budget,
                ) -> object:
                    return select_rank(name, 768, 768, experts, budget=budget, gate=None)

                label = f"select_rank {name} {experts} by {kind}"
                # all but parameters need plans
                bound = 50 if kind == "parameters" else 1000
                taken = smallest(select, repeats)
                print(f"{label:58} {taken:6.1f} ms  (bound {bound})  {select()}", flush=True)


if __name__ == "__main__":
    main()
