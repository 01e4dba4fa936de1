"""Layers and blocks, mixed by ready-made coefficients: on one device, or cut over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe import functional
from tensormoe._names import split_names
from tensormoe._validation import brief
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.gates import OneExpert, TopK
from tensormoe_jax._activations import ACTIVATIONS
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._checks import check_parameters, check_range, dtype_of
from tensormoe_jax._cut import Placed, Rows, over_devices, own_slices, placed
from tensormoe_jax._specs import Legs, MeshCut

__all__ = ["Given", "dropping", "keep", "mix_block", "mix_layer"]

Given = Array | TopK | OneExpert | Sequence[Array | TopK | OneExpert]
"""Ready-made coefficients: an array (..., N_e), a ``TopK`` or a ``OneExpert`` per level."""

Parameters = Mapping[str, Array]
Drop = Callable[[Array], Array]
Act = Callable[[Array], Array]


def mix_layer(
    config: LayerConfig,
    parameters: Parameters,
    x: Array,
    given: Given,
    legs: Legs | MeshCut | None = None,
) -> Array:
    """The experts of a layer, mixed by ready-made coefficients.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (..., in), or ids (...).
        given: one entry per level.
        legs: the leg that is cut, and over which mesh axis.
    """
    cut = placed(config, parameters, legs)
    check_parameters(config if cut is None else cut.held, parameters, "factors.")
    batch_shape, rows = _rows(config, parameters, x, given, cut)
    factors = {name: each for name, each in parameters.items() if name.startswith("factors.")}
    if cut is None:
        result = _run(config, factors, rows)
    else:
        part = cut.layers[0]
        result = over_devices(cut, lambda own, here, _: _run(part, own, here, cut), factors, rows)
    return result.reshape(*batch_shape, result.shape[-1])


def mix_block(
    config: BlockConfig,
    parameters: Parameters,
    x: Array,
    given: Given,
    drop_middle: Drop,
    drop_last: Drop,
    act: Act | None = None,
    legs: Legs | MeshCut | None = None,
) -> Array:
    """Both layers of a block, mixed by ready-made coefficients.

    Args:
        config: the block.
        parameters: by canonical name.
        x: (..., in).
        given: the coefficients of both layers.
        drop_middle: what drops entries behind the activation.
        drop_last: what drops entries behind the second layer.
        act: the activation of a block whose configuration names none.
        legs: the hidden leg, and the mesh axis over which it is cut.
    """
    cut = placed(config, parameters, legs)
    check_parameters(config if cut is None else cut.held, parameters, "first.", "second.")
    if (act is None) == (config.act_layer is None):
        raise SpecError(
            "a block has one activation, by name in its configuration or given as act=…; got "
            f"{config.act_layer!r} and {brief(act)}."
        )
    function = ACTIVATIONS[config.act_layer] if config.act_layer is not None else act
    assert function is not None
    if cut is None:
        parts = split_names(parameters)
        middle = mix_layer(config.first, parts["first"], x, given)
        middle = drop_middle(_activated(config, middle, function))
        return drop_last(mix_layer(config.second, parts["second"], middle, given))
    first, second = cut.layers
    batch_shape, rows = _rows(config.first, split_names(parameters)["first"], x, given, cut)

    def local(own: Parameters, here: Rows, kept: Array | None) -> Array:
        parts = split_names(own)
        middle = _run(first, parts["first"], here, cut)
        middle = _activated(config, middle, function)
        middle = middle if kept is None else middle * kept
        return _run(second, parts["second"], Rows(middle, here.given), cut)

    factors = {name: each for name, each in parameters.items() if ".factors." in name}
    kept = _kept(drop_middle, (*batch_shape, config.hidden_features), rows.x)
    result = over_devices(cut, local, factors, rows, kept)
    return drop_last(result.reshape(*batch_shape, result.shape[-1]))


def keep(array: Array) -> Array:
    """Drop nothing."""
    return array


def dropping(share: float, key: Array) -> Drop:
    """A share of the entries dropped and the rest enlarged."""

    def drop(array: Array) -> Array:
        kept = jax.random.bernoulli(key, 1.0 - share, array.shape)
        return jnp.where(kept, array / (1.0 - share), 0.0)

    return drop


def _activated(config: BlockConfig, middle: Array, function: Act) -> Array:
    if not config.gated:
        return function(middle)
    gate, up = jnp.split(middle, 2, axis=-1)
    return function(gate) * up


def _kept(drop: Drop, shape: tuple[int, ...], x: Array) -> Array | None:
    """Factors (rows, hidden) of what a block drops: drawn as a whole, so that devices differ."""
    ones = jnp.ones(shape, x.dtype)
    factors = drop(ones)
    return None if factors is ones else factors.reshape(-1, shape[-1])


def _rows(
    config: LayerConfig, parameters: Parameters, x: Array, given: Given, cut: Placed | None
) -> tuple[tuple[int, ...], Rows]:
    """The leading shape of a checked input, and all that rows run with, their axes merged."""
    size = config.spec.in_features
    if config.indexed_input:
        check_range(x, size, "ids")
        x = functional.check_ids(x, size, BACKEND, look=False)
        batch_shape = x.shape
    else:
        size = size if cut is None else cut.features(x, size)
        batch_shape = functional.check_input(x, size, dtype_of(parameters), BACKEND)
    listed = given if isinstance(given, list | tuple) else (given,)
    for each, experts in zip(listed, config.spec.experts, strict=False):
        if isinstance(each, TopK | OneExpert):
            check_range(each.indices, experts, "indices of coefficients")
    merged = functional.merged_coefficients(config, given, batch_shape, BACKEND, look=False)
    return batch_shape, Rows(x.reshape(prod(batch_shape), *x.shape[len(batch_shape) :]), merged)


def _run(
    config: LayerConfig, parameters: Parameters, rows: Rows, cut: Placed | None = None
) -> Array:
    """A layer, or what one device has of it."""
    x, given = rows.x, rows.given
    if cut is not None:
        own = own_slices(cut, config, parameters)
        parameters, x, given = functional.part_operands(
            config, own, x, given, jax.lax.axis_index(cut.axis), BACKEND
        )
    # an exported function must not be bound to the batch sizes that one plan is the cheapest for
    any_batch = not isinstance(x.shape[0], int)
    result: Array = functional.apply_experts(
        config, parameters, x, given, BACKEND, any_batch=any_batch
    )
    return result
