"""TensorLy's layouts, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensormoe._registry import backend_of
from tensormoe.backend import Array
from tensormoe.factorizations._base import Factorization

__all__ = ["from_tensorly", "to_tensorly"]


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

    >>> import numpy as np
    >>> from tensormoe import CP
    >>> factors = {"expert_0": np.ones((3, 2)), "input": np.ones((5, 2)), "output": np.ones((4, 2))}
    >>> weights, arrays = to_tensorly(CP(2), factors | {"bias": np.zeros(2)})
    >>> [a.shape for a in arrays]
    [(3, 2), (6, 2), (4, 2)]
    """
    xp = backend_of(*factors.values()).namespace
    stored = dict(factors)
    if type(factorization).to_tensorly is Factorization.to_tensorly:
        # there is none: it says so before biases, which may be several, are put in their places
        return factorization.to_tensorly(stored, xp)
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
    """
    arrays = _flatten(decomposition)
    xp = backend_of(*arrays).namespace
    stored = factorization.from_tensorly(decomposition, xp)
    if bias:
        name = "weight" if "weight" in stored else "input"
        axis = stored[name].ndim - 2 if name == "weight" else 0
        place = (slice(None),) * axis
        stored["bias"] = xp.asarray(stored[name][(*place, -1)], copy=True)
        stored[name] = xp.asarray(stored[name][(*place, slice(None, -1))], copy=True)
    return stored


def _flatten(decomposition: Any) -> list[Array]:
    if isinstance(decomposition, (list, tuple)) or type(decomposition).__name__.endswith("Tensor"):
        parts: list[Array] = []
        if not hasattr(decomposition, "dtype"):
            for part in decomposition:
                parts.extend(_flatten(part))
            return parts
    return [] if decomposition is None else [decomposition]
