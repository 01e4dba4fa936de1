"""What the tests of the JAX layers share: random values, and one layer in every form of it.

JAX compiles each operation for each shape, so that tests jit what they call and use few shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tensormoe_jax
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.functional import BlockConfig, LayerConfig
from tests._frameworks import class_name

Arrays = dict[str, np.ndarray]


def config_of(
    kind: Any = None,
    experts: int | tuple[int, ...] = (3, 2),
    gate: Gate | None = None,
    out: int = 4,
) -> LayerConfig:
    """A small layer, 5 → 4 by default."""
    return LayerConfig(LayerSpec(5, out, experts, kind or CP(3)), gate)


def block_of(
    gate: Gate | None = None, act_layer: str = "gelu", drop: float = 0.0, out: int = 4
) -> BlockConfig:
    """A small block, 5 → 6 → 4, with other factorizations in its layers."""
    first = LayerConfig(LayerSpec(5, 6, (3, 2), CP(3)), gate)
    second = LayerConfig(LayerSpec(6, out, (3, 2), TensorRing(2)), None)
    return BlockConfig(first, second, act_layer, drop)


def values(config: Any, seed: int = 0, dtype: str = "float64") -> Arrays:
    """Random parameters, those of the gate included, which start at zero, and statistics."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(size) for name, size in config.parameter_shapes().items()}
    for name, size in config.buffer_shapes().items():
        drawn[name] = rng.uniform(0.5, 2.0, size) * (1.0 if "variance" in name else 0.1)
    return {name: array.astype(dtype) for name, array in drawn.items()}


def normal(*shape: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def to_jax(tree: Any) -> Any:
    """NumPy's arrays as JAX's, of the same dtypes."""
    return jax.tree.map(jnp.asarray, tree)


def split(config: Any, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers."""
    names = config.parameter_shapes()
    return (
        {name: array for name, array in arrays.items() if name in names},
        {name: array for name, array in arrays.items() if name not in names},
    )


def numpys(config: Any, arrays: Arrays) -> Any:
    """NumPy's layer of these arrays, which training changes in place."""
    copies = {name: array.copy() for name, array in arrays.items()}
    return getattr(tensormoe_numpy, class_name(config)).restore(config, copies)


def nnx_layer(config: Any, arrays: Arrays) -> Any:
    """Flax's layer of these arrays."""
    return getattr(tensormoe_jax.nnx, class_name(config)).restore(config, to_jax(arrays))


def eqx_layer(config: Any, arrays: Arrays) -> tuple[Any, eqx.nn.State]:
    """Equinox's layer of these arrays, and its state."""
    make = getattr(tensormoe_jax.equinox, class_name(config)).restore
    layer, state = eqx.nn.make_with_state(make)(config, to_jax(arrays))
    return layer, state


def build(form: str, name: str = "MuMoE", *sizes: Any, **options: Any) -> Any:
    """A small layer, of Flax or of Equinox."""
    source = {"rngs": 0} if form == "nnx" else {"key": jax.random.key(0)}
    given = {"experts": 3, "rank": 2} | source | options
    return getattr(getattr(tensormoe_jax, form), name)(*(sizes or (5, 4)), **given)


Run = Callable[..., Any]


def functional_run(config: Any, arrays: Arrays) -> Run:
    parameters, buffers = split(config, to_jax(arrays))
    return lambda x, made=None: tensormoe_jax.apply(config, parameters, x, made, buffers=buffers)


def nnx_run(config: Any, arrays: Arrays) -> Run:
    layer = nnx_layer(config, arrays)
    layer.eval()
    return lambda x, made=None: layer(x, made)


def eqx_run(config: Any, arrays: Arrays) -> Run:
    layer, state = eqx_layer(config, arrays)
    quiet = eqx.nn.inference_mode(layer)
    if class_name(config) == "MuMoEEmbedding":
        return lambda ids, made: quiet(ids, made)
    return lambda x, made=None: quiet(x, made, state=state)[0]


FORMS: dict[str, Callable[[Any, Arrays], Run]] = {
    "functional": functional_run,
    "nnx": nnx_run,
    "equinox": eqx_run,
}
"""A function of inputs, and of ready-made coefficients, outside training."""


def assert_same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    """Trees of arrays are equal, relative to the largest entry of each."""
    wanted = jax.tree_util.tree_leaves_with_path(want)
    found = jax.tree_util.tree_leaves_with_path(got)
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (path, one), (_, other) in zip(found, wanted, strict=True):
        expected = np.asarray(other, dtype=np.float64)
        size = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
        np.testing.assert_allclose(
            np.asarray(one, dtype=np.float64),
            expected,
            rtol=0,
            atol=tolerance * size,
            err_msg=jax.tree_util.keystr(path),
        )
