"""Checks in PyTorch's terms: dtypes under autocast, devices, readable ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensormoe import functional
from tensormoe.errors import BackendError, ShapeError
from tensormoe.functional import EachExpert, LayerConfig
from tensormoe.gates import OneExpert, TopK
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import is_autocast
from tensormoe_torch._sharded import is_sharded
from tensormoe_torch._tracing import is_traced

Given = Tensor | TopK | OneExpert | EachExpert | Sequence[Tensor | TopK | OneExpert]
"""Ready-made coefficients: a tensor (..., N_e) or a ``TopK`` a level, or ``EachExpert``."""

_NARROWED = (torch.float32, torch.float16, torch.bfloat16)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a layer's experts run in: autocast's where that is on, else the layer's own.

    As for PyTorch's own layers, autocast leaves float64 alone.
    """
    device = weight.device.type
    if is_autocast(device) and weight.dtype in _NARROWED:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def check_input(
    x: Tensor, features: int, weight: Tensor, name: str = "x", *, narrower: bool = False
) -> tuple[int, ...]:
    """The leading shape of an input (..., features) for a layer that holds ``weight``.

    Args:
        x: the input.
        features: size of its last axis.
        weight: of the layer.
        name: of the input, for messages.
        narrower: whether inputs of 16 bits may meet a weight in float32, as in a gate.

    Raises:
        BackendError: not a tensor, or one on another device.
        ShapeError: no axis of ``features``, or another dtype than the layer's; under autocast, any
            that it narrows will do.
    """
    lead = functional.check_input(
        x, features, _met_dtype(x, weight, narrower=narrower), BACKEND, name
    )
    _check_device(x, weight, name)
    _check_sharded(x, weight, name)
    return lead


def check_images(x: Tensor, weight: Tensor) -> None:
    """Refuse images of another device or dtype than a layer that holds ``weight``.

    Raises:
        BackendError: not a tensor, or one on another device.
        ShapeError: another dtype than the layer's; under autocast, any that it narrows will do.
    """
    functional.check_array(x, BACKEND, "images")
    dtype = _met_dtype(x, weight)
    if x.dtype != dtype:
        raise ShapeError(
            f"images must have the layer's dtype {dtype}; got {x.dtype}. Cast them, or build the "
            "layer with their dtype."
        )
    _check_device(x, weight, "images")
    _check_sharded(x, weight, "images")


def _met_dtype(x: Tensor, weight: Tensor, *, narrower: bool = False) -> torch.dtype:
    """The dtype that an input of a layer must have."""
    dtype = weight.dtype
    mixed = isinstance(x, Tensor) and x.dtype != dtype and x.dtype in _NARROWED
    if mixed and dtype in _NARROWED and is_autocast(weight.device.type):
        dtype = x.dtype
    if narrower and mixed and dtype == torch.float32 and x.dtype.itemsize == 2:
        dtype = x.dtype
    return dtype


def check_ids(ids: Tensor, count: int, weight: Tensor) -> Tensor:
    """Integer ids in [0, count), in a type that indexes.

    Their range is checked where that does not wait for a device, and nothing is traced.

    Raises:
        BackendError: not a tensor, or one on another device.
        ShapeError: not integers, or an id out of range.
    """
    functional.check_array(ids, BACKEND, "ids")
    _check_device(ids, weight, "ids")
    _check_sharded(ids, weight, "ids")
    return functional.check_ids(ids, count, BACKEND, look=_readable(ids))


def merged(
    config: LayerConfig, coefficients: Given, lead: tuple[int, ...], weight: Tensor
) -> list[Any]:
    """Ready-made coefficients with their leading axes merged, checked against the layer.

    Raises:
        BackendError: no tensors, or some on another device.
        ShapeError: another number of levels, or shapes that do not fit the input.
    """
    # before anything is read: indices on the CPU are looked at
    for given in coefficients if isinstance(coefficients, list | tuple) else (coefficients,):
        for array in arrays_of(given):
            if isinstance(array, Tensor):
                _check_device(array, weight, "coefficients")
    return functional.merged_coefficients(
        config, coefficients, lead, BACKEND, look=_readable(weight)
    )


def arrays_of(given: object) -> tuple[object, ...]:
    """Arrays of the coefficients of one level."""
    if isinstance(given, OneExpert):
        return given.indices, given.counts
    return (given.indices, given.values) if isinstance(given, TopK) else (given,)


def _readable(array: Tensor) -> bool:
    return array.device.type == "cpu" and not is_traced(array)


def _check_sharded(array: Tensor, weight: Tensor, name: str) -> None:
    if torch.compiler.is_compiling() or type(weight) is torch.nn.Parameter:
        return
    if is_sharded(weight) and not is_sharded(array):
        raise BackendError(
            f"{name} must be a DTensor as the layer's parameters are; got a plain tensor. Under "
            "fully_shard, call the sharded module itself, or register the method with "
            "register_fsdp_forward_method; elsewhere, distribute the input."
        )


def _check_device(array: Tensor, weight: Tensor, name: str) -> None:
    if array.device != weight.device:
        raise BackendError(
            f"{name} must be on the layer's device {weight.device}; got {array.device}. Move one "
            "of them with .to(…)."
        )
