"""The output of a layer, computed by code that shares nothing with the library's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorly

from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Factorization, to_tensorly

Doubles = npt.NDArray[np.float64]

_KNOWN = (
    *("cp", "tensor_ring", "tensor_train", "tucker", "low_rank", "shared_basis"),
    *("base_delta", "shared_delta", "hadamard", "dense"),
)
_EXPERTS = "abcdefgh"
_BONDS = "pqrstuvwxyz"


def reconstruct(factorization: Factorization, factors: Mapping[str, Any]) -> Doubles:
    """𝒲 by TensorLy's reconstruction of the factors' TensorLy layout, in float64.

    Factorizations that TensorLy does not have are multiplied out expert by expert, as the papers
    define them.

    Args:
        factorization: one that comes with the library.
        factors: arrays by name, as a layer's ``factors``; anything that NumPy can read.

    Returns:
        (experts…, in, out); (experts…, in + 1, out) if there is a bias, which is the last row of
        the input mode, as in Oldfield et al. 2024, section 3.1.

    Raises:
        SpecError: another factorization.

    >>> import numpy as np
    >>> from tensormoe import CP
    >>> factors = {"expert_0": np.eye(2), "input": np.ones((3, 2)), "output": np.ones((4, 2))}
    >>> reconstruct(CP(2), factors).shape
    (2, 3, 4)
    """
    if factorization.name == "shared_basis":
        return _shared_basis(*_with_bias_row(_doubles(factors)))
    if factorization.name in ("low_rank", "base_delta", "shared_delta"):
        return _base_delta(_with_bias_row(_doubles(factors))[0])
    read: Callable[[Any], Any]
    # here, not at the top: the default backend may be another one when this is imported
    if factorization.name in ("cp", "hadamard"):
        read = tensorly.cp_to_tensor
    elif factorization.name == "tensor_ring":
        read = tensorly.tr_to_tensor
    elif factorization.name == "tensor_train":
        read = tensorly.tt_to_tensor
    elif factorization.name == "tucker":
        read = tensorly.tucker_to_tensor
    elif factorization.name == "dense":
        read = np.asarray
    else:
        raise SpecError(
            f"only the library's own factorizations can be reconstructed; got {factorization!r}. "
            "Compare with an einsum of your own."
        )
    with tensorly.backend_context("numpy", local_threadsafe=True):
        return np.asarray(read(to_tensorly(factorization, _doubles(factors))))


def reconstruct_by_einsum(factorization: Factorization, factors: Mapping[str, Any]) -> Doubles:
    """𝒲 by one ``numpy.einsum`` over the factors as they are stored, in float64.

    The equations are written out for each factorization and know nothing of TensorLy's layouts, so
    that a wrong layout and a wrong network are told apart.

    Args:
        factorization: one that comes with the library.
        factors: arrays by name, as a layer's ``factors``; anything that NumPy can read.

    Returns:
        (experts…, in, out); (experts…, in + 1, out) if there is a bias.

    Raises:
        SpecError: another factorization.
    """
    if factorization.name not in _KNOWN:
        raise SpecError(
            f"equations are known for the library's own factorizations; got {factorization!r}. "
            "Compare with an einsum of your own."
        )
    arrays, in_features = _with_bias_row(_doubles(factors))
    if factorization.name == "dense":
        return arrays["weight"]
    levels = sum(name.startswith("expert_") for name in arrays)
    experts = _EXPERTS[:levels]
    modes = experts + "io"
    names = [*(f"expert_{level}" for level in range(levels)), "input", "output"]
    if factorization.name == "cp":
        terms = [mode + "r" for mode in modes]
    elif factorization.name == "hadamard":
        names.pop()
        terms = [mode + "o" for mode in modes[:-1]]
    elif factorization.name == "tensor_ring":
        bonds = _BONDS[: len(modes)]
        terms = [m + bonds[k] + bonds[(k + 1) % len(modes)] for k, m in enumerate(modes)]
    elif factorization.name == "tensor_train":
        bonds = _BONDS[: len(modes) - 1]
        inner = [m + bonds[k] + bonds[k + 1] for k, m in enumerate(modes[1:-1])]
        terms = [modes[0] + bonds[0], *inner, modes[-1] + bonds[-1]]
    elif factorization.name == "tucker":
        bonds = _BONDS[: len(modes)]
        names.insert(0, "core")
        terms = [bonds, *(m + bond for m, bond in zip(modes, bonds, strict=True))]
    elif factorization.name in ("low_rank", "base_delta", "shared_delta"):
        left, right = arrays["input"], arrays["output"]
        experts = _EXPERTS[: max(left.ndim, right.ndim) - 2]
        terms = [f"{mode}{experts[: side.ndim - 2]}r" for mode, side in (("i", left), ("o", right))]
        deltas: Doubles = np.einsum(f"{','.join(terms)}->{experts}io", left, right)
        return arrays.get("base", 0.0) + deltas
    else:
        names = ["mixing", "input", "output"]
        experts = _EXPERTS[: arrays["mixing"].ndim - 1]
        modes = experts + "io"
        terms = [experts + "x", "ixr", f"o{experts}r"]
        if in_features < arrays["output"].shape[0]:
            terms = [experts + "x", f"i{experts}r", "oxr"]
    operands = [arrays[name] for name in names]
    result: Doubles = np.einsum(f"{','.join(terms)}->{modes}", *operands, optimize=True)
    return result


def reference_output(weights: Any, coefficients: Sequence[Any], x: Any) -> Doubles:
    """Y = Σ a₁[n₁] … a_E[n_E] ``[x, 1]``ᵀ 𝒲[n₁, …, n_E], by one ``numpy.einsum`` in float64.

    This is the definition of the layer (Oldfield et al. 2024, eq. 1), with every weight explicit.

    Args:
        weights: 𝒲 (experts…, in, out), or (experts…, in + 1, out) with the bias as its last row.
        coefficients: one array (..., N_e) per level.
        x: inputs (..., in).

    Returns:
        (..., out).

    Raises:
        ShapeError: the input has neither as many features as 𝒲, nor one less.

    >>> import numpy as np
    >>> weights = np.arange(12.0).reshape(2, 3, 2)  # two experts, 2 → 2, with bias
    >>> reference_output(weights, [np.array([0.0, 1.0])], np.array([1.0, 0.0]))
    array([16., 18.])
    """
    full = np.asarray(weights, dtype=np.float64)
    rows = np.asarray(x, dtype=np.float64)
    if full.shape[-2] == rows.shape[-1] + 1:
        rows = np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], axis=-1)
    if full.shape[-2] != rows.shape[-1]:
        raise ShapeError(
            f"x must have {full.shape[-2]} features, or {full.shape[-2] - 1} beside a bias row; "
            f"got shape {rows.shape}. Check which weights belong to the input."
        )
    experts = _EXPERTS[: len(coefficients)]
    terms = [f"{experts}io", *(f"...{mode}" for mode in experts), "...i"]
    given = [np.asarray(each, dtype=np.float64) for each in coefficients]
    result: Doubles = np.einsum(f"{','.join(terms)}->...o", full, *given, rows)
    return result


def _shared_basis(arrays: Mapping[str, Doubles], in_features: int) -> Doubles:
    """(Σ α B) A, or A Σ α B where the output is larger than the input, expert by expert."""
    mixing, left, right = (arrays[name] for name in ("mixing", "input", "output"))
    experts = mixing.shape[:-1]
    result = np.empty((*experts, left.shape[0], right.shape[0]))
    for index in np.ndindex(experts):
        if in_features >= right.shape[0]:
            matrices = [np.tensordot(left, mixing[index], axes=(1, 0)), right[:, *index]]
        else:
            matrices = [left[:, *index], np.tensordot(right, mixing[index], axes=(1, 0))]
        result[index] = matrices[0] @ matrices[1].T
    return result


def _base_delta(arrays: Mapping[str, Doubles]) -> Doubles:
    """B + U V, or U V, expert by expert; a side without experts is that of all of them."""
    left, right = arrays["input"], arrays["output"]
    base = arrays.get("base", np.zeros((left.shape[0], right.shape[0])))
    experts = max(left.shape, right.shape, key=len)[1:-1]
    result = np.empty((*experts, *base.shape))
    for index in np.ndindex(experts):
        own = [side if side.ndim == 2 else side[:, *index] for side in (left, right)]
        result[index] = base + own[0] @ own[1].T
    return result


def _with_bias_row(arrays: dict[str, Doubles]) -> tuple[dict[str, Doubles], int]:
    """Biases as last rows of the arrays with the input mode, whose size without comes along."""
    name = "weight" if "weight" in arrays else "input"
    axis = -2 if name == "weight" else 0
    size = arrays[name].shape[axis]
    rows = {"bias": "base" if "base" in arrays else name, "bias_1": "input"}
    for bias, carrier in rows.items():
        if bias in arrays:
            row = np.expand_dims(arrays.pop(bias), axis)
            arrays[carrier] = np.concatenate([arrays[carrier], row], axis=axis)
    return arrays, size


def _doubles(factors: Mapping[str, Any]) -> dict[str, Doubles]:
    return {name: np.asarray(array, dtype=np.float64) for name, array in factors.items()}
