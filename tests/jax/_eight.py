"""Shared parts of the checks on eight devices: checks by name, meshes, and communication."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tensormoe import Factorization
from tensormoe.planning import Cost
from tests._kinds import UNEVEN

P = PartitionSpec
CHECKS: dict[str, Callable[[], None]] = {}
"""Every check by its name."""
WIDE: set[str] = set()
"""Names of the checks that take long."""


def check(name: str, wide: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add a check."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in CHECKS
        CHECKS[name] = function
        WIDE.update([name] if wide else [])
        return function

    return add


def even(kind: Factorization) -> Factorization:
    """A factorization of bonds that four devices cut."""
    return kind.with_rank(tuple(4 * size for size in kind.bonds(2))) if kind.bonds(2) else kind


KINDS = {kind.name: even(kind) for kind in UNEVEN}


def mesh_of(explicit: bool = False, **sizes: int) -> Any:
    """A mesh of the first devices."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(kind,) * len(sizes),
        devices=jax.devices()[:count],
    )


def put(mesh: Any, arrays: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays, placed."""
    return {
        name: jax.device_put(array, NamedSharding(mesh, specs[name]))
        for name, array in arrays.items()
    }


def same(found: Any, want: Any, tolerance: float = 1e-6) -> None:
    """Trees of arrays are equal, relative to the largest entry of each."""
    found, want = jax.device_get((found, want))

    def one(path: Any, a: Any, b: Any) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.abs(b).max(initial=0.0) or 1.0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size, err_msg=str(path))

    jax.tree_util.tree_map_with_path(one, found, want)


def random(shape: tuple[int, ...], seed: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def values(config: Any) -> dict[str, Any]:
    """Random parameters, those of the gate included, which start at zero."""
    shapes = config.parameter_shapes()
    return {name: random(shape, place) for place, (name, shape) in enumerate(shapes.items())}


def shares(experts: tuple[int, ...], batch: int) -> list[Any]:
    """Coefficients: sparse, different for every input, not adding up to one."""
    rng = np.random.default_rng(7)
    return [
        jnp.asarray(rng.standard_normal((batch, n)) * (rng.random((batch, n)) < 0.6), jnp.float32)
        for n in experts
    ]


def exchanged(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every array that a compiled program communicates."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf"= (\([^)]*\)|\S+) ({kinds})(?:-start)?\(", text):
        for dtype, sizes in re.findall(r"\b(f32|bf16|f64|s32|pred)\[([\d,]*)\]", shapes):
            width = {"f32": 4, "bf16": 2, "f64": 8, "s32": 4, "pred": 1}[dtype]
            entries = np.prod([int(size) for size in sizes.split(",") if size], dtype=int)
            found.append((kind, width * int(entries)))
    return sorted(found)


def predicted(cost: Cost) -> list[tuple[str, int]]:
    """Kind and bytes of every array, by the cost model."""
    return sorted((each.kind, each.bytes) for each in cost.collectives)


def refused(kind: type[Exception], message: str, function: Callable[[], Any]) -> None:
    """A call raises an error with this text."""
    caught = ""
    try:
        function()
    except kind as error:
        caught = str(error)
    assert message in caught, (message, caught)
