"""First values of a layer as a dictionary of arrays."""

from __future__ import annotations

from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe import functional
from tensormoe._names import block_names
from tensormoe.checkpoint import check_config
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.mixtures import MixtureConfig, initialize_mixture
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._dtypes import checked_dtype, checked_gate_dtype
from tensormoe_jax._keys import checked_key

__all__ = ["initial_buffers", "initialize"]

Config = LayerConfig | BlockConfig | MixtureConfig


def initialize(
    config: Config,
    key: Array,
    *,
    init: str = "variance",
    dtype: Any = None,
    gate_dtype: Any = None,
) -> dict[str, Array]:
    """Draw all parameters.

    Projections of the gate start at zero, so that experts start alike; those of a gate that chooses
    k experts start as the weight of ``torch.nn.Linear``, so that tokens choose different experts.

    Those of a "relu_top_k" gate start like ``torch.nn.Linear``: zeros would stay zeros.

    Args:
        config: of a layer, an embedding, a block or a mixture, as the layers' ``config``.
        key: of ``jax.random``.
        init: ``"variance"`` or ``"paper"``.
        dtype: of the parameters; JAX's default one for None.
        gate_dtype: of the gate's parameters: ``dtype`` for None, or float32 beside a ``dtype`` of
            16 bits.

    Returns:
        The parameters by canonical name.

    Raises:
        SpecError: an unknown scheme, no dtype for a layer, or no key.

    >>> import jax
    >>> from tensormoe.functional import LayerConfig
    >>> from tensormoe import CP, Gate, LayerSpec
    >>> config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate())
    >>> {name: array.shape for name, array in initialize(config, jax.random.key(0)).items()}
    {'factors.expert_0': (3, 2), 'factors.input': (8, 2), 'factors.output': (4, 2), \
'factors.bias': (2,), 'gate.projection_0': (8, 3)}
    """
    check_config(config)
    if isinstance(config, BlockConfig):
        first, second = jax.random.split(checked_key(key))
        return block_names(
            initialize(config.first, first, init=init, dtype=dtype, gate_dtype=gate_dtype),
            initialize(config.second, second, init=init, dtype=dtype, gate_dtype=gate_dtype),
        )
    kind, key = checked_dtype(dtype), checked_key(key)
    gate_kind = checked_gate_dtype(gate_dtype, kind)
    numbers = count()

    def fresh() -> Array:
        return jax.random.fold_in(key, next(numbers))

    draws: dict[str, Any] = {
        "normal": lambda shape: jax.random.normal(fresh(), shape, kind),
        "uniform": lambda shape: jax.random.uniform(fresh(), shape, kind, -1.0, 1.0),
        # nothing but a gate or a router starts at zero, or in the dtype of these zeros
        "zeros": lambda shape: jnp.zeros(shape, gate_kind),
    }
    if isinstance(config, MixtureConfig):
        return initialize_mixture(config, BACKEND, init=init, **draws)
    return functional.initialize(config, BACKEND, init=init, **draws)


def initial_buffers(config: Config, *, dtype: Any = None) -> dict[str, Array]:
    """Fresh statistics of batch norm, and biases of a gate with ``balance``; else empty.

    Args:
        config: of a layer or a block.
        dtype: of the parameters; statistics are float32 at least.
    """
    check_config(config)
    kind = checked_dtype(dtype)
    wide = kind if kind.itemsize >= 4 else jnp.dtype("float32")
    return {
        name: (jnp.ones if "variance" in name else jnp.zeros)(shape, wide)
        for name, shape in config.buffer_shapes().items()
    }
