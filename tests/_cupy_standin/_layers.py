"""NumPy's layers with random values, and the same layers on CuPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import tensormoe_cupy
from tests._cupy_standin._install import ADAPTER
from tests.numpy._helpers import randomize as randomize


def device(value: Any) -> Any:
    """An array on the device, or the arrays of a mapping, list or tuple there."""
    if isinstance(value, Mapping):
        return {name: device(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(device(each) for each in value)
    return ADAPTER.module.asarray(value)


def host(value: Any) -> Any:
    """The inverse of :func:`device`."""
    if isinstance(value, Mapping):
        return {name: host(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host(each) for each in value)
    return ADAPTER.module.asnumpy(value)


def twin(layer: Any) -> Any:
    """The layer of NumPy's values on CuPy."""
    kind = getattr(tensormoe_cupy, type(layer).__name__)
    return kind.restore(layer.config, device(layer.arrays))


def assert_same(got: Any, want: Any, tolerance: float = 1e-10, name: str = "result") -> None:
    """Assert equality, relative to the largest entry, of arrays or of mappings and lists of them.

    Args:
        got: arrays on the device.
        want: arrays of NumPy.
        tolerance: largest difference, relative to the largest entry of ``want`` or to 1.
        name: names the result in the message.
    """
    if isinstance(want, Mapping):
        assert set(got) == set(want), name
        for key, each in want.items():
            assert_same(got[key], each, tolerance, f"{name}: {key}")
        return
    if isinstance(want, list | tuple):
        assert len(got) == len(want), name
        for place, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, tolerance, f"{name} {place}")
        return
    assert ADAPTER.owns(got), f"{name} is a {type(got)}"
    found = host(got)
    assert (found.shape, found.dtype) == (want.shape, want.dtype), name
    size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * size, err_msg=name)
