"""The layers as pure functions of a dictionary of arrays, for any transformation of JAX.

A layer is a configuration, which is a frozen and hashable value, and its parameters: a pytree that
is a flat dictionary by canonical name, as checkpoints have it. Modules of the frameworks on top
wrap these functions.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import prod

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe import functional
from tensormoe._validation import flag
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.gates import OneExpert, TopK
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._checks import check_parameters, checked_buffers, input_dtype
from tensormoe_jax._keys import checked_key
from tensormoe_jax._mix import Act, Drop, Given, dropping, keep, mix_block, mix_layer
from tensormoe_jax._specs import Legs

__all__ = [
    "Given",
    "apply",
    "coefficients",
    "mix_block",
    "mix_layer",
    "route",
    "train",
]

# ready-made coefficients go through transformations as other arguments do
jax.tree_util.register_dataclass(TopK, data_fields=["indices", "values"], meta_fields=[])

jax.tree_util.register_dataclass(OneExpert, data_fields=["indices", "counts"], meta_fields=[])

Parameters = Mapping[str, Array]
Config = LayerConfig | BlockConfig


def coefficients(
    config: Config,
    parameters: Parameters,
    x: Array,
    *,
    buffers: Parameters | None = None,
    training: bool = False,
    axis_name: Hashable = None,
    key: Array | None = None,
) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """The coefficients of inputs (..., in), and the gate's buffers afterwards.

    Args:
        config: of a layer or a block with a gate.
        parameters: by canonical name.
        x: (..., in), in the layer's dtype.
        buffers: running statistics of a batch-norm gate; biases of one with ``balance``.
        training: whether a batch-norm gate uses the batch's own statistics, noise is added, and
            buffers move.
        axis_name: names of the axes of ``jax.vmap`` that are part of this batch.
        key: of ``jax.random``, for a gate with ``noise``, in training.

    Returns:
        One array (..., N_e) per level, whose rows sum to one if ``gate.sums_to_one``; and the
        buffers, which training changes.

    Raises:
        BackendError, ShapeError: the input does not fit, or the layer has no gate.
        GateError: a batch-norm gate without buffers, outside training; one with ``balance`` without
            its biases.
        SpecError: a gate with ``noise`` in training, and no key.
    """
    (made, _), kept = route(
        config, parameters, x, buffers=buffers, training=training, axis_name=axis_name, key=key
    )
    return made, kept


def route(
    config: Config,
    parameters: Parameters,
    x: Array,
    *,
    buffers: Parameters | None = None,
    training: bool = False,
    axis_name: Hashable = None,
    key: Array | None = None,
) -> tuple[tuple[tuple[Array, ...], tuple[Array, ...]], dict[str, Array]]:
    """Coefficients and logits of inputs (..., in), and the gate's buffers afterwards.

    Logits are those of the projection, before normalization, noise and the choice of experts.
    Losses are made of both, and the coefficients are given to the layer, so that a step computes
    them once.

    Args:
        config: as for :func:`coefficients`, like all other arguments.
        parameters: by canonical name.
        x: (..., in), in the layer's dtype.
        buffers: running statistics of a batch-norm gate; biases of one with ``balance``.
        training: whether the call is one in training.
        axis_name: names of the axes of ``jax.vmap`` that are part of this batch.
        key: of ``jax.random``, for a gate with ``noise``, in training.

    Returns:
        A pair of coefficients and logits, one array (..., N_e) per level each; and the buffers.

    Raises:
        BackendError, GateError, ShapeError, SpecError: as :func:`coefficients`.

    >>> import jax, jax.numpy as jnp
    >>> from tensormoe.functional import LayerConfig
    >>> from tensormoe import CP, Gate, LayerSpec
    >>> from tensormoe_jax import initialize
    >>> config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate("top_k", k=2))
    >>> parameters = initialize(config, jax.random.key(0))
    >>> (made, logits), _ = route(config, parameters, jnp.ones((5, 8)), training=True)
    >>> made[0].shape, logits[0].shape
    ((5, 3), (5, 3))
    """
    check_parameters(config, parameters, "gate.")
    flag(training, "training")
    layer = config.first if isinstance(config, BlockConfig) else config
    functional.own_gate(layer.gate, config)
    kept = checked_buffers(config, buffers)
    lead = functional.check_input(x, layer.spec.in_features, input_dtype(parameters, x), BACKEND)
    rows = x.reshape(prod(lead), layer.spec.in_features)
    names = axis_name if isinstance(axis_name, list | tuple) else (axis_name,)
    shared = axis_name is not None and training and bool(layer.buffer_shapes())
    noise = _noise(layer, rows, key) if training else None
    for name in reversed(names if shared else ()):
        # under jax.vmap, one batch for all of its calls
        rows, noise = jax.lax.all_gather((rows, noise), name, tiled=True)
    routed = functional.route(
        layer,
        parameters,
        rows,
        BACKEND,
        buffers=kept,
        keep=True,
        training=training,
        noise=noise,
    )
    kept |= jax.lax.stop_gradient(routed.buffers)

    def own(made: list[Array]) -> tuple[Array, ...]:
        if shared:
            start = jax.lax.axis_index(tuple(names)) * prod(lead)
            made = [jax.lax.dynamic_slice_in_dim(each, start, prod(lead)) for each in made]
        return tuple(each.reshape(*lead, each.shape[-1]) for each in made)

    return (own(routed.coefficients), own(routed.logits)), kept


def _noise(config: LayerConfig, rows: Array, key: Array | None) -> list[Array] | None:
    """Noise for the choice of experts, one standard normal array (rows, N_e) per level."""
    if config.gate is None or not config.gate.noise:
        return None
    rule = f"a gate with noise={config.gate.noise} needs a key in training"
    keys = jax.random.split(checked_key(key, rule), config.spec.levels)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return [
        jax.random.normal(each, (rows.shape[0], count), wide)
        for each, count in zip(keys, config.spec.experts, strict=True)
    ]


def apply(
    config: Config,
    parameters: Parameters,
    x: Array,
    coefficients: Given | None = None,
    *,
    buffers: Parameters | None = None,
    act: Act | None = None,
    legs: Legs | None = None,
) -> Array:
    """Run a layer, an embedding or a block outside training.

    Args:
        config: the layer; hashable, so that it may be a static argument of ``jax.jit``.
        parameters: by canonical name, as :func:`initialize` returns them.
        x: (..., in) in the layer's dtype; ids (...) for an embedding.
        coefficients: ready-made ones, an array (..., N_e) or a ``TopK`` a level; the gate makes
            them otherwise.
        buffers: running statistics of a batch-norm gate; biases of one with ``balance``.
        act: the activation of a block whose configuration names none; any function of arrays.
        legs: the leg that the layer is cut along, and the axis of the mesh that is set:
            ``{"r": "model"}``, or of a block ``{"hidden": "model"}``. Each device then runs its
            part, with arrays placed as :func:`partition_specs` says, and one sum over the axis
            joins the results; along ``"o"``, outputs stay slices. Inside a ``jax.shard_map`` over
            the axis, parameters are the device's slices.

    Returns:
        (..., out).

    Raises:
        BackendError: no arrays of JAX's.
        ShapeError: parameters, input or coefficients do not fit the layer.
        SpecError: a block whose configuration names no activation, and none given; or both. Legs
            that do not fit the layer, or the mesh.

    >>> import jax, jax.numpy as jnp
    >>> from tensormoe.functional import LayerConfig
    >>> from tensormoe import CP, Gate, LayerSpec
    >>> from tensormoe_jax import initialize
    >>> config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate())
    >>> parameters = initialize(config, jax.random.key(0))
    >>> jax.jit(apply, static_argnums=0)(config, parameters, jnp.ones((5, 8))).shape
    (5, 4)
    """
    return _run(config, parameters, x, coefficients, buffers, False, None, act, legs)[0]


def train(
    config: Config,
    parameters: Parameters,
    x: Array,
    coefficients: Given | None = None,
    *,
    buffers: Parameters | None = None,
    key: Array | None = None,
    act: Act | None = None,
    legs: Legs | None = None,
) -> tuple[Array, dict[str, Array]]:
    """:func:`apply` in training: with the batch's own statistics, noise and dropped entries.

    Args:
        config: as for :func:`apply`, like ``parameters``, ``x``, ``coefficients``.
        parameters: by canonical name.
        x: (..., in), or ids (...).
        coefficients: ready-made ones; the gate makes them otherwise.
        buffers: running statistics of a batch-norm gate; biases of one with ``balance``.
        key: of ``jax.random``, for a block that drops entries, and for a gate with ``noise``.
        act: as for :func:`apply`.
        legs: as for :func:`apply`.

    Returns:
        (..., out), and the buffers afterwards.

    Raises:
        BackendError, ShapeError: as :func:`apply`.
        SpecError: a block that drops entries or a gate with ``noise``, and no key; as
            :func:`apply`.
    """
    return _run(config, parameters, x, coefficients, buffers, True, key, act, legs)


def _run(
    config: Config,
    parameters: Parameters,
    x: Array,
    given: Given | None,
    buffers: Parameters | None,
    training: bool,
    key: Array | None,
    act: Act | None,
    legs: Legs | None,
) -> tuple[Array, dict[str, Array]]:
    kept = checked_buffers(config, buffers)
    if isinstance(config, BlockConfig):
        return _run_block(config, parameters, x, given, kept, training, key, act, legs)
    if given is None:
        given, kept = coefficients(config, parameters, x, buffers=kept, training=training, key=key)
    return mix_layer(config, parameters, x, given, legs), kept


def _run_block(
    config: BlockConfig,
    parameters: Parameters,
    x: Array,
    given: Given | None,
    kept: dict[str, Array],
    training: bool,
    key: Array | None,
    act: Act | None,
    legs: Legs | None,
) -> tuple[Array, dict[str, Array]]:
    drops: tuple[Drop, Drop] = (keep, keep)
    if training and config.drop:
        first, second = jax.random.split(checked_key(key, "a block that drops entries needs a key"))
        drops = (dropping(config.drop, first), dropping(config.drop, second))
        # entries are dropped by the key's halves, and noise is drawn by another number of parts
        key = jax.random.fold_in(checked_key(key), 2)
    if given is None:
        given, kept = coefficients(config, parameters, x, buffers=kept, training=training, key=key)
    return mix_block(config, parameters, x, given, *drops, act, legs), kept
