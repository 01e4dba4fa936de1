"""Interventions on all experts at once, against a forward pass for each of them.

    python benchmarks/bench_analysis.py

Prints the time of :func:`tensormoe.analysis.interventions` in forward passes of all inputs, next to
the loop that silences one expert after the other (timed for some, and extrapolated). NumPy, one
thread, float32.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from time import process_time

import numpy as np

from tensormoe._format import format_experts
from tensormoe.analysis import interventions
from tensormoe.editing import silence_experts
from tensormoe_numpy import MuMoE

INPUTS, FEATURES = 10_000, 384
SOME = 8


def timed(call: object, repeats: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        start = process_time()
        call()  # type: ignore[operator]
        best = min(best, process_time() - start)
    return best


def measure(classes: int, experts: int | tuple[int, ...], kind: str, rank: object) -> None:
    """Print the row of one layer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((INPUTS, FEATURES)).astype("float32")
    labels = rng.integers(0, classes, INPUTS)
    layer = MuMoE(FEATURES, classes, experts, kind, rank=rank, seed=0)  # type: ignore[arg-type]
    for name, array in layer.parameters.items():
        if name.startswith("gate."):
            layer.parameters[name][...] = rng.standard_normal(array.shape) * FEATURES**-0.5
    config, count = layer.config, layer.spec.experts[0]

    def loop() -> None:
        for expert in range(SOME):
            silent = silence_experts(config, layer.parameters, expert)
            MuMoE.restore(config, silent)(x).argmax(1)

    forward = timed(lambda: layer(x))
    found = timed(lambda: interventions(config, layer.parameters, x, labels), 1)
    each = timed(loop, 1) / SOME * count
    print(
        f"| {kind}, {FEATURES} → {classes} | {format_experts(layer.spec.experts)} | "
        f"{found / forward:.1f} | {3 * count / 32:.0f} | {each / forward:.0f} | "
        f"{forward * 1e3:.0f} ms |"
    )


def main() -> None:
    """Print one row per layer."""
    print(f"{INPUTS:,} inputs of {FEATURES} features; times in forward passes of all inputs")
    print("| layer | experts | all experts at once | allowed: 3 per 32 experts | loop | forward |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    measure(10, 1024, "cp", 64)
    measure(45, 1024, "cp", 64)
    measure(10, 1024, "tensor_ring", (4, 4, 16))
    measure(10, 64, "cp", 64)


if __name__ == "__main__":
    main()
