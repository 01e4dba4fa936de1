"""Parts of TensorLy's decompositions: pairs of something and factors, and chains of cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensormoe.backend import Array
from tensormoe.errors import ShapeError

_LEAST = 3
"""Modes of a mixture: one of experts, the input, the output."""


def pair_of(decomposition: Any, name: str, first: str) -> tuple[Any, list[Array]]:
    """The two parts of a decomposition that is (``first``, factors).

    Raises:
        ShapeError: it is not, or there are fewer factors than a mixture has modes.
    """
    parts = [] if is_array(decomposition) else [*decomposition]
    if len(parts) != 2 or is_array(parts[1]) or not isinstance(parts[1], Sequence):
        raise ShapeError(
            f"a {name} decomposition must be ({first}, factors), as TensorLy returns it; got "
            f"{_described(decomposition)}."
        )
    return parts[0], _listed(parts[1], name)


def weights_of(weights: Any, rank: int, name: str) -> Any:
    """The weights of rank-one terms, one per term.

    Raises:
        ShapeError: another shape, which would be broadcast.
    """
    if tuple(weights.shape) != (rank,):
        raise ShapeError(
            f"weights of a {name} decomposition must have shape {(rank,)}; got "
            f"{tuple(weights.shape)}. Pass None where all are one."
        )
    return weights


def cores_of(decomposition: Any, name: str) -> list[Array]:
    """The cores of a chain, one per mode.

    Raises:
        ShapeError: something else, or fewer than a mixture has modes.
    """
    if is_array(decomposition):
        raise ShapeError(
            f"a {name} decomposition must be a list of arrays, as TensorLy returns it; got "
            f"{_described(decomposition)}."
        )
    return _listed(decomposition, name)


def cores_to_tensorly(factors: Mapping[str, Array], names: Sequence[str], xp: Any) -> list[Array]:
    """Mode-major cores (n, r, r′) as TensorLy's (r, n, r′)."""
    return [xp.permute_dims(factors[name], (1, 0, 2)) for name in names]


def cores_from_tensorly(cores: Sequence[Array], names: Sequence[str], xp: Any) -> dict[str, Array]:
    """TensorLy's cores (r, n, r′) as mode-major ones.

    Raises:
        ShapeError: an array of another number of axes.
    """
    for name, core in zip(names, cores, strict=True):
        if core.ndim != 3:
            raise ShapeError(
                f"{name!r} must have 3 axes, a bond, a mode and a bond; got shape "
                f"{tuple(core.shape)}."
            )
    moved = [xp.permute_dims(core, (1, 0, 2)) for core in cores]
    return {name: xp.asarray(core, copy=True) for name, core in zip(names, moved, strict=True)}


def is_array(value: Any) -> bool:
    """Whether a value is an array rather than a decomposition."""
    return hasattr(value, "dtype") and hasattr(value, "ndim")


def _listed(arrays: Any, name: str) -> list[Array]:
    found = [*arrays]
    if not all(is_array(each) for each in found):
        kinds = ", ".join(_described(each) for each in found)
        raise ShapeError(f"a {name} decomposition must be a list of arrays; got {kinds}.")
    if len(found) < _LEAST:
        raise ShapeError(
            f"a {name} decomposition must have at least {_LEAST} factors, one for every expert "
            f"level, the input and the output; got {len(found)}."
        )
    return found


def _described(value: Any) -> str:
    if is_array(value):
        return f"an array of shape {tuple(value.shape)}"
    try:
        return f"{type(value).__name__} of {len(value)}"
    except TypeError:
        return type(value).__name__
