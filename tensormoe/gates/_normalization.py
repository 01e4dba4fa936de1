"""What happens to logits before the activation: layer norm, batch norm or nothing, no affine.

Everything here also shifts each row so that its largest entry is 0, which changes no coefficient
and lets the entries near the top, the ones that get coefficients, keep their precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, exp, pi, sqrt
from typing import Any, TypeAlias

from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError
from tensormoe.gates._rows import Rows, all_finite, blocks, finite
from tensormoe.gates._threshold import OUTSIDE


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / √(variance + eps) over a token's own experts."""

    eps: float


@dataclass(frozen=True)
class Affine:
    """(x - mean) · scale with a mean and a scale an expert: batch norm, once these are known."""

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
        start: (rows, 1), where the threshold of an entmax-1.5 is probably found, or ``None``.
        lost: (rows, 1) booleans, rows with a NaN among the logits of usable experts; ``None`` where
            there is none.
    """

    values: Array
    usable: Array | None
    start: Array | None = None
    lost: Array | None = None


def shift(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: Standardize,
    factor: float,
    guess: bool = False,
) -> Shifted:
    """Standardize one block of rows, multiply by ``factor`` and bring each row's top to 0."""
    if backend.eager and mask is None:
        plain = _shift_plain(backend, values, how, factor, guess)
        if plain is not None:
            return plain
    if mask is None and not backend.checks_values and not isinstance(how, Affine):
        return _shift_traced(backend, values, how, factor)
    return _shift_careful(backend, values, mask, first_row, how, factor)


def _shift_plain(
    backend: Backend, values: Array, how: Standardize, factor: float, guess: bool
) -> Shifted | None:
    """The short way, for blocks that turn out to hold no NaN and no infinity that matters."""
    xp = backend.namespace
    if isinstance(how, Affine):
        values = (values - how.mean) * how.scale
    top = backend.stop_gradient(xp.max(values, axis=-1, keepdims=True))
    if not all_finite(xp, top):
        return None
    values = values - top
    if not isinstance(how, LayerNorm):
        return Shifted(_times(xp, values, factor), None)
    moments = _row_moments(backend, values, None)
    if moments is None:
        return None
    mean, variance = moments
    scale = factor / xp.sqrt(variance + how.eps)
    start = None
    if guess:
        experts = values.shape[-1]
        # τ is at most -1/√N, which it reaches where all entries tie
        start = backend.stop_gradient(mean * scale + usual_threshold(experts))
        start = xp.minimum(start, xp.full_like(start, -(experts**-0.5)))
        start = xp.maximum(start, xp.full_like(start, -1.0))
    return Shifted(values * scale, None, start)


def _shift_traced(backend: Backend, values: Array, how: LayerNorm | None, factor: float) -> Shifted:
    """For libraries that look at no values: four sums over a row at most, infinities included.

    Where a logit is +inf, it and its like share the row; those of -inf stand aside.
    """
    xp = backend.namespace
    inf = float("inf")
    top = backend.stop_gradient(xp.max(values, axis=-1, keepdims=True))
    crowned = top == inf
    # zero where a row has no finite top to be measured from
    level = xp.where(crowned | (top == -inf), xp.zeros_like(top), top)
    infinite = values == inf
    outside = (values == -inf) | (crowned & ~infinite)
    zeros = xp.zeros_like(values)
    values = xp.where(infinite | outside, zeros, values - level)
    if how is not None:
        count = backend.row_sums(xp.astype(~outside, values.dtype))
        count = xp.maximum(count, xp.ones_like(count))
        mean = backend.row_sums(values) / count
        centred = xp.where(outside, zeros, values - mean)
        variance = backend.square_sums(centred) / count
        values = values * (factor / xp.sqrt(variance + how.eps))
        factor = 1.0
    values = xp.where(outside, zeros + OUTSIDE, _times(xp, values, factor))
    return Shifted(values, ~outside, lost=xp.isnan(top))


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


def _times(xp: Any, values: Array, factor: float) -> Array:
    if factor == 1.0:
        return values
    if factor > 1.0:  # nothing below OUTSIDE matters, and the product must not overflow
        values = xp.maximum(values, xp.full_like(values[:, :1], OUTSIDE))
    return values * factor


def _shift_careful(
    backend: Backend,
    values: Array,
    mask: Array | None,
    first_row: int,
    how: Standardize,
    factor: float,
) -> Shifted:
    xp = backend.namespace
    split = finite(backend, values, mask, first_row)
    values, usable = split.values, split.usable
    zeros = xp.zeros_like(values)
    if isinstance(how, Affine):
        values = xp.where(split.live, (values - how.mean) * how.scale, zeros)
    lost = None
    if not backend.checks_values:
        lost = xp.isnan(_top(backend, values, split.live))
        # an infinite logit does not have such a row to itself
        usable = xp.where(lost, split.live, usable)
    if isinstance(how, LayerNorm):
        values = values - _top(backend, values, split.live)
        values = xp.where(split.live, values, zeros)
        moments = _row_moments(backend, values, split.live)
        if moments is None:
            raise GateError(
                "logits must lie close enough together for their variance to be representable; "
                f"got more in rows {first_row} to {first_row + values.shape[0] - 1}. Exclude "
                "experts with mask=... or -inf, not with a large negative number."
            )
        mean, variance = moments
        values = (values - mean) / xp.sqrt(variance + how.eps)
    # infinite logits stand level with each other and alone in their row
    values = xp.where(split.infinite, zeros, values)
    values = values - _top(backend, values, usable)
    values = xp.where(usable, values, zeros)
    values = xp.where(usable, _times(xp, values, factor), zeros + OUTSIDE)
    return Shifted(values, usable, lost=lost)


def _top(backend: Backend, values: Array, where: Array) -> Array:
    xp = backend.namespace
    lowest = xp.full_like(values, -float("inf"))
    top = xp.max(xp.where(where, values, lowest), axis=-1, keepdims=True)
    some = xp.any(where, axis=-1, keepdims=True)
    return backend.stop_gradient(xp.where(some, top, xp.zeros_like(top)))


def _row_moments(backend: Backend, values: Array, live: Array | None) -> tuple[Array, Array] | None:
    """Mean and biased variance of each row, (rows, 1).

    Args:
        backend: the adapter of ``values``.
        values: (rows, experts), none above 0; 0 where not ``live``.
        live: the experts that count, or ``None`` for all.

    Returns:
        ``None`` where a square might overflow with ``live`` ``None``, or, on a backend that checks
        values, is seen to.
    """
    xp = backend.namespace
    experts = values.shape[-1]
    widest = float((xp.finfo(values.dtype).max / experts) ** 0.5)
    if live is None:
        mean = backend.row_sums(values) * (1.0 / experts)
        # no entry is above 0, so none lies further down than the sum; NaN fails the test too
        if not -float(xp.min(backend.stop_gradient(mean))) * experts < widest:
            return None
        centred = values - mean
        return mean, backend.square_sums(centred) * (1.0 / experts)
    if backend.checks_values and not -float(xp.min(values)) < widest:
        return None
    count = backend.row_sums(xp.astype(live, values.dtype))
    count = xp.maximum(count, xp.ones_like(count))
    mean = backend.row_sums(values) / count
    centred = xp.where(live, values - mean, xp.zeros_like(values))
    return mean, backend.square_sums(centred) / count


# mean² up to this many variances costs the variance no more than two digits
_OFF_CENTRE = 16.0


def off_centre(mean: Array, variance: Array) -> Array:
    """Where E[x²] - E[x]² is no good variance: logits far off center."""
    return mean * mean > _OFF_CENTRE * variance


@lru_cache(maxsize=64)
def usual_threshold(experts: int) -> float:
    """The entmax-1.5 threshold, relative to the mean, of many standard normal logits.

    It solves N E[max(g/2 - τ, 0)²] = 1 for a normal g. Layer norm makes it the threshold of most
    rows, nearly; as a start of Newton's method it needs not be right, and saves a third of it.

    >>> round(usual_threshold(1024), 3)
    1.065
    """
    high = sqrt(float(experts))
    low = -high
    for _ in range(60):
        middle = (low + high) / 2.0
        u = 2.0 * middle
        tail = 0.5 * erfc(u / sqrt(2.0))
        density = exp(-u * u / 2.0) / sqrt(2.0 * pi)
        above = experts * 0.25 * ((1.0 + u * u) * tail - u * density) > 1.0
        low, high = (middle, high) if above else (low, middle)
    return low


def batch_moments(rows: Rows, across: Across | None = None) -> tuple[Array, Array, Array]:
    """Mean, biased variance and count of each expert's logits over the batch, each (1, experts).

    Masked and infinite logits do not count.

    Args:
        rows: the logits that are here.
        across: makes sums over all parts of the batch of sums over these rows.
    """
    backend, xp = rows.backend, rows.backend.namespace
    # zeros, also where no row is here
    none = backend.sum(rows.values[:0, :], (0,))[None, :]

    def add(function: Callable[[Array, Array | None], Array]) -> Array:
        total = none
        for start, stop in blocks(rows):
            block = rows.values[start:stop, :]
            mask = None if rows.mask is None else rows.mask[start:stop, :]
            split = None if plain else finite(backend, block, mask, start)
            live = None if split is None else split.live
            block = block if split is None else split.values
            total = total + backend.sum(function(block, live), (0,))[None, :]
        return total

    # the plain sum shows whether anything is infinite, if it may be looked at
    plain = backend.eager and rows.mask is None
    if plain:
        tops = xp.max(xp.abs(backend.stop_gradient(rows.values)), axis=-1)
        plain = all_finite(xp, tops)
    if plain:
        count = xp.full_like(none, float(rows.values.shape[0]))
    else:
        count = add(lambda block, live: xp.astype(live, block.dtype))
    total = add(lambda block, live: block)
    if across is not None:
        both = across(xp.concat((count, total), axis=0))
        count, total = both[:1, :], both[1:, :]
    divisor = xp.maximum(count, xp.ones_like(count))
    mean = total / divisor

    def squares(block: Array, live: Array | None) -> Array:
        centred = block - mean
        centred = centred * centred
        return centred if live is None else xp.where(live, centred, xp.zeros_like(centred))

    spread = add(squares)
    return mean, (spread if across is None else across(spread)) / divisor, count


def standardize_vjp(
    backend: Backend, values: Array, mask: Array | None, first: int, eps: float, cotangent: Array
) -> Array:
    """The transpose of layer norm's derivative at ``values``, applied to ``cotangent``.

    Both are (rows, experts) blocks. The activation's own derivative already makes ``cotangent``
    sum to zero over each row, up to rounding, which spares the mean's term.
    """
    xp = backend.namespace
    live = None
    top = xp.max(values, axis=-1, keepdims=True)
    moments = None
    if backend.eager and mask is None and all_finite(xp, top):
        shifted = values - top
        moments = _row_moments(backend, shifted, None)
    if moments is None:
        split = finite(backend, values, mask, first)
        live = split.live
        shifted = split.values - _top(backend, split.values, live)
        shifted = xp.where(live, shifted, xp.zeros_like(shifted))
        moments = _row_moments(backend, shifted, live)
        if moments is None:
            raise GateError(
                "logits must be those of the forward pass; got some whose variance overflows, "
                "which the forward pass refuses. Pass the same logits."
            )
    mean, variance = moments
    spread = 1.0 / xp.sqrt(variance + eps)
    unit = (shifted - mean) * spread
    if live is not None:
        unit = xp.where(live, unit, xp.zeros_like(unit))
        cotangent = xp.where(live, cotangent, xp.zeros_like(cotangent))
        count = xp.sum(xp.astype(live, values.dtype), axis=-1, keepdims=True)
        count = xp.maximum(count, xp.ones_like(count))
    else:
        count = xp.full_like(mean, float(values.shape[-1]))
    return (cotangent - unit * (xp.vecdot(unit, cotangent)[:, None] / count)) * spread
