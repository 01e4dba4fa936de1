"""Speed of the layer on NumPy, as ratios taken in one run.

768 → 768, float32, at the parameter budget of the linear layer (the gate not counted), gate
included in every time:

- ``layer / products``: against the plan's matrix products alone, the gate's projection among them,
  on arrays that are there already;
- ``einsum / layer``: the direct formulation (ones joined to the input, one ``np.einsum`` with
  ``optimize=True``, entmax by sorting) against the layer.

    python benchmarks/bench_numpy_forward.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from _shared import Array, interleaved, settings, sorted_entmax15

from tensormoe import CP, Gate, LayerSpec, select_rank
from tensormoe_numpy import MuMoE, NumpyBackend

FEATURES = 768


class Recorder(NumpyBackend):
    """NumPy, noting the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, Any]] = []

    def matmul(self, left: Any, right: Any, /) -> Any:
        self.products.append((left, right))
        return super().matmul(left, right)


def products_of(layer: MuMoE, x: Array) -> Callable[[], None]:
    """The matrix products of one call, on the operands that the call had."""
    recorder = Recorder()
    recorded = MuMoE.restore(layer.config, layer.parameters)
    recorded.backend = recorder  # type: ignore[misc]
    recorded(x)
    products = list(recorder.products)

    def run() -> None:
        for left, right in products:
            np.matmul(left, right)

    return run


def direct(layer: MuMoE, x: Array) -> Callable[[], Array]:
    """The formulation of the paper's appendix, written with einsum."""
    parameters = layer.parameters
    gate = parameters["gate.projection_0"]
    expert, output = parameters["factors.expert_0"], parameters["factors.output"]
    joined = np.concatenate([parameters["factors.input"], parameters["factors.bias"][None]], axis=0)
    cp = isinstance(layer.spec.factorization, CP)
    equation = "bn,nr,bi,ir,or->bo" if cp else "bn,npq,bi,iqs,osp->bo"

    def run() -> Array:
        logits = x @ gate
        centered = logits - logits.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centered * centered).mean(axis=-1, keepdims=True) + 1e-5)
        weights = sorted_entmax15(centered / scale)
        ones = np.ones((len(x), 1), dtype=x.dtype)
        extended = np.concatenate([x, ones], axis=1)
        operands = (weights, expert, extended, joined, output)
        result: Array = np.einsum(equation, *operands, optimize=True)
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each line")
    seconds = parser.parse_args().seconds
    print(f"NumPy forward, {FEATURES} → {FEATURES}, float32, gate included; {settings()}")
    head = f"{'layer':>12} {'rank':>12} {'experts':>7} {'batch':>5} {'layer µs':>9}"
    print(f"{head} {'layer/products':>14} {'einsum/layer':>12}")
    rng = np.random.default_rng(0)
    for name, bonds in (("cp", None), ("tensor_ring", (4, 4, None))):
        for experts in (128, 1024):
            rank = select_rank(name, FEATURES, FEATURES, experts, bonds=bonds)
            layer = MuMoE(FEATURES, FEATURES, experts, name, rank=rank, gate=Gate.paper(), seed=0)
            assert isinstance(layer.spec, LayerSpec)
            projection = layer.parameters["gate.projection_0"]
            projection += rng.standard_normal(projection.shape, dtype="float32") / FEATURES**0.5
            for batch in (1, 64, 1024):
                x = rng.standard_normal((batch, FEATURES), dtype=np.float32)
                by_einsum = direct(layer, x)
                if not np.allclose(layer(x), by_einsum(), atol=1e-4):
                    raise SystemExit("the layer and the direct formulation disagree")
                calls = [lambda layer=layer, x=x: layer(x), products_of(layer, x), by_einsum]
                ours, alone, einsum = interleaved(calls, seconds)
                print(
                    f"{name:>12} {rank!s:>12} {experts:7} {batch:5} {ours * 1e6:9.0f} "
                    f"{ours / alone:14.2f} {einsum / ours:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
