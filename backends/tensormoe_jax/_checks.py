"""Checks of the functional form that only JAX can make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tensormoe import functional
from tensormoe.checkpoint import check_config
from tensormoe.errors import BackendError, ShapeError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax._adapter import BACKEND

Parameters = Mapping[str, Array]
Config = LayerConfig | BlockConfig


def check_parameters(config: Config, parameters: Parameters, *parts: str) -> None:
    """Refuse parameters that are not the layer's, in the parts that are about to be used."""
    check_config(config)
    if not isinstance(parameters, Mapping):
        raise BackendError(
            "parameters must be arrays of JAX by canonical name, a dictionary; got a "
            f"{type(parameters).__name__}. Pass what initialize returned, or a layer's parameters."
        )
    for name, shape in config.parameter_shapes().items():
        if not name.startswith(parts):
            continue
        if name not in parameters:
            raise ShapeError(
                f"parameters must hold {name!r} of shape {shape}; got {sorted(parameters)}. Pass "
                "what initialize returned for this config."
            )
        functional.check_array(parameters[name], BACKEND, name)
        if parameters[name].shape != shape:
            raise ShapeError(
                f"{name} must have shape {shape}; got {parameters[name].shape}. Stacked layers run "
                "under jax.vmap or jax.lax.scan."
            )


def checked_buffers(config: Config, buffers: Parameters | None) -> dict[str, Array]:
    """Running statistics by canonical name; empty where none are given, or needed.

    Raises:
        BackendError: not a mapping of JAX's arrays.
        ShapeError: some of the layer's are missing, or have other shapes.
    """
    check_config(config)
    if buffers is None:
        return {}
    if not isinstance(buffers, Mapping):
        raise BackendError(
            "buffers must be arrays of JAX by canonical name, a dictionary; got a "
            f"{type(buffers).__name__}. Pass what initial_buffers returned."
        )
    shapes = config.buffer_shapes()
    if buffers and {*buffers} != {*shapes}:
        raise ShapeError(
            f"buffers must be {sorted(shapes)}; got {sorted(map(str, buffers))}. Pass what "
            "initial_buffers returned for this config."
        )
    for name, shape in shapes.items() if buffers else ():
        functional.check_array(buffers[name], BACKEND, name)
        if buffers[name].shape != shape:
            raise ShapeError(f"{name} must have shape {shape}; got {buffers[name].shape}.")
    return dict(buffers)


def dtype_of(parameters: Parameters) -> Any:
    """The layer's dtype: that of its factors, or of the gate where that is all there is."""
    names = [name for name in parameters if "factors." in name] or [*parameters]
    return parameters[names[0]].dtype


def input_dtype(parameters: Parameters, x: Any) -> Any:
    """The dtype that a gate's input must have.

    That of the factors; where the gate is all there is, 16 bits will do for one in float32, since
    the factors may have them.
    """
    dtype = dtype_of(parameters)
    alone = not any("factors." in name for name in parameters)
    if alone and dtype == jnp.float32 and getattr(x, "dtype", None) in (jnp.float16, jnp.bfloat16):
        return x.dtype
    return dtype


def check_range(indices: Any, size: int, name: str) -> None:
    """Refuse indices out of range, where that waits for no device and no tracer."""
    concrete = isinstance(indices, Array) and not isinstance(indices, jax.core.Tracer)
    if concrete and jax.default_backend() == "cpu":
        # constants of a function that is traced can be looked at as well
        with jax.ensure_compile_time_eval():
            functional.check_ids(indices, size, BACKEND, name, look=True)
