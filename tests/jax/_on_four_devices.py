"""Run by ``test_sharding.py`` in a process with four devices: every check, and its outcome."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.functional import LayerConfig, Options
from tensormoe.gates import TopK
from tensormoe_jax import apply, initial_buffers, initialize, nnx, train

P = PartitionSpec
GATES = {
    "entmax": Gate(),
    "sparsemax": Gate("sparsemax"),
    "alpha 3": Gate(alpha=3.0),
    "top-k": Gate("top_k", k=2),
}
X = jax.random.normal(jax.random.key(2), (8, 12))
CHECKS: dict[str, Callable[[], None]] = {}


def check(name: str, *arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[" ".join([name, *arguments])] = lambda: function(*arguments)
        return function

    return add


def mesh(explicit: bool, *sizes: int) -> Any:
    names = ("data", "model")[: len(sizes)]
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def same(found: Any, want: Any) -> None:
    found, want = jax.device_get((found, want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, want)


def with_gate(config: LayerConfig) -> dict[str, jax.Array]:
    parameters = initialize(config, jax.random.key(0))
    for level, count in enumerate(config.spec.experts):
        drawn = jax.random.normal(jax.random.key(5 + level), (12, count))
        parameters[f"gate.projection_{level}"] = drawn
    return parameters


CONFIG = LayerConfig(LayerSpec(12, 5, 6, CP(4)), Gate())


def slopes(config: LayerConfig) -> Callable[..., Any]:
    """The gradients of a loss by parameters and input, and the output."""

    def loss(parameters: Any, x: jax.Array) -> Any:
        output = apply(config, parameters, x)
        return (output**2).sum(), output

    return jax.grad(loss, (0, 1), has_aux=True)


def sharded(where: Any, spec: Any, function: Any, replicated: Any, *arrays: Any) -> Any:
    with jax.set_mesh(where):
        split = jax.device_put(arrays, NamedSharding(where, spec))
        return jax.jit(function)(jax.device_put(replicated, NamedSharding(where, P())), *split)


for each in ("entmax", "alpha 3"):

    @check("shard_map", each)
    def _(name: str) -> None:
        config = LayerConfig(LayerSpec(12, 5, 6, TensorRing(2)), GATES[name])
        parameters, where = with_gate(config), mesh(False, 4)

        def total(parameters: Any, x: jax.Array) -> Any:
            output = apply(config, parameters, x)
            return jax.lax.psum((output**2).sum(), "data"), output

        # with its defaults, which check what varies between devices
        mapped = jax.shard_map(
            total, mesh=where, in_specs=(P(), P("data")), out_specs=(P(), P("data"))
        )
        found = jax.jit(jax.grad(mapped, (0, 1), has_aux=True))(parameters, X)
        same(found, jax.jit(slopes(config))(parameters, X))


EVERY = [(True, "entmax"), (True, "sparsemax"), (True, "top-k"), (False, "entmax")]

for explicit, each in EVERY:

    @check("explicit axes" if explicit else "automatic axes", each)
    def _(name: str, explicit: bool = explicit) -> None:
        config = LayerConfig(LayerSpec(12, 5, 6, CP(4)), GATES[name])
        parameters, where = with_gate(config), mesh(explicit, 4)
        found = sharded(where, P("data"), slopes(config), parameters, X)
        same(found, jax.jit(slopes(config))(parameters, X))
        with jax.set_mesh(where):
            rows = jax.device_put(X, NamedSharding(where, P("data")))
            everywhere = jax.device_put(parameters, NamedSharding(where, P()))
            run = jax.jit(lambda parameters, x: apply(config, parameters, x))
            text = run.lower(everywhere, rows).compile().as_text()
        # devices that hold their own rows have nothing to tell one another
        collective = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\b"
        assert not re.search(collective, text), re.search(collective, text)
        assert "while" in text or "top" in name


@check("leading axes")
def _() -> None:
    x = jax.random.normal(jax.random.key(3), (8, 4, 12))
    parameters = with_gate(CONFIG)

    def run(parameters: Any, x: jax.Array) -> jax.Array:
        return apply(CONFIG, parameters, x)

    want = jax.jit(run)(parameters, x)
    same(sharded(mesh(True, 2, 2), P("data", "model"), run, parameters, x), want)
    mapped = jax.vmap(run, (None, 0))
    same(sharded(mesh(True, 4), P("data"), mapped, parameters, x), want)


@check("batch norm")
def _() -> None:
    config = LayerConfig(LayerSpec(12, 5, 6, CP(4)), Gate(normalization="batch"))
    given = with_gate(config), initial_buffers(config)

    def run(given: Any, x: jax.Array) -> Any:
        return train(config, given[0], x, buffers=given[1])

    same(sharded(mesh(True, 4), P("data"), run, given, X), jax.jit(run)(given, X))


@check("ids and chosen experts")
def _() -> None:
    table = LayerConfig(LayerSpec(100, 5, 6, CP(4)), None, True)
    ids, shares = jnp.arange(8) * 12, jnp.full((8, 6), 1 / 6)
    chosen = TopK(jnp.tile(jnp.array([[1, 3]]), (8, 1)), jnp.full((8, 2), 0.5))

    def look_up(parameters: Any, ids: jax.Array, shares: jax.Array) -> jax.Array:
        return apply(table, parameters, ids, shares)

    def run(parameters: Any, x: jax.Array, chosen: Any) -> jax.Array:
        return apply(CONFIG, parameters, x, chosen)

    rows = initialize(table, jax.random.key(0))
    parameters = with_gate(CONFIG)
    for kind in (True, False):
        where = mesh(kind, 4)
        found = sharded(where, P("data"), look_up, rows, ids, shares)
        same(found, jax.jit(look_up)(rows, ids, shares))
        found = sharded(where, P("data"), run, parameters, X, chosen)
        same(found, jax.jit(run)(parameters, X, chosen))


@check("blocks and modules")
def _() -> None:
    block = Options(6, "tensor_ring", rank=2).block(12, 16, drop=0.1)
    parameters, where = initialize(block, jax.random.key(0)), mesh(True, 4)

    def slope(parameters: Any, x: jax.Array) -> Any:
        def total(parameters: Any) -> jax.Array:
            return (train(block, parameters, x, key=jax.random.key(3))[0] ** 2).sum()

        return jax.grad(total)(parameters)

    same(sharded(where, P("data"), slope, parameters, X), jax.jit(slope)(parameters, X))
    layer = nnx.MuMoE(12, 5, experts=6, rank=4, rngs=0)
    call = flax.jit(lambda layer, x: layer(x))
    want = call(layer, X)
    with jax.set_mesh(where):
        same(call(layer, jax.device_put(X, NamedSharding(where, P("data")))), want)


def main() -> None:
    assert jax.device_count() == 4
    found = {}
    for name, run in CHECKS.items():
        try:
            run()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
