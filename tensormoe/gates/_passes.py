"""The usual gate, layer norm and entmax-1.5, in as few passes over the logits as can be.

For libraries that run each operation by itself. Logits are neither centred nor scaled: layer norm
only sets how large the mass above the threshold has to be. With radius r = 2 √(variance + eps) /
spread the coefficients are (max(x - t, 0) / r)², where the norm of max(x - t, 0) is r, and Newton's
method on that norm starts where rows of many normal logits have t. Once a step is lost in rounding,
dividing by the norm that was reached instead of r makes rows sum to one.
"""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, isfinite, pi, sqrt

from tensormoe.backend import Array, Backend
from tensormoe.gates._normalization import LayerNorm

# Newton steps before the first test of convergence
_LEAST_STEPS = 4

# rows that have not converged after these are unlike the usual ones
_MOST_STEPS = 12

# below the usual threshold, in units of the radius: few rows have theirs further down
_MARGIN = 0.25

# more numbers than these are slower than passes
_MOST_FLOATS = 256

# a last step of so many units of rounding, relative to the radius, is noise
_NOISE = 2.0

# mean² up to this many variances costs the variance no more than two digits
_OFF_CENTRE = 16.0


@lru_cache(maxsize=64)
def usual_threshold(experts: int, spread: float) -> float:
    """The entmax-1.5 threshold, relative to the mean, of many normal logits of mean zero.

    It solves N E[max(g/2 - τ, 0)²] = 1 for a normal g of standard deviation ``spread``. Layer norm
    makes it the threshold of most rows, nearly; as the start of Newton's method it need not be
    exact, and saves a third of it.

    >>> round(usual_threshold(1024, 1.0), 3)
    1.065
    """
    high = sqrt(float(experts)) * max(spread, 1.0)
    low = -high
    for _ in range(60):
        middle = (low + high) / 2.0
        u = 2.0 * middle / spread
        tail = 0.5 * erfc(u / sqrt(2.0))
        density = exp(-u * u / 2.0) / sqrt(2.0 * pi)
        above = experts * (0.5 * spread) ** 2 * ((1.0 + u * u) * tail - u * density) > 1.0
        low, high = (middle, high) if above else (low, middle)
    return low


def entmax15_of_rows(backend: Backend, values: Array, how: LayerNorm) -> Array | None:
    """Coefficients of a (rows, experts) block of logits without a mask.

    Args:
        backend: an eager adapter.
        values: logits.
        how: the layer norm.

    Returns:
        (rows, experts), or ``None`` where the block is not of the usual kind: infinities or NaN,
        logits far off center, rows whose search takes long.
    """
    xp = backend.namespace
    experts = values.shape[-1]
    top = xp.max(values, axis=-1, keepdims=True)
    # of larger ones the squares may overflow; comparisons are false for NaN
    largest = float((xp.finfo(values.dtype).max / experts) ** 0.5)
    if not (float(xp.max(top)) < largest and float(xp.min(values)) > -largest):
        return None
    square = backend.square_sums(values)
    if float(xp.max(square)) == 0.0:
        # a gate that was never trained: its projection starts at zero
        return xp.full_like(values, 1.0 / experts)
    mean = backend.row_sums(values) * (1.0 / experts)
    variance = square * (1.0 / experts) - mean * mean
    if bool(xp.any(mean * mean > _OFF_CENTRE * variance)):
        return None
    radius = 2.0 / how.spread * xp.sqrt(variance + how.eps)
    # t lies at least r/√N below the top, and just there where all entries tie
    threshold = xp.minimum(
        mean + usual_threshold(experts, how.spread) * radius, top - experts**-0.5 * radius
    )
    noise = _NOISE * float(xp.finfo(values.dtype).eps)
    for done in range(_MOST_STEPS):
        excess = xp.maximum(values, threshold)
        excess -= threshold
        norm = xp.sqrt(backend.square_sums(excess))
        step = (norm - radius) * norm / backend.row_sums(excess)
        if done >= _LEAST_STEPS and float(xp.max(xp.abs(step) / radius)) <= noise:
            excess *= 1.0 / norm
            excess *= excess
            return excess
        threshold = threshold + step
        del excess  # the next one takes its place in memory
    return None


def entmax15_of_one_row(backend: Backend, values: Array, how: LayerNorm) -> Array | None:
    """The same for (1, experts): the few logits that can matter go through the closed form.

    For a set of k logits that contains the support, t is their mean - √((r² - Σ (x - mean)²)/k)
    (Peters, Niculae & Martins 2019, algorithm 2). They come out as Python's numbers, which spares
    most of the operations.

    Returns:
        (1, experts), or ``None`` as :func:`entmax15_of_rows`, or for too many or too few of them.
    """
    xp = backend.namespace
    experts = values.shape[-1]
    row = backend.reshape(values, (experts,))
    square = float(xp.vecdot(row, row))
    if square == 0.0:
        return xp.full_like(values, 1.0 / experts)
    mean = float(xp.sum(row)) / experts
    variance = square / experts - mean * mean
    if not isfinite(square) or mean * mean > _OFF_CENTRE * variance:
        return None
    radius = 2.0 / how.spread * sqrt(variance + how.eps)
    bound = mean + (usual_threshold(experts, how.spread) - _MARGIN) * radius
    above = row[row > bound]
    if above.shape[0] > _MOST_FLOATS:
        return None
    largest = sorted(backend.floats(above), reverse=True)
    threshold = _threshold(largest, radius)
    if threshold is None or threshold < bound:
        return None  # what lies below the bound may matter too
    excess = xp.maximum(row - threshold, xp.zeros_like(row[:1]))
    excess *= 1.0 / radius
    excess *= excess
    return backend.reshape(excess, (1, experts))


def _threshold(largest: list[float], radius: float) -> float | None:
    """The t of logits in descending order; ``None`` where some may be missing."""
    if not largest:
        return None
    top = largest[0]
    total = square = 0.0
    for count, value in enumerate(largest, start=1):
        # relative to the largest, so that nothing is lost in the squares
        total += value - top
        square += (value - top) ** 2
        mean = total / count
        inside = (radius * radius - square + total * mean) / count
        threshold = top + mean - sqrt(inside) if inside > 0.0 else top + mean
        if count == len(largest) or threshold >= largest[count]:
            return threshold
    return None
