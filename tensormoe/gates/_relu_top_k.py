"""Sparse coefficients that keep their size: the k largest logits above zero, not renormalized.

Coefficients of Mixture of Decoders (Oldfield et al. 2025, arXiv 2505.21364). Rows do not sum to
one, so a logit's distance from zero matters here, and not only that from the row's largest.
"""

from __future__ import annotations

from tensormoe.backend import Array, Backend, Selects, default_integer
from tensormoe.errors import GateError
from tensormoe.gates._normalization import (
    Affine,
    LayerNorm,
    Shifted,
    Standardize,
    keep_nan,
    row_moments,
)
from tensormoe.gates._rows import as_rows, check_logits, is_finite, map_rows
from tensormoe.gates._top_k import check_k, largest


def relu_top_k(logits: Array, k: int, axis: int = -1, mask: Array | None = None) -> Array:
    """Sparse coefficients: the k largest of max(x, 0), zero elsewhere, not renormalized.

    Oldfield et al. 2025, arXiv 2505.21364. A token has at most k experts, fewer where fewer logits
    are positive, and its coefficients sum to anything from 0 on. Ties go to the lower index.

    Args:
        logits: any shape, real floating point, as in :func:`entmax`, but that +inf has no
            coefficient: it is treated as NaN.
        k: the most experts of a token, from 1 to their number.
        axis: the axis of the experts.
        mask: booleans that broadcast to ``logits``, true where an expert may be used.

    Returns:
        Coefficients of the logits' shape, non-negative.

    Raises:
        GateError: ``k`` is out of range, or a logit is +inf where the backend checks values;
            otherwise as in :func:`entmax`.

    Example:
        >>> import numpy as np
        >>> relu_top_k(np.array([0.5, 3.0, 2.0, -1.0]), k=2)
        array([0., 3., 2., 0.])
        >>> relu_top_k(np.array([0.5, -3.0, -2.0, -1.0]), k=2)
        array([0.5, 0. , 0. , 0. ])
    """
    rows = as_rows(logits, axis, mask)
    check_k(k, rows.shape[-1])
    return rows.restore(
        map_rows(rows, lambda x, m, first: relu_top_k_block(rows.backend, x, m, first, None, k))
    )


def relu_top_k_block(
    backend: Backend, values: Array, mask: Array | None, first_row: int, how: Standardize, k: int
) -> Array:
    """Standardize a (rows, experts) block and keep its k largest entries above zero."""
    if values.shape[0] == 0:
        return values
    xp = backend.namespace
    found = _finite(backend, values, mask, first_row)
    values, usable = found.values, found.usable
    if isinstance(how, Affine):
        values = (values - how.mean) * how.scale
    elif isinstance(how, LayerNorm):
        centred, variance, _ = _moments(backend, found, first_row)
        values = centred * (how.spread / xp.sqrt(variance + how.eps))
    if usable is not None:
        values = xp.where(usable, values, xp.full_like(values[:, :1], -1.0))
    weights = xp.where(_kept(backend, values, k), values, xp.zeros_like(values[:, :1]))
    return keep_nan(backend, found, weights)


def _kept(backend: Backend, values: Array, k: int) -> Array:
    """Places of the k largest entries above zero."""
    xp = backend.namespace
    positive = values > 0.0
    if k == values.shape[-1]:
        return positive
    if backend.eager and isinstance(backend, Selects):
        # sorting takes ten times as long; entries equal to the k-th need it, to be told apart
        kept = positive & (values >= backend.kth_largest(values, k))
        counts = xp.sum(xp.astype(kept, default_integer(xp)), axis=-1)
        if int(xp.max(counts, axis=-1)) <= k:
            return kept
    return positive & largest(backend, values, k)[1]


def relu_top_k_vjp(weights: Array, cotangent: Array, backend: Backend) -> Array:
    """The transpose of the derivative of :func:`relu_top_k`: the cotangent of what is in use."""
    xp = backend.namespace
    # zero, but where the coefficients are NaN
    return xp.where(weights > 0.0, cotangent, weights * 0.0)


def centred_layer_norm_vjp(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: LayerNorm,
    cotangent: Array,
) -> Array:
    """The transpose of layer norm's derivative at ``values``, the term of the mean included.

    ``cotangent`` is zero where experts are not usable, and is overwritten. Activations
    that are blind to a shift of all logits need no such term.
    """
    xp = backend.namespace
    found = _finite(backend, values, mask, first_row)
    unit, variance, count = _moments(backend, found, first_row)
    scale = 1.0 / xp.sqrt(variance + how.eps)
    unit *= scale
    unit *= xp.vecdot(unit, cotangent)[:, None] / count
    cotangent -= backend.row_sums(cotangent) / count
    cotangent -= unit
    cotangent *= how.spread * scale
    if found.usable is not None:
        cotangent = xp.where(found.usable, cotangent, xp.zeros_like(scale))
    return cotangent


def _finite(backend: Backend, values: Array, mask: Array | None, first_row: int) -> Shifted:
    """Logits with 0 where experts are not usable, and which rows have one without a coefficient."""
    xp = backend.namespace
    inf = float("inf")
    if mask is not None:
        values = xp.where(mask, values, xp.full_like(values[:, :1], -inf))
    top = backend.stop_gradient(xp.max(values, axis=-1, keepdims=True))
    if backend.eager and mask is None and is_finite(xp, values, top):
        return Shifted(values)
    if backend.checks_values:
        check_logits(backend, values, first_row)
        if bool(xp.any(top == inf)):
            row = first_row + int(xp.argmax(xp.astype(top[:, 0] == inf, xp.int32)))
            raise GateError(
                f"logits of relu_top_k must be finite or -inf; got inf in row {row}. Look for an "
                "overflow in the layers before the gate."
            )
    usable = ~xp.isinf(values)
    values = xp.where(usable, values, xp.zeros_like(values[:, :1]))
    return Shifted(values, usable, xp.isnan(top) | (top == inf))


def _moments(
    backend: Backend, found: Shifted, first_row: int
) -> tuple[Array, Array, Array | float]:
    """Entries minus their mean, biased variance, and count of each row's usable entries."""
    xp = backend.namespace
    values, usable = found.values, found.usable
    # moments are of entries below zero, which loses no digits of rows far from it
    level = backend.stop_gradient(xp.max(values, axis=-1, keepdims=True))
    values = values - level
    if usable is not None:
        values = xp.where(usable, values, xp.zeros_like(level))
    return row_moments(backend, values, usable, first_row)
