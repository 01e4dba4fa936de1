"""Memory of a call as XLA plans it, before there are any arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import Array

from tensormoe._validation import flag, positive_int
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax._initialize import initial_buffers, initialize
from tensormoe_jax._mix import Act
from tensormoe_jax._pure import apply

__all__ = ["compiled_memory"]


def compiled_memory(
    config: LayerConfig | BlockConfig,
    batch: int,
    *,
    training: bool = False,
    dtype: Any = None,
    act: Act | None = None,
) -> int:
    """Bytes that a compiled call takes beyond its arguments, results included.

    A compiler joins operations and orders arrays as it sees fit: on JAX, ``cost.peak_memory`` is no
    more than the order of magnitude. Here the call is compiled for shapes, which takes about a
    second and no memory for arrays, and XLA says what it planned, for the default device.

    Args:
        config: of a layer, an embedding or a block; one without a gate gets coefficients.
        batch: number of inputs.
        training: whether gradients of parameters and features are computed too, from one of the
            output.
        dtype: of the parameters and the input; JAX's default one for None.
        act: the activation of a block whose configuration names none.

    Raises:
        SpecError: no such dtype or batch, or a block whose configuration names no activation, and
            none given.

    >>> from tensormoe.functional import LayerConfig
    >>> from tensormoe import CP, Gate, LayerSpec
    >>> config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate())
    >>> compiled_memory(config, batch=64) >= 64 * 4 * 4
    True
    """
    count = positive_int(batch, "batch")
    flag(training, "training")
    parameters = jax.eval_shape(partial(initialize, config, dtype=dtype), jax.random.key(0))
    buffers = jax.eval_shape(partial(initial_buffers, config, dtype=dtype))
    first = config.first if isinstance(config, BlockConfig) else config
    shape: Any = jax.ShapeDtypeStruct
    kind = next(iter(parameters.values())).dtype
    x = shape((count, first.spec.in_features), kind)
    if first.indexed_input:
        x = shape((count,), "int32")
    made = None if first.gate else [shape((count, each), kind) for each in first.spec.experts]

    def forward(given: Mapping[str, Array], x: Array, held: Any, made: Any) -> Array:
        return apply(config, given, x, made, buffers=held or None, act=act)

    def train(
        given: Mapping[str, Array], x: Array, held: Any, made: Any, cotangent: Array
    ) -> tuple[Array, Any]:
        if first.indexed_input:
            output, pull = jax.vjp(lambda given: forward(given, x, held, made), given)
        else:
            output, pull = jax.vjp(lambda given, x: forward(given, x, held, made), given, x)
        return output, pull(cotangent)

    shapes: list[Any] = [parameters, x, buffers, made]
    if training:
        shapes.append(jax.eval_shape(forward, *shapes))
    found: Any = jax.jit(train if training else forward).lower(*shapes).compile().memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes)
