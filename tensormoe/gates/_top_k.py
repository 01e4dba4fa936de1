"""Hard routing: softmax over the k largest logits, dense or indexed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensormoe.backend import Array, Backend, default_integer, device_of
from tensormoe.errors import GateError
from tensormoe.gates._functions import _softmax
from tensormoe.gates._normalization import Shifted, Standardize, keep_nan, shift
from tensormoe.gates._rows import as_rows, map_rows

# up to here, k passes over the logits are cheaper than a stable sort of them
_PASSES = 8


@dataclass(frozen=True, eq=False)
class TopK:
    """Coefficients of k experts per token, the others being zero.

    Attributes:
        indices: (..., k) integers, the largest logit first.
        values: (..., k) coefficients that sum to one.
    """

    indices: Array
    values: Array


def check_k(k: object, experts: int | None = None) -> int:
    """``k`` as a positive integer, at most ``experts``."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise GateError(
            f"k must be a positive integer; got {k!r}. Give the number of experts per token."
        )
    if experts is not None and k > experts:
        raise GateError(
            f"k must be at most the number of experts, {experts}; got {k}. Lower k or add experts."
        )
    return k


def largest(backend: Backend, values: Array, k: int) -> tuple[Array, Array]:
    """The k largest entries, ties to the lower index: indices (rows, k) and (rows, N) booleans."""
    xp = backend.namespace
    values = backend.stop_gradient(values)
    experts = values.shape[-1]
    columns = xp.arange(experts, device=device_of(values))[None, :]
    if k > _PASSES:
        # stable in ascending order of the negatives: ties go to the lower index
        order = xp.argsort(-values, axis=-1, stable=True)
        # the rank of each expert is the argsort of the order
        ranks = xp.argsort(order, axis=-1, stable=True)
        return order[:, :k], ranks < k
    # experts of logit -inf come after all others, but before those chosen already
    values = xp.maximum(values, xp.full_like(values[:, :1], float(xp.finfo(values.dtype).min)))
    indices = []
    chosen = xp.zeros_like(values, dtype=xp.bool)
    lowest = xp.full_like(values[:, :1], -float("inf"))
    for _ in range(k):
        index = xp.argmax(values, axis=-1, keepdims=True)
        here = columns == index
        chosen = chosen | here
        values = xp.where(here, lowest, values)
        indices.append(index)
    return xp.concat(indices, axis=-1), chosen


def top_k_block(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: Standardize,
    k: int,
    choice: Array | None = None,
) -> Array:
    """Standardize a (rows, experts) block and keep the softmax of its k largest entries.

    ``choice``, (rows, experts) or (1, experts), is added to find the largest and left out after.
    """
    if values.shape[0] == 0:
        return values
    xp = backend.namespace
    shifted = shift(backend, values, mask, first_row, how, 1.0)
    chosen = _chosen(xp, backend, shifted, k, choice)
    if shifted.usable is not None:
        chosen = chosen & shifted.usable
    return keep_nan(backend, shifted, _softmax(backend, Shifted(shifted.values, chosen)))


def _chosen(xp: Any, backend: Backend, shifted: Shifted, k: int, choice: Array | None) -> Array:
    values = shifted.values if choice is None else shifted.values + choice
    if shifted.usable is not None:
        values = xp.where(shifted.usable, values, xp.full_like(values, -float("inf")))
    return largest(backend, values, k)[1]


def top_k(logits: Array, k: int, axis: int = -1, mask: Array | None = None) -> Array:
    """Dense coefficients with exactly k experts: softmax over the k largest logits, zero elsewhere.

    Shazeer et al. 2017, eq. 3 to 5, without noise. Ties go to the lower index. A token with fewer
    than k usable experts uses those it has.

    Args:
        logits: any shape, real floating point, as in :func:`entmax`.
        k: experts per token, from 1 to their number.
        axis: the axis of the experts.
        mask: booleans that broadcast to ``logits``, true where an expert may be used.

    Returns:
        Coefficients of the logits' shape, summing to one along ``axis``.

    Raises:
        GateError: ``k`` is out of range; otherwise as in :func:`entmax`.

    Example:
        >>> import numpy as np
        >>> top_k(np.array([0.0, 2.0, 2.0, 1.0]), k=2)
        array([0. , 0.5, 0.5, 0. ])
    """
    rows = as_rows(logits, axis, mask)
    check_k(k, rows.shape[-1])
    return rows.restore(
        map_rows(rows, lambda x, m, first: top_k_block(rows.backend, x, m, first, None, k))
    )


def top_k_indices(logits: Array, k: int) -> TopK:
    """The same coefficients in indexed form, for layers that gather k experts per token.

    Args:
        logits: (..., experts), real floating point, with at least k usable experts per token.
        k: experts per token, from 1 to their number.

    Returns:
        Indices and coefficients, (..., k) each, the largest logit first. Experts of logit -inf
        have coefficient 0.

    Raises:
        GateError: as in :func:`top_k`.

    Example:
        >>> import numpy as np
        >>> top_k_indices(np.array([0.0, 2.0, 2.0, 1.0]), k=2)
        TopK(indices=array([1, 2]), values=array([0.5, 0.5]))
    """
    rows = as_rows(logits)
    backend, xp = rows.backend, rows.backend.namespace
    check_k(k, rows.shape[-1])
    shape = (*rows.shape[:-1], k)
    if rows.values.shape[0] == 0:
        return TopK(
            xp.zeros(shape, dtype=default_integer(xp), device=device_of(rows.values)),
            xp.zeros(shape, dtype=rows.values.dtype, device=device_of(rows.values)),
        )
    shifted = shift(backend, rows.values, None, 0, None, 1.0)
    values, usable = shifted.values, shifted.usable
    if usable is not None:
        values = xp.where(usable, values, xp.full_like(values, -float("inf")))
    indices, _ = largest(backend, values, k)
    picked = xp.take_along_axis(shifted.values, indices, axis=-1)
    if usable is not None:
        usable = xp.take_along_axis(usable, indices, axis=-1)
    some = Shifted(picked, usable, lost=shifted.lost)
    weights = keep_nan(backend, some, _softmax(backend, some))
    return TopK(backend.reshape(indices, shape), backend.reshape(weights, shape))


def top_k_indices_vjp(chosen: TopK, cotangent: Array, experts: int) -> Array:
    """The gradient with respect to the logits of :func:`top_k_indices`.

    Args:
        chosen: the result of :func:`top_k_indices`.
        cotangent: (..., k), the derivative with respect to ``chosen.values``.
        experts: logits per token.

    Returns:
        (..., experts); zero for experts that were not chosen.

    Example:
        >>> import numpy as np
        >>> chosen = top_k_indices(np.array([0.0, 2.0, 2.0, 1.0]), k=2)
        >>> top_k_indices_vjp(chosen, np.array([1.0, 0.0]), experts=4)
        array([ 0.  ,  0.25, -0.25,  0.  ])
    """
    rows = as_rows(chosen.values)
    backend, xp = rows.backend, rows.backend.namespace
    if tuple(cotangent.shape) != rows.shape:
        raise GateError(
            f"cotangent must have the values' shape {rows.shape}; got {tuple(cotangent.shape)}. "
            "Pass the derivative with respect to chosen.values."
        )
    weights = rows.values
    cotangent = backend.reshape(cotangent, tuple(weights.shape))
    gradient = weights * (cotangent - xp.sum(weights * cotangent, axis=-1, keepdims=True))
    count = weights.shape[0]
    indices = backend.reshape(chosen.indices, tuple(weights.shape))
    flat = backend.reshape(
        indices + xp.arange(count, device=device_of(indices))[:, None] * experts, (-1,)
    )
    spread = backend.scatter_add(backend.reshape(gradient, (-1,)), flat, 0, count * experts)
    return backend.reshape(spread, (*rows.shape[:-1], experts))
