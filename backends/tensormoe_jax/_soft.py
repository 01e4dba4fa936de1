"""The soft mixture as pure functions of a dictionary of arrays."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe.mixtures import SoftConfig, counting_tokens
from tensormoe.routing import SoftRoutes
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._keys import checked_key
from tensormoe_jax._mixtures import merged_rows, parts_of

# a routing record goes through transformations as other arguments do
jax.tree_util.register_dataclass(
    SoftRoutes, data_fields=["logits", "dispatch", "combine"], meta_fields=[]
)


def route_soft(
    config: SoftConfig,
    arrays: Mapping[str, Array],
    x: Array,
    mask: Array | None = None,
    *,
    training: bool = False,
    key: Array | None = None,
) -> SoftRoutes:
    """The routing record of sets of tokens.

    Args:
        config: the mixture.
        arrays: parameters by canonical name.
        x: (..., tokens, in), in the mixture's dtype.
        mask: booleans (..., tokens), which tokens count.
        training: whether noise is added.
        key: of ``jax.random``, for noise in training.

    Raises:
        BackendError, ShapeError: input or mask do not fit.
        SpecError: noise is to be drawn, and there is no key.
    """
    batch_shape, rows = merged_rows(config, arrays, x)
    rows, counts = counting_tokens(rows, mask, batch_shape, BACKEND)
    noise, shape = None, config.noise_shape(*rows.shape[:-1])
    if training and shape is not None:
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        noise = jax.random.normal(checked_key(key, "noise needs a key in training"), shape, wide)
    routes, _ = config.route(
        parts_of(config, arrays), rows, training=training, noise=noise, mask=counts
    )
    return routes.reshaped(batch_shape, BACKEND)


def run_soft(
    config: SoftConfig,
    arrays: Mapping[str, Array],
    x: Array,
    routes: SoftRoutes,
    mask: Array | None = None,
) -> Array:
    """Outputs (..., tokens, out) of tokens that are routed already.

    Raises:
        BackendError, ShapeError: input, mask or record do not fit.
    """
    batch_shape, rows, merged = _routed(config, arrays, x, routes, mask)
    y: Array = config.run(parts_of(config, arrays), rows, merged)
    return y.reshape(*batch_shape, config.out_features)


def select_soft(
    config: SoftConfig,
    arrays: Mapping[str, Array],
    x: Array,
    k: int,
    routes: SoftRoutes,
    mask: Array | None = None,
    random: Array | None = None,
) -> Array:
    """The same of k experts per set alone: those used most, or random ones if there is a key.

    Raises:
        BackendError, ShapeError: input, mask or record do not fit.
        GateError: k is out of range.
    """
    batch_shape, rows, merged = _routed(config, arrays, x, routes, mask)
    scores = None
    if random is not None:
        shape = rows.shape[0], config.num_experts
        scores = jax.random.uniform(checked_key(random, "random must be a key"), shape)
    y: Array = config.select(parts_of(config, arrays), rows, merged, k, scores)
    return y.reshape(*batch_shape, config.out_features)


def _routed(
    config: SoftConfig,
    arrays: Mapping[str, Array],
    x: Array,
    routes: SoftRoutes,
    mask: Array | None,
) -> tuple[tuple[int, ...], Array, SoftRoutes]:
    batch_shape, rows = merged_rows(config, arrays, x)
    rows, _ = counting_tokens(rows, mask, batch_shape, BACKEND)
    config.check_routes(routes, batch_shape)
    return batch_shape, rows, routes.reshaped(rows.shape[:-1], BACKEND)
