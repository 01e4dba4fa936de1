"""The usual gate, layer norm and entmax-1.5, in as few passes over the logits as can be.

For libraries that run each operation by itself, on several cores, and for which picking entries
costs more than a pass over all of them. Logits are neither centred nor scaled: layer norm only
says how large the mass above the threshold has to be. With radius r = 2 √(variance + eps) the
coefficients are max((x - t)/r, 0)², where Σ max(x - t, 0)² = r², and Newton's method on that norm
starts where rows of many normal logits have t. Rows that need more steps than most are for the
caller to do in full.
"""

from __future__ import annotations

from math import isfinite, sqrt

from tensormoe.backend import Array, Backend
from tensormoe.gates._normalization import LayerNorm, off_centre, usual_threshold
from tensormoe.gates._threshold import enough_of

# a round for all rows costs more than to do this share of them again
_LEFT_OUT = 1.0 / 24.0

# rows that have not converged after these are unlike the usual ones
_MOST_ROUNDS = 12


def entmax15_of_rows(
    backend: Backend, values: Array, how: LayerNorm
) -> tuple[Array, Array | None] | None:
    """Coefficients of a (rows, experts) block, and which rows could not be done this way.

    Args:
        backend: an eager adapter.
        values: logits without a mask.
        how: the layer norm.

    Returns:
        ``None`` where the block is not of the usual kind: infinities or NaN, or logits far off
        center. Otherwise (rows, experts), and (rows,) booleans or ``None`` for no row.
    """
    xp = backend.namespace
    rows, experts = values.shape
    square = backend.square_sums(values)
    total = float(xp.sum(square))
    if total == 0.0:
        # a gate that was never trained: its projection starts at zero
        return xp.full_like(values, 1.0 / experts), None
    if not isfinite(total):
        return None
    mean = backend.row_sums(values) * (1.0 / experts)
    variance = square * (1.0 / experts) - mean * mean
    if bool(xp.any(off_centre(mean, variance))):
        return None
    radius = 2.0 * xp.sqrt(variance + how.eps)
    threshold = mean + usual_threshold(experts) * radius
    tolerance = enough_of(experts, float(xp.finfo(values.dtype).eps), 2.0) * radius
    most = max(1.0, _LEFT_OUT * rows)
    excess = left_out = None
    for _ in range(_MOST_ROUNDS):
        del excess  # so that the next one takes its place in memory
        excess = xp.maximum(values, threshold)
        excess -= threshold
        norm = xp.sqrt(backend.square_sums(excess))
        # a row without any excess divides by zero, and is left out
        step = (norm - radius) * norm / backend.row_sums(excess)
        left_out = ~(xp.abs(step) <= tolerance)
        if float(xp.sum(xp.astype(left_out, values.dtype))) < most:
            break
        threshold = threshold + step
    else:
        return None
    # a step to the left would be one of rounding, and let in experts without any excess
    excess -= xp.maximum(step, xp.zeros_like(step))
    excess = xp.maximum(excess, xp.zeros_like(step))
    excess *= 1.0 / radius
    excess *= excess
    return excess, left_out[:, 0]


def entmax15_of_one_row(backend: Backend, values: Array, how: LayerNorm) -> Array | None:
    """The same for (1, experts): scalars are Python's, which spares most of the operations.

    Returns:
        (1, experts), or ``None`` as :func:`entmax15_of_rows`.
    """
    xp = backend.namespace
    experts = values.shape[-1]
    square = float(backend.square_sums(values)[0, 0])
    if square == 0.0:
        return xp.full_like(values, 1.0 / experts)
    mean = float(backend.row_sums(values)[0, 0]) / experts
    variance = square / experts - mean * mean
    if not isfinite(square) or off_centre(mean, variance):
        return None
    radius = 2.0 * sqrt(variance + how.eps)
    threshold = mean + usual_threshold(experts) * radius
    tolerance = enough_of(experts, float(xp.finfo(values.dtype).eps), 2.0) * radius
    for _ in range(_MOST_ROUNDS):
        excess = xp.maximum(values, threshold)
        excess -= threshold
        mass = float(backend.row_sums(excess)[0, 0])
        if mass == 0.0:
            return None
        norm = sqrt(float(backend.square_sums(excess)[0, 0]))
        step = (norm - radius) * norm / mass
        if abs(step) <= tolerance:
            break
        threshold += step
    else:
        return None
    excess -= max(step, 0.0)
    excess = xp.maximum(excess, 0.0)
    excess *= 1.0 / radius
    excess *= excess
    return excess
