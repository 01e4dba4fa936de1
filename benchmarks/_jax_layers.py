"""The layer on JAX, its products, and the direct formulation, for several benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe import Gate, LayerSpec, select_rank
from tensormoe.factorizations import resolve_factorization
from tensormoe.functional import LayerConfig
from tensormoe_jax import JaxBackend, apply, initialize

Arrays = dict[str, Array]
Operands = list[tuple[Array, Array]]


def trained(
    name: str, experts: int, features: int, dtype: str = "float32"
) -> tuple[LayerConfig, Arrays, Any]:
    """A layer within the budget whose gate tells inputs apart, as after training, and its rank."""
    bonds = None if name == "cp" else (4, 4, None)
    rank = select_rank(name, features, features, experts, bonds=bonds)
    spec = LayerSpec(features, features, experts, resolve_factorization(name, rank))
    config = LayerConfig(spec, Gate.paper())
    parameters = initialize(config, jax.random.key(0), dtype=dtype, gate_dtype=dtype)
    shape = parameters["gate.projection_0"].shape
    drawn = jax.random.normal(jax.random.key(1), shape) * features**-0.5
    parameters["gate.projection_0"] = drawn.astype(dtype)
    return config, parameters, rank


def products_of(
    config: LayerConfig, parameters: Arrays, x: Array
) -> tuple[Callable[[Operands], Any], Operands]:
    """The matrix products of one call, jitted together, and the operands it had."""
    run = JaxBackend.matmul

    # compiled as a whole: operation by operation, XLA would compile each of them
    @jax.jit
    def recorded(parameters: Arrays, x: Array) -> Operands:
        operands: Operands = []

        def record(self: JaxBackend, left: Array, right: Array) -> Array:
            operands.append((left, right))
            return run(self, left, right)

        JaxBackend.matmul = record  # type: ignore[method-assign]
        try:
            apply(config, parameters, x)
        finally:
            JaxBackend.matmul = run  # type: ignore[method-assign]
        return operands

    operands = recorded(parameters, x)
    return jax.jit(lambda pairs: [jnp.matmul(*pair) for pair in pairs]), operands


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
    logits = (x @ parameters["gate.projection_0"]).astype(jnp.float32)
    weights = sorted_entmax15(jax.nn.standardize(logits, epsilon=1e-5)).astype(x.dtype)
    extended = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=-1)
    experts, output = parameters["factors.expert_0"], parameters["factors.output"]
    return jnp.einsum(equation, weights, experts, extended, joined, output)
