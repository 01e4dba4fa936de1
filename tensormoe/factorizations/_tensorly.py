"""TensorLy's layouts, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensormoe._validation import flag, instance
from tensormoe.backend import Array, backend_of
from tensormoe.errors import ShapeError
from tensormoe.factorizations._base import Factorization
from tensormoe.factorizations._network import INPUT, OUTPUT, Leg, expert_leg


def to_tensorly(factorization: Factorization, factors: Mapping[str, Array]) -> Any:
    """Factors as TensorLy's decomposition of 𝒲, without copies where the library has views.

    With a bias, the input mode of the result has size in + 1 and its last row is the bias, as in
    Oldfield et al. 2024 (section 3.1).

    Args:
        factorization: how the factors are to be read.
        factors: arrays by name, as a layer's ``factors``.

    Returns:
        What ``cp_to_tensor`` (CP, Hadamard), ``tr_to_tensor`` (tensor ring), ``tt_to_tensor``
        (tensor train) or ``tucker_to_tensor`` (Tucker) of TensorLy take; the full tensor (Dense).

    Raises:
        LayoutError: TensorLy has no such decomposition.
        ShapeError: factors that are missing, or whose names, shapes or dtypes are not a layer's.
        BackendError: arrays of an unknown library, or of several.
        TypeError: not a value of a factorization.

    >>> import numpy as np
    >>> from tensormoe import CP
    >>> factors = {"expert_0": np.ones((3, 2)), "input": np.ones((5, 2)), "output": np.ones((4, 2))}
    >>> weights, arrays = to_tensorly(CP(2), factors | {"bias": np.zeros(2)})
    >>> [a.shape for a in arrays]
    [(3, 2), (6, 2), (4, 2)]
    """
    _check_value(factorization)
    instance(factors, Mapping, "factors", "a mapping from names to arrays", ShapeError)
    xp = backend_of(*factors.values()).namespace
    stored = dict(factors)
    if type(factorization).to_tensorly is Factorization.to_tensorly:
        # there is none: it says so before biases, which may be several, are put in their places
        return factorization.to_tensorly(stored, xp)
    _check_dtypes([*stored.values()], xp)
    order = _check_shapes(factorization, stored)
    stored = {name: stored[name] for name in order}
    if "bias" in stored:
        name = "weight" if "weight" in stored else "input"
        axis = stored[name].ndim - 2 if name == "weight" else 0
        row = xp.expand_dims(stored.pop("bias"), axis=axis)
        stored[name] = xp.concat([stored[name], row], axis=axis)
    return factorization.to_tensorly(stored, xp)


def from_tensorly(
    factorization: Factorization, decomposition: Any, *, bias: bool
) -> dict[str, Array]:
    """Factors from TensorLy's decomposition of 𝒲; the inverse of :func:`to_tensorly`.

    Args:
        factorization: which decomposition it is, with its rank.
        decomposition: what TensorLy's decomposition of that name returns.
        bias: whether the last row of the input mode is the bias.

    Returns:
        Arrays by name, each its own copy in mode-major order.

    Raises:
        LayoutError: TensorLy has no such decomposition.
        ShapeError: a decomposition of another kind, rank or number of factors.
        BackendError: arrays of an unknown library, or of several.
        TypeError: not a value of a factorization.
    """
    _check_value(factorization)
    flag(bias, "bias", ShapeError)
    arrays = _flatten(decomposition)
    xp = backend_of(*arrays).namespace
    if type(factorization).from_tensorly is not Factorization.from_tensorly:
        _check_dtypes(arrays, xp)
    stored = factorization.from_tensorly(decomposition, xp)
    _check_shapes(factorization, stored)
    if bias:
        rows = stored["weight"].shape[-2] if "weight" in stored else stored["input"].shape[0]
        if rows < 2:
            raise ShapeError(
                "the input mode must have two rows or more where the last row of the input mode is "
                f"the bias; got {rows}. Pass bias=False if there is none."
            )
        name = "weight" if "weight" in stored else "input"
        axis = stored[name].ndim - 2 if name == "weight" else 0
        place = (slice(None),) * axis
        stored["bias"] = xp.asarray(stored[name][(*place, -1)], copy=True)
        stored[name] = xp.asarray(stored[name][(*place, slice(None, -1))], copy=True)
    return stored


def _flatten(decomposition: Any, depth: int = 0) -> list[Array]:
    if depth > 3:
        raise ShapeError(
            "a decomposition must be arrays and lists of them; got lists nested too deeply. Pass "
            "what TensorLy returns."
        )
    if isinstance(decomposition, (list, tuple)) or type(decomposition).__name__.endswith("Tensor"):
        parts: list[Array] = []
        if not hasattr(decomposition, "dtype"):
            for part in decomposition:
                parts.extend(_flatten(part, depth + 1))
            return parts
    return [] if decomposition is None else [decomposition]


def _check_value(factorization: Any) -> None:
    if not isinstance(factorization, Factorization):
        raise TypeError(
            f"factorization must be a value such as CP(rank=64); got {factorization!r}. Its rank "
            "says how the arrays are to be read."
        )


def _check_dtypes(arrays: list[Array], xp: Any) -> None:
    """Refuse arrays of several dtypes, or of other than real floating-point ones."""
    dtypes = list(dict.fromkeys(array.dtype for array in arrays))
    if len(dtypes) > 1 or not xp.isdtype(dtypes[0], "real floating"):
        raise ShapeError(
            "factors must have one real floating-point dtype; got "
            f"{' and '.join(map(str, dtypes))}. Cast them."
        )


def _check_shapes(factorization: Factorization, arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """Refuse arrays that are not a layer's factors of this factorization; return their order.

    Raises:
        ShapeError: a name or a shape that does not fit the others, or the rank.
    """
    most = len(arrays) + max(array.ndim for array in arrays.values())
    for levels in range(1, most):
        listed = factorization.factors(levels)
        if {each.name for each in listed} == {*arrays} - {"bias"}:
            if len(listed) == 1 and len(listed[0].legs) != arrays[listed[0].name].ndim:
                continue  # one name at any number of levels
            break
    else:
        names = [each.name for each in factorization.factors(1)]
        raise ShapeError(
            f"factors of {factorization!r} must be named {', '.join(names)}, one for each expert "
            f"level, and bias if there is one; got {', '.join(arrays)}."
        )
    sizes: dict[Leg, int] = {}
    for factor in listed:
        for leg, size in zip(factor.legs, arrays[factor.name].shape, strict=False):
            sizes.setdefault(leg, size)
    modes = [sizes.get(leg, 0) for leg in (*map(expert_leg, range(levels)), INPUT, OUTPUT)]
    if not all(modes):
        raise ShapeError(f"modes must have positive sizes; got {tuple(modes)}.")
    *experts, rows, columns = modes
    shapes = factorization.network(tuple(experts), rows, columns, "bias" in arrays).shapes
    for name, shape in shapes.items():
        found = tuple(arrays[name].shape)
        if found != shape:
            raise ShapeError(
                f"{name!r} must have shape {shape} for {factorization!r} and the other factors; "
                f"got {found}."
            )
    return tuple(shapes)
