"""Factorized convolutions as pure functions of a dictionary of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe import functional
from tensormoe._layers import ConvMethods
from tensormoe.errors import ShapeError
from tensormoe.mixtures import ConvConfig, check_coefficients, check_images, convolve
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._keys import checked_key
from tensormoe_jax._mixtures import MixtureLayer, parts_of

Levels = tuple[Array, ...]
"""One array per level."""


def route_images(
    config: ConvConfig,
    arrays: Mapping[str, Array],
    x: Array,
    *,
    channels_first: bool,
    training: bool = False,
    key: Array | None = None,
) -> tuple[tuple[Levels, Levels], dict[str, Array]]:
    """Coefficients and logits of images, and the buffers that training changed.

    Args:
        config: the layer.
        arrays: parameters and buffers by canonical name.
        x: images, in the layer's dtype.
        channels_first: whether channels come before the spatial axes.
        training: whether batch norm uses the batch's own statistics, noise is added, and buffers
            move.
        key: of ``jax.random``, for a gate with ``noise`` in training.

    Raises:
        BackendError, ShapeError: the input does not fit, or there is no gate.
        SpecError: noise is to be drawn, and there is no key.
    """
    config.checked_gate()
    images, batch_shape, size = _merged(config, arrays, x, channels_first)
    rows = config.gate_inputs(images, BACKEND)
    noise, shape = None, config.noise_shape(rows.shape[0])
    if training and shape is not None:
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        noise = jax.random.normal(checked_key(key, "a gate with noise needs a key"), shape, wide)
    parts = parts_of(config, arrays)
    made, changed = config.route(parts, rows, training=training, noise=noise)
    lead = _lead(config, batch_shape, size)
    coefficients, logits = (
        tuple(each.reshape(*lead, each.shape[-1]) for each in levels) for levels in made
    )
    return (coefficients, logits), jax.lax.stop_gradient(changed)


def run_images(
    config: ConvConfig,
    arrays: Mapping[str, Array],
    x: Array,
    coefficients: Array | Sequence[Array],
    *,
    channels_first: bool,
) -> Array:
    """Outputs of images for given coefficients.

    Raises:
        BackendError, ShapeError: input or coefficients do not fit.
    """
    images, batch_shape, size = _merged(config, arrays, x, channels_first)
    lead = _lead(config, batch_shape, size)
    rows = check_coefficients(coefficients, config.experts.spec.experts, lead, BACKEND)
    factors = {name.removeprefix("experts."): each for name, each in arrays.items()}
    # an exported function must not be bound to the sizes that one plan is the cheapest for
    open_sizes = any(not isinstance(each, int) for each in images.shape)
    y: Array = convolve(
        config.window,
        config.programs(BACKEND.convolves),
        factors,
        images,
        rows,
        BACKEND,
        any_size=open_sizes,
    )
    y = y.reshape(*batch_shape, *y.shape[1:])
    return jnp.moveaxis(y, -1, -1 - config.window.axes) if channels_first else y


def _merged(
    config: ConvConfig, arrays: Mapping[str, Array], x: Array, channels_first: bool
) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """Checked images (images, *size, channels), their leading shape and size."""
    functional.check_array(x, BACKEND, "images")
    dtype = arrays[next(iter(config.parameter_shapes()))].dtype
    if x.dtype != dtype:
        raise ShapeError(
            f"images must have the layer's dtype {dtype}; got {x.dtype}. Cast them, or build the "
            "layer with their dtype."
        )
    batch_shape, size = check_images(
        x, config.window, config.in_channels, channels_first=channels_first
    )
    if channels_first:
        x = jnp.moveaxis(x, -1 - config.window.axes, -1)
    return x.reshape(prod(batch_shape), *size, config.in_channels), batch_shape, size


def _lead(
    config: ConvConfig, batch_shape: tuple[int, ...], size: tuple[int, ...]
) -> tuple[int, ...]:
    """Leading shape of coefficients."""
    return batch_shape if config.per_image else (*batch_shape, *config.window.out_size(size))


class ConvLayer(ConvMethods[Array], MixtureLayer[ConvConfig]):
    """Methods that the convolutions of Flax and Equinox share."""

    def _weights(self) -> dict[str, Array]:
        return self.parameters

    def _dtype_text(self) -> str:
        found: dict[str, Any] = self.parameters
        # what transformations leave in the place of an array may have no dtype
        if not all(hasattr(array, "dtype") for array in found.values()):
            return "dtype=?"
        gates = {each.dtype.name for name, each in found.items() if name.startswith("gate.")}
        apart = "".join(f", gate_dtype={each!r}" for each in gates - {self.dtype.name})
        return f"dtype={self.dtype.name!r}{apart}"
