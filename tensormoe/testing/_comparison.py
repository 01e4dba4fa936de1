"""Comparison of results, relative to the size of the terms that were summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from tensormoe.factorizations import Factorization
from tensormoe.testing._oracle import reconstruct, reference_output

Reconstruct = Callable[[Factorization, Mapping[str, Any]], Any]
"""From a factorization and its factors to 𝒲, the bias as its last input row."""

TOLERANCES: Mapping[str, float] = MappingProxyType(
    {"float16": 2e-2, "float32": 2e-5, "float64": 1e-10}
)
"""Largest relative error of a layer's output by dtype."""


def assert_close(got: Any, want: Any, bound: Any, tolerance: float, what: str = "result") -> None:
    """Assert that ``got`` differs from ``want`` by at most ``tolerance`` × ``bound``, entrywise.

    Args:
        got: what was computed; anything that NumPy can read.
        want: what it must be.
        bound: the sum of the absolute values of the terms that make up each entry. Rounding is
            relative to these and not to their sum, which may be arbitrarily close to zero.
        tolerance: the relative error that is admitted.
        what: names the result in the message.

    Raises:
        AssertionError: the shapes differ, an entry is not finite, or one is too far off.

    >>> import numpy as np
    >>> assert_close(1.0 + 1e-12, 1.0, 1.0, 1e-10)
    >>> assert_close(np.zeros(2), np.array([0.0, 1.0]), 1.0, 1e-10, "output")
    Traceback (most recent call last):
        ...
    AssertionError: output is off by 1.00e+00 at (1,), relative to 1.00e+00...
    """
    found = np.asarray(got, dtype=np.float64)
    wanted = np.asarray(want, dtype=np.float64)
    assert found.shape == wanted.shape, f"{what} has shape {found.shape}, not {wanted.shape}"
    assert np.all(np.isfinite(found)), f"{what} is not finite"
    if not found.size:
        return
    sizes = np.broadcast_to(np.asarray(bound, dtype=np.float64), found.shape)
    # a bound that underflows admits no error at all, and a denormal has no relative precision
    excess = np.abs(found - wanted) - tolerance * np.maximum(sizes, 1e-30)
    place = np.unravel_index(int(np.argmax(excess)), found.shape)
    where = tuple(int(k) for k in place)
    off = abs(float(found[place] - wanted[place])) / max(float(sizes[place]), 1e-30)
    assert excess[place] <= 0.0, (
        f"{what} is off by {off:.2e} at {where}, relative to {float(sizes[place]):.2e}; at most "
        f"{tolerance:g} is admitted"
    )


def assert_output(
    output: Any,
    factorization: Factorization,
    factors: Mapping[str, Any],
    coefficients: Sequence[Any],
    x: Any,
    *,
    tolerance: float | None = None,
    reconstruct: Reconstruct = reconstruct,
) -> None:
    """Assert that factorized equals unfactorized: a layer's output is its definition's.

    Args:
        output: what the layer returned, (..., out); anything that NumPy can read.
        factorization: how the factors are to be read.
        factors: arrays by name, as a layer's ``factors``.
        coefficients: one array (..., N_e) per level.
        x: inputs (..., in).
        tolerance: relative error that is admitted; by default that of the output's dtype in
            :data:`TOLERANCES`.
        reconstruct: builds 𝒲 from the factors; TensorLy does by default.

    Raises:
        AssertionError: an entry is too far off; the message says which and how far.
    """
    if tolerance is None:
        tolerance = TOLERANCES[np.asarray(output).dtype.name]
    want = reference_output(reconstruct(factorization, factors), coefficients, x)
    sizes = {name: np.abs(np.asarray(array)) for name, array in factors.items()}
    weights = reconstruct(factorization, sizes)
    bound = reference_output(weights, [np.abs(np.asarray(a)) for a in coefficients], np.abs(x))
    assert_close(output, want, bound, tolerance, "output")
