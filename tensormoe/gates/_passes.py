"""The usual gate, layer norm and entmax-1.5, in as few passes over the logits as can be.

For libraries that run each operation by itself, on several cores, and for which picking entries
costs more than a pass over all of them. Logits are neither centred nor scaled: layer norm only
says how large the mass above the threshold has to be. With radius r = 2 √(variance + eps) the
coefficients are (max(x - t, 0) / r)², where the norm of max(x - t, 0) is r, and Newton's method on
that norm starts where rows of many normal logits have t. Once a step is lost in rounding, dividing
by the norm that was found instead of r makes rows sum to one.
"""

from __future__ import annotations

from math import isfinite, sqrt

from tensormoe.backend import Array, Backend
from tensormoe.gates._normalization import LayerNorm, off_centre, usual_threshold

# Newton steps before it pays to look whether more are needed
_LEAST_ROUNDS = 4

# rows that have not converged after these are unlike the usual ones
_MOST_ROUNDS = 12

# below the usual threshold, in units of the radius: few rows have theirs further down
_MARGIN = 0.25

# more numbers than these are slower than passes
_MOST_FLOATS = 256

# a last step of so many units of rounding, relative to the radius, is noise
_NOISE = 2.0


def entmax15_of_rows(backend: Backend, values: Array, how: LayerNorm) -> Array | None:
    """Coefficients of a (rows, experts) block.

    Args:
        backend: an eager adapter.
        values: logits without a mask.
        how: the layer norm.

    Returns:
        (rows, experts), or ``None`` where the block is not of the usual kind: infinities or NaN,
        logits far off center, rows whose search takes long.
    """
    xp = backend.namespace
    experts = values.shape[-1]
    square = backend.square_sums(values)
    total = float(xp.sum(square))
    if total == 0.0:
        # a gate that was never trained: its projection starts at zero
        return xp.full_like(values, 1.0 / experts)
    if not isfinite(total):
        return None
    mean = backend.row_sums(values) * (1.0 / experts)
    variance = square * (1.0 / experts) - mean * mean
    if bool(xp.any(off_centre(mean, variance))):
        return None
    radius = 2.0 * xp.sqrt(variance + how.eps)
    threshold = mean + usual_threshold(experts) * radius
    noise = _NOISE * float(xp.finfo(values.dtype).eps)
    excess = None
    for done in range(_MOST_ROUNDS):
        excess = backend.excess(values, threshold, out=excess)
        norm = xp.sqrt(backend.square_sums(excess))
        # a row without any excess divides by zero, and never ends
        step = (norm - radius) * norm / backend.row_sums(excess)
        if done >= _LEAST_ROUNDS and float(xp.max(xp.abs(step) / radius)) <= noise:
            break
        threshold = threshold + step
    else:
        return None
    excess *= 1.0 / norm
    excess *= excess
    return excess


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
    if not isfinite(square) or off_centre(mean, variance):
        return None
    radius = 2.0 * sqrt(variance + how.eps)
    bound = mean + (usual_threshold(experts) - _MARGIN) * radius
    largest = sorted(backend.floats(row[row > bound]), reverse=True)
    threshold = _threshold(largest, radius)
    if threshold is None or threshold < bound:
        return None  # what lies below the bound may matter too
    excess = backend.excess(row, threshold)
    excess *= 1.0 / radius
    excess *= excess
    return backend.reshape(excess, (1, experts))


def _threshold(largest: list[float], radius: float) -> float | None:
    """The t of logits in descending order; ``None`` where some may be missing."""
    if not largest or len(largest) > _MOST_FLOATS:
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


def layer_norm_vjp(
    backend: Backend, values: Array, weights: Array, cotangent: Array, alpha: float, eps: float
) -> Array | None:
    """The way back through an activation and the layer norm before it, in few passes.

    With s the activation's slope and g the cotangent, u = s (g - ⟨s, g⟩ / Σ s) is the gradient by
    the normalized logits (:func:`activation_vjp`). It sums to zero, which leaves of layer norm's
    transpose (u - (x - mean) ⟨x, u⟩ / (N v)) / √v, with v = variance + eps.

    Args:
        backend: an eager adapter.
        values: logits x, (rows, experts), without a mask.
        weights: coefficients, (rows, experts).
        cotangent: g, (rows, experts).
        alpha: of the activation, 1 or 1.5, whose slopes are the coefficients and their roots.
        eps: of the layer norm.

    Returns:
        (rows, experts), or ``None`` where the logits are infinite, NaN or far off center.
    """
    xp = backend.namespace
    experts = values.shape[-1]
    square = backend.square_sums(values)
    if not isfinite(float(xp.sum(square))):
        return None
    mean = backend.row_sums(values) * (1.0 / experts)
    variance = square * (1.0 / experts) - mean * mean
    if bool(xp.any(off_centre(mean, variance))):
        return None
    spread = 1.0 / xp.sqrt(variance + eps)
    slope = weights if alpha == 1.0 else xp.sqrt(weights)
    gradient = slope * cotangent
    share = backend.row_sums(gradient) / backend.row_sums(slope)
    if alpha == 1.0:
        slope = slope * share
    else:
        slope *= share
    gradient -= slope
    del slope  # the next array takes its place in memory
    product = gradient * values
    along = backend.row_sums(product) * (1.0 / experts) * spread**3
    del product
    gradient *= spread
    gradient -= values * along
    gradient += mean * along
    return gradient
