"""Speed of the entmax-1.5 gate on NumPy, as ratios taken in one run.

For each number of experts and tokens, in float32: the gate (layer norm and entmax-1.5) against
the product that makes its logits, and entmax by sorting against ours. Repeats are interleaved, so
that a busy machine slows all of them alike; the ratios are of the medians.

    python benchmarks/gates.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from tensormoe.gates import Gate, activate, entmax

Array = npt.NDArray[np.float32]
FEATURES = 768


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


def interleaved(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each call."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            taken.append(perf_counter() - start)
    return [median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each line")
    seconds = parser.parse_args().seconds
    rng = np.random.default_rng(0)
    print(f"{'experts':>7} {'batch':>5} {'gate µs':>9} {'gate/product':>12} {'sorted/ours':>11}")
    for experts in (128, 1024, 8192):
        projection = rng.standard_normal((FEATURES, experts), dtype=np.float32)
        for batch in (1, 64, 1024):
            inputs = rng.standard_normal((batch, FEATURES), dtype=np.float32)
            logits = rng.standard_normal((batch, experts), dtype=np.float32)

            def gate(logits: Array = logits) -> object:
                return activate(Gate(), logits)

            def product(inputs: Array = inputs, projection: Array = projection) -> object:
                return inputs @ projection

            def ours(logits: Array = logits) -> Array:
                weights: Array = entmax(logits)
                return weights

            def by_sorting(logits: Array = logits) -> Array:
                return sorted_entmax15(logits)

            if not np.allclose(ours(), by_sorting(), atol=1e-3):
                raise SystemExit("the two entmax implementations disagree")
            times = interleaved([gate, product, ours, by_sorting], seconds)
            print(
                f"{experts:7} {batch:5} {times[0] * 1e6:9.0f} {times[0] / times[1]:12.2f} "
                f"{times[3] / times[2]:11.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
