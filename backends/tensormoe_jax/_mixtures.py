"""Mixtures whose experts are run one by one, as pure functions of a dictionary of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tensormoe import functional
from tensormoe._layers import Costs, MixtureMethods
from tensormoe._names import makes_logits
from tensormoe.backend import Backend
from tensormoe.mixtures import MixtureConfig, Parts
from tensormoe.routing import CartesianRoutes, LevelRoutes, ProductRoutes, Routes, TaskRoutes
from tensormoe_jax._activations import ACTIVATIONS
from tensormoe_jax._adapter import BACKEND, LIBRARY
from tensormoe_jax._dtypes import FLOATS
from tensormoe_jax._keys import checked_key

M = TypeVar("M", bound=MixtureConfig)

# a routing record goes through transformations as other arguments do
for _record in (Routes, ProductRoutes, LevelRoutes, CartesianRoutes, TaskRoutes):
    jax.tree_util.register_dataclass(
        _record, data_fields=[field.name for field in fields(_record)], meta_fields=[]
    )


def route_mixture(
    config: MixtureConfig,
    arrays: Mapping[str, Array],
    x: Array,
    *,
    training: bool = False,
    key: Array | None = None,
) -> tuple[Any, dict[str, Array]]:
    """The routing record of tokens (..., in), and the buffers that training changed.

    Args:
        config: the mixture.
        arrays: parameters and buffers by canonical name.
        x: (..., in), in the mixture's dtype.
        training: whether noise is added, and buffers move.
        key: of ``jax.random``, for a router with ``noise`` in training.

    Raises:
        BackendError, ShapeError: the input does not fit.
        SpecError: noise is to be drawn, and there is no key.
    """
    batch_shape, rows = merged_rows(config, arrays, x)
    noise = _noise(config, rows, key) if training else None
    routes, changed = config.route(parts_of(config, arrays), rows, training=training, noise=noise)
    return routes.reshaped(batch_shape, BACKEND), changed


def forward_mixture(
    config: MixtureConfig,
    arrays: Mapping[str, Array],
    x: Array,
    *,
    training: bool = False,
    key: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Outputs (..., out) of tokens (..., in), and the buffers that training changed.

    Arguments and errors are those of :func:`route_mixture`.
    """
    batch_shape, rows = merged_rows(config, arrays, x)
    noise = _noise(config, rows, key) if training else None
    y, _, changed = config.forward(parts_of(config, arrays), rows, training=training, noise=noise)
    return y.reshape(config.output_shape(batch_shape)), changed


def _noise(config: MixtureConfig, rows: Array, key: Array | None) -> Array | None:
    shape = config.noise_shape(*rows.shape[:-1])
    if shape is None:
        return None
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    rule = "a router with noise needs a key in training"
    return jax.random.normal(checked_key(key, rule), shape, wide)


def run_mixture(config: MixtureConfig, arrays: Mapping[str, Array], x: Array, routes: Any) -> Array:
    """Outputs (..., out) of tokens (..., in) that are routed already.

    Raises:
        BackendError, ShapeError: input or record do not fit.
    """
    batch_shape, rows = merged_rows(config, arrays, x)
    config.check_routes(routes, batch_shape)
    merged = routes.reshaped(rows.shape[:-1], BACKEND)
    y: Array = config.run(parts_of(config, arrays), rows, merged)
    return y.reshape(config.output_shape(batch_shape))


def parts_of(config: MixtureConfig, arrays: Mapping[str, Array]) -> Parts:
    """Parts of the formula of a mixture."""
    return Parts.of(config, arrays, ACTIVATIONS.__getitem__, BACKEND)


def merged_rows(
    config: MixtureConfig, arrays: Mapping[str, Array], x: Array
) -> tuple[tuple[int, ...], Array]:
    """The leading shape of a checked input, and the input as the formula takes it."""
    dtype = arrays[next(iter(config.parameter_shapes()))].dtype
    batch_shape = functional.check_input(x, config.in_features, dtype, BACKEND)
    return batch_shape, x.reshape(config.merged_shape(batch_shape))


class MixtureLayer(MixtureMethods[Array, M]):
    """Methods that the mixtures of Flax and Equinox share."""

    _dtypes = FLOATS

    backend: ClassVar[Backend] = BACKEND

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the factors; inputs must have it. A router may be in float32 beside them."""
        dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
        return dtype

    def _costs(self) -> Costs:
        return {"itemsize": self.dtype.itemsize, "library": LIBRARY}

    def _dtype_text(self) -> str:
        found = self.parameters
        # what transformations leave in the place of an array may have no dtype
        if not all(hasattr(array, "dtype") for array in found.values()):
            return "dtype=?"
        routers = {each.dtype.name for name, each in found.items() if makes_logits(name)}
        apart = "".join(f", router_dtype={each!r}" for each in routers - {self.dtype.name})
        return f"dtype={self.dtype.name!r}{apart}"
