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
from _jax_layers import Arrays, direct, products_of, trained
from _shared import Call, interleaved
from jax import Array

from tensormoe import CP
from tensormoe.functional import LayerConfig
from tensormoe_jax import apply, coefficients

FEATURES = 768


def products(run: Callable[..., Any], operands: Any) -> Call:
    return lambda: jax.block_until_ready(run(operands))


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
        products(*products_of(config, parameters, x)),
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
        (name, experts, *trained(name, experts, FEATURES))
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
