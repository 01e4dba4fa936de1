"""Hidden units of one expert in the order of another's (weight matching, Ainsworth et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe.backend import Array, Backend, default_integer, device_of
from tensormoe.decomposition._solve import wide

if TYPE_CHECKING:
    from numpy.typing import NDArray

Expert = Mapping[tuple[str, str], Array]
"""Weights and biases of one expert by kind, "weight" or "bias", and role."""


def match_units(first: Expert, other: Expert, backend: Backend) -> NDArray[Any]:
    """The permutation of an expert's hidden units that comes closest to another expert.

    It maximizes the sum over units of the inner products of all that a unit holds, its columns of
    gate and up projection, its row of the down projection and its biases, which minimizes the
    distance of the two experts' weights. It is exact (an assignment problem; Li et al. 2024,
    section 3.1).

    Args:
        first: the expert whose order stays.
        other: the expert whose units are permuted.
        backend: adapter of the arrays' library.

    Returns:
        (hidden,): unit u of the first expert is closest to unit ``permutation[u]`` of the other.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    require("matching hidden units", ("numpy", "scipy"), "numpy")
    from scipy.optimize import linear_sum_assignment

    hidden = first["weight", "down_proj"].shape[0]
    gain: Any = None
    for key, each in first.items():
        for one, two in zip(
            _by_unit(key, each, hidden, backend),
            _by_unit(key, other[key], hidden, backend),
            strict=True,
        ):
            product = backend.matmul(one, backend.permute(two, (1, 0)))
            gain = product if gain is None else gain + product
    permutation: NDArray[Any] = linear_sum_assignment(wide(gain, backend), maximize=True)[1]
    return permutation


def _by_unit(key: tuple[str, str], array: Array, hidden: int, backend: Backend) -> list[Array]:
    """Matrices (hidden, …) of what units hold: two of a layer that makes both halves."""
    kind, role = key
    if role == "down_proj":
        return [array] if kind == "weight" else []
    rows = backend.reshape(array, (1, -1)) if kind == "bias" else array
    halves = [rows[:, start : start + hidden] for start in range(0, rows.shape[1], hidden)]
    return [backend.permute(half, (1, 0)) for half in halves]


def taken_units(
    expert: Expert, permutation: NDArray[Any], backend: Backend
) -> dict[tuple[str, str], Array]:
    """The expert with its hidden units in another order; it computes what it did.

    Args:
        expert: weights and biases.
        permutation: (hidden,) the unit that comes to each place.
        backend: adapter of the arrays' library.
    """
    xp, hidden = backend.namespace, len(permutation)
    like = expert["weight", "down_proj"]

    def taken(key: tuple[str, str], array: Array) -> Array:
        kind, role = key
        if role == "down_proj" and kind == "bias":
            return array
        axis = 0 if role == "down_proj" else array.ndim - 1
        places = [
            n + start for start in range(0, array.shape[axis], hidden) for n in permutation.tolist()
        ]
        index = xp.asarray(places, dtype=default_integer(xp), device=device_of(like))
        return backend.take(array, index, axis)

    return {key: taken(key, each) for key, each in expert.items()}
