"""Speed and compile time of the layer on JAX, as ratios taken in one run.

768 → 768 on the CPU, float32, jitted, at the parameter budget of the linear layer (the gate not
counted), gate included in every time of a call:

- ``layer/products``: one forward call against the plan's matrix products alone, the gate's
  projection among them, jitted together on operands that are there already;
- ``direct/layer``: the direct formulation (ones joined to the input, one ``jnp.einsum``, layer norm
  and an entmax that sorts) against the layer.

Compile times are medians of tracing, lowering and compiling anew, against those of two products
with a bias each, ``(x A + a) B + b``, as two linear layers have: for the experts of given
coefficients, which take the place of such a layer, and for the whole layer with its gate; beside
them a softmax over as many logits, layer norm before it, for scale.

    python benchmarks/bench_jax.py
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _shared import interleaved
from jax import Array

from tensormoe import CP, Gate, LayerSpec, select_rank
from tensormoe.factorizations import resolve_factorization
from tensormoe.functional import LayerConfig
from tensormoe_jax import JaxBackend, apply, coefficients, initialize

FEATURES = 768
Call = Callable[[], object]
Arrays = dict[str, Array]


def trained(name: str, experts: int) -> tuple[LayerConfig, Arrays, Any]:
    """A layer within the budget whose gate tells inputs apart, as after training, and its rank."""
    bonds = None if name == "cp" else (4, 4, None)
    rank = select_rank(name, FEATURES, FEATURES, experts, bonds=bonds)
    spec = LayerSpec(FEATURES, FEATURES, experts, resolve_factorization(name, rank))
    config = LayerConfig(spec, Gate.paper())
    parameters = initialize(config, jax.random.key(0))
    shape = parameters["gate.projection_0"].shape
    parameters["gate.projection_0"] = jax.random.normal(jax.random.key(1), shape) * FEATURES**-0.5
    return config, parameters, rank


def products_of(config: LayerConfig, parameters: Arrays, x: Array) -> Call:
    """The matrix products of one call, jitted together, on the operands it had."""
    operands: list[tuple[Array, Array]] = []
    run = JaxBackend.matmul

    def record(self: JaxBackend, left: Array, right: Array) -> Array:
        operands.append((left, right))
        return run(self, left, right)

    JaxBackend.matmul = record  # type: ignore[method-assign]
    try:
        apply(config, parameters, x)
    finally:
        JaxBackend.matmul = run  # type: ignore[method-assign]
    compiled = jax.jit(lambda pairs: [jnp.matmul(*pair) for pair in pairs])
    return lambda: jax.block_until_ready(compiled(operands))


def sorted_entmax15(logits: Array) -> Array:
    """Entmax-1.5 by sorting (Peters, Niculae & Martins 2019, algorithm 2)."""
    z = (logits - jnp.max(logits, axis=-1, keepdims=True)) / 2
    down = -jnp.sort(-z, axis=-1)
    count = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = jnp.cumsum(down, axis=-1) / count
    square = jnp.cumsum(down * down, axis=-1) / count
    inside = jnp.maximum((1 - count * (square - mean * mean)) / count, 0)
    tau = mean - jnp.sqrt(inside)
    support = jnp.sum(tau <= down, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(tau, support - 1, axis=-1)
    return jnp.maximum(z - threshold, 0) ** 2


def direct(cp: bool, parameters: Arrays, x: Array) -> Array:
    """The formulation of the paper's appendix, written with einsum."""
    equation = "bn,nr,bi,ir,or->bo" if cp else "bn,npq,bi,iqs,osp->bo"
    joined = jnp.concatenate([parameters["factors.input"], parameters["factors.bias"][None]])
    weights = sorted_entmax15(jax.nn.standardize(x @ parameters["gate.projection_0"], epsilon=1e-5))
    extended = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=-1)
    experts, output = parameters["factors.expert_0"], parameters["factors.output"]
    return jnp.einsum(equation, weights, experts, extended, joined, output)


def compare(
    config: LayerConfig, parameters: Arrays, batch: int, seconds: float
) -> tuple[float, float, float]:
    """Microseconds of a call, and the two ratios."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, FEATURES)), "float32")
    ours = jax.jit(partial(apply, config))
    einsum = jax.jit(partial(direct, isinstance(config.spec.factorization, CP)))
    if not jnp.allclose(ours(parameters, x), einsum(parameters, x), atol=1e-4):
        raise SystemExit("the layer and the direct formulation disagree")
    calls: list[Call] = [
        lambda: jax.block_until_ready(ours(parameters, x)),
        products_of(config, parameters, x),
        lambda: jax.block_until_ready(einsum(parameters, x)),
    ]
    layer, plain, other = interleaved(calls, seconds)
    return layer * 1e6, layer / plain, other / layer


def compiling(function: Callable[..., Any], *arguments: Any, repeats: int = 9) -> float:
    """Median milliseconds to trace, lower and compile anew."""
    taken = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(lambda *given: function(*given)).lower(*arguments).compile()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def plain(x: Array, first: Array, bias: Array, second: Array, last: Array) -> Array:
    return (x @ first + bias) @ second + last


def compile_times(config: LayerConfig, parameters: Arrays) -> tuple[float, float, float, float]:
    """Milliseconds: two products, the experts, the whole layer, a softmax gate alone."""
    x = jnp.ones((64, FEATURES))
    wide = config.spec.shapes["output"]
    hidden = int(np.prod(wide)) // FEATURES
    given = (jnp.ones((FEATURES, hidden)), jnp.ones(hidden), jnp.ones((hidden, FEATURES)))
    made, _ = coefficients(config, parameters, x)
    logits = jnp.ones((64, *config.spec.experts))
    return (
        compiling(plain, x, *given, jnp.ones(FEATURES)),
        compiling(lambda p, x, a: apply(config, p, x, a), parameters, x, list(made)),
        compiling(partial(apply, config), parameters, x),
        compiling(lambda z: jax.nn.softmax(jax.nn.standardize(z)), logits),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison")
    options = parser.parse_args()
    print(
        f"JAX, {FEATURES} → {FEATURES}, float32, jitted, gate included; JAX {jax.__version__} on "
        f"{jax.devices()[0].platform}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )
    head = f"{'layer':>12} {'rank':>12} {'experts':>7}"
    print(f"{head} {'batch':>5} {'layer µs':>9} layer/products direct/layer", flush=True)
    layers = [
        (name, experts, *trained(name, experts))
        for experts in (128, 1024)
        for name in ("cp", "tensor_ring")
    ]
    for name, experts, config, parameters, rank in layers:
        for batch in (64, 1024):
            row = compare(config, parameters, batch, options.seconds)
            print(
                f"{name:>12} {rank!s:>12} {experts:7} {batch:5} {row[0]:9.0f} {row[1]:14.2f} "
                f"{row[2]:12.2f}",
                flush=True,
            )
    print(f"\n{head} products ms   experts/products layer/products softmax/products", flush=True)
    for name, experts, config, parameters, rank in layers:
        base, *others = compile_times(config, parameters)
        ratios = " ".join(f"{each / base:16.2f}" for each in others)
        print(f"{name:>12} {rank!s:>12} {experts:7} {base:11.0f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
