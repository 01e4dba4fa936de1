"""Standardization of logits before the activation: layer norm, batch norm or none, no affine part.

Rows are also shifted so that their largest entry is 0, which changes no coefficient and keeps the
precision of the entries near the top, the only ones that get coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeAlias

from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError
from tensormoe.gates._rows import Rows, blocks, check_logits, is_finite
from tensormoe.gates._threshold import OUTSIDE


@dataclass(frozen=True)
class LayerNorm:
    """spread · (x - mean) / √(variance + eps) over a token's own experts."""

    eps: float
    spread: float


@dataclass(frozen=True)
class Affine:
    """(x - mean) · scale with one mean and scale per expert: batch norm, once these are known."""

    mean: Array
    scale: Array


Standardize: TypeAlias = LayerNorm | Affine | None

Across: TypeAlias = Callable[[Array], Array]
"""The sum of an array over those that hold parts of one batch, the same for each; differentiable
where the backend is."""


@dataclass(frozen=True)
class Shifted:
    """Standardized logits times a factor, with 0 at the top of each row.

    Attributes:
        values: (rows, experts).
        usable: where experts may get a coefficient, or ``None`` for everywhere.
        lost: (rows, 1) booleans, rows with a NaN among the logits of usable experts; ``None`` where
            there is none.
    """

    values: Array
    usable: Array | None = None
    lost: Array | None = None


def shift(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: Standardize,
    factor: float,
) -> Shifted:
    """Standardize one block of rows, multiply by ``factor`` and bring each row's top to 0.

    Where a row has logits of +inf, these share it and the others stand aside, like those of -inf.
    Entries that do not count are replaced before they are computed with, so that neither values
    nor derivatives become NaN.
    """
    xp = backend.namespace
    shifted = _to_zero(backend, values, mask, first_row, how)
    values, usable = shifted.values, shifted.usable
    if isinstance(how, LayerNorm):
        _, variance, _ = row_moments(backend, values, usable, first_row)
        # subtracting the mean would change no coefficient
        values = values * (factor * how.spread / xp.sqrt(variance + how.eps))
    elif factor != 1.0:
        if factor > 1.0:  # nothing below OUTSIDE matters, and the product must not overflow
            values = xp.maximum(values, xp.full_like(values[:, :1], OUTSIDE))
        values = values * factor
    if usable is not None:
        values = xp.where(usable, values, xp.full_like(values[:, :1], OUTSIDE))
    return Shifted(values, usable, shifted.lost)


def _to_zero(
    backend: Backend, values: Array, mask: Array | None, first_row: int, how: Standardize
) -> Shifted:
    """Rows minus their largest usable entry, with 0 where experts are not usable."""
    xp = backend.namespace
    inf = float("inf")
    if mask is not None:
        values = xp.where(mask, values, xp.full_like(values[:, :1], -inf))
    logits = values
    if isinstance(how, Affine):
        values = scaled(backend, values, how)
    top = backend.stop_gradient(xp.max(values, axis=-1, keepdims=True))
    if backend.eager and mask is None and is_finite(xp, values, top):
        return Shifted(values - top)
    if backend.checks_values:
        check_logits(backend, logits, first_row)
    crowned = top == inf
    infinite = values == inf
    # in logic: ONNX runtimes choose no booleans by `where`
    usable = infinite | ((values != -inf) & ~crowned)
    zeros = xp.zeros_like(values[:, :1])
    # zero where a row has no finite top to be measured from
    level = xp.where(crowned | (top == -inf), zeros, top)
    values = xp.where(usable & ~infinite, values - level, zeros)
    return Shifted(values, usable, xp.isnan(top))


def scaled(backend: Backend, values: Array, how: Affine) -> Array:
    """(x - mean) · scale of (rows, experts) logits; infinite ones stay as they are."""
    if backend.eager:
        return (values - how.mean) * how.scale
    # an infinite logit would make derivatives NaN
    xp = backend.namespace
    live = ~xp.isinf(values)
    finite = xp.where(live, values, xp.zeros_like(values[:, :1]))
    return xp.where(live, (finite - how.mean) * how.scale, values)


def row_moments(
    backend: Backend, values: Array, usable: Array | None, first_row: int
) -> tuple[Array, Array, Array | float]:
    """Entries minus their mean, biased variance, and count of each row's usable entries.

    No entry is above 0, and those that are not usable are 0.
    """
    xp = backend.namespace
    rows, experts = values.shape
    widest = float((xp.finfo(values.dtype).max / experts) ** 0.5)
    if backend.checks_values and not -float(xp.min(values)) < widest:
        raise GateError(
            "logits must lie close enough together for their variance to be representable; "
            f"got more in rows {first_row} to {first_row + rows - 1}. Exclude experts with "
            "mask=... or -inf, not with a large negative number."
        )
    if usable is None:
        count: Array | float = float(experts)
    else:
        count = backend.row_sums(xp.astype(usable, values.dtype))
        count = xp.maximum(count, xp.ones_like(count))
    mean = backend.row_sums(values) / count
    centred = values - mean
    if usable is not None:
        centred = xp.where(usable, centred, xp.zeros_like(mean))
    return centred, backend.square_sums(centred) / count, count


def keep_nan(backend: Backend, shifted: Shifted, weights: Array) -> Array:
    """Coefficients with NaN throughout the rows that have a NaN logit, and in their gradients.

    Comparisons are false for NaN: an activation that leaves experts out by them would drop it.
    """
    xp = backend.namespace
    lost, values = shifted.lost, shifted.values
    if lost is None or (backend.eager and not bool(xp.any(lost))):
        return weights
    # a product, as a constant has no gradient, and one with 0 elsewhere, as a NaN that is not
    # chosen still gets into the gradient of what it is made of
    spoiled = xp.where(
        lost, xp.full_like(values[:, :1], float("nan")), 0.0 * xp.ones_like(values[:, :1])
    )
    return xp.where(lost, values * spoiled, weights)


def layer_norm_vjp(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: LayerNorm,
    cotangent: Array,
) -> Array:
    """The transpose of layer norm's derivative at ``values``, applied to ``cotangent``.

    Both are (rows, experts) blocks, and ``cotangent`` is overwritten. The activation's own
    derivative already makes it sum to zero over each row, up to rounding, which spares the term of
    the mean: it is spread · (g - unit ⟨unit, g⟩ / N) / √(variance + eps).
    """
    xp = backend.namespace
    shifted = _to_zero(backend, values, mask, first_row, how)
    usable = shifted.usable
    unit, variance, count = row_moments(backend, shifted.values, usable, first_row)
    del shifted  # an array of the block's size, of which there are at most three at once
    scale = 1.0 / xp.sqrt(variance + how.eps)
    unit *= scale
    if usable is not None:
        usable = usable & ~xp.isinf(values)
        unit = xp.where(usable, unit, xp.zeros_like(scale))
        cotangent = xp.where(usable, cotangent, xp.zeros_like(scale))
    unit *= xp.vecdot(unit, cotangent)[:, None] / count
    cotangent -= unit
    cotangent *= how.spread * scale
    return cotangent


def batch_moments(rows: Rows, across: Across | None = None) -> tuple[Array, Array, Array]:
    """Mean, biased variance and count of each expert's logits over the batch, each (1, experts).

    Masked and infinite logits do not count.

    Args:
        rows: the logits of this part of the batch.
        across: makes sums over all parts of the batch of sums over these rows.
    """
    backend, xp = rows.backend, rows.backend.namespace
    none = backend.sum(rows.values[:0, :], (0,))[None, :]
    plain = backend.eager and rows.mask is None and rows.values.shape[0] > 0
    plain = plain and is_finite(xp, rows.values, rows.values)

    def total(function: Callable[[Array, Array | None], Array]) -> Array:
        totals = [none]  # zeros, for a part without rows
        for start, stop in blocks(rows):
            values, live = rows.values[start:stop, :], None
            if not plain:
                live = ~xp.isinf(values)
                live = live if rows.mask is None else live & rows.mask[start:stop, :]
                values = xp.where(live, values, xp.zeros_like(values[:, :1]))
            totals.append(backend.sum(function(values, live), (0,))[None, :])
        return reduce(add, totals)

    if plain:
        count = xp.full_like(none, float(rows.values.shape[0]))
    else:
        count = total(lambda values, live: xp.astype(live, values.dtype))
    whole = total(lambda values, live: values)
    if across is not None:
        both = across(xp.concat((count, whole), axis=0))
        count, whole = both[:1, :], both[1:, :]
    divisor = xp.maximum(count, xp.ones_like(count))
    mean = whole / divisor

    def squares(values: Array, live: Array | None) -> Array:
        centred = values - mean
        if live is not None:
            centred = xp.where(live, centred, xp.zeros_like(values[:, :1]))
        return centred * centred

    spread = total(squares)
    return mean, (spread if across is None else across(spread)) / divisor, count
