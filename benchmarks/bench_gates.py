"""Speed of the entmax-1.5 gate on NumPy, as ratios taken in one run.

For each number of experts and tokens, in float32: the gate (layer norm and entmax-1.5) against
the product that makes its logits, and entmax by sorting against ours. Repeats are interleaved, so
that a busy machine slows all of them alike; the ratios are of the medians.

    python benchmarks/bench_gates.py
"""

from __future__ import annotations

import argparse

import numpy as np
from _shared import Array, interleaved, settings, sorted_entmax15

from tensormoe.gates import Gate, activate, entmax

FEATURES = 768


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each line")
    seconds = parser.parse_args().seconds
    rng = np.random.default_rng(0)
    print(f"gates, float32, {FEATURES} features; {settings()}")
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
