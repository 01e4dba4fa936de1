"""The usual gate, layer norm and entmax-1.5, on the few logits of a token that can matter.

Of a thousand logits a few dozen get a coefficient. On libraries that run each operation by itself
the time of a gate is its number of passes over all logits, so this takes as few as can be: sums and
squares for layer norm, the largest entry, one comparison with a probable bound, and the root search
runs on what lies above. A row is accepted if its threshold turns out to lie above the bound, which
proves that nothing was left out; the others are for the caller to do in full.
"""

from __future__ import annotations

from math import erfc, isfinite, sqrt

from tensormoe.backend import Array, Backend
from tensormoe.gates._normalization import LayerNorm, off_centre, usual_threshold
from tensormoe.gates._threshold import entmax15_root

# below the usual threshold, in units of the rows' standard deviation: half of it would lose a
# tenth of the rows of normal logits, twice as much would keep twice as many logits
_MARGIN = 0.2

# with more candidates than this share, passes over all logits are cheaper
_MOST = 0.25


def worth_it(rows: int, experts: int) -> bool:
    """Whether a block is large enough for its candidates to be found sooner than all is done."""
    return experts >= 128 and rows * experts >= 16384


def candidate_bytes(experts: int, itemsize: int) -> float:
    """Bytes held at the peak for each logit, beyond the result: typical rows, eager library.

    A candidate costs three 64-bit indices and its share of two narrow matrices and their padding;
    the share of candidates is that of normal logits above the bound.
    """
    bound = 2.0 * (usual_threshold(experts) - _MARGIN)
    return 0.5 * erfc(bound / sqrt(2.0)) * (24.0 + 2.4 * itemsize)


def entmax15_of_candidates(
    backend: Backend, values: Array, how: LayerNorm
) -> tuple[Array, Array | None] | None:
    """Coefficients of a (rows, experts) block, and which rows could not be done this way.

    Args:
        backend: an eager adapter.
        values: logits without a mask.
        how: the layer norm.

    Returns:
        ``None`` where the block is not of the usual kind: infinities or NaN, logits far off
        center, or too many candidates. Otherwise (rows, experts), and (rows,) booleans or
        ``None`` for no row.
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
    scale = 0.5 / xp.sqrt(variance + how.eps)
    above = values > mean + (usual_threshold(experts) - _MARGIN) / scale
    places = xp.nonzero(backend.reshape(above, (rows * experts,)))[0]
    del above
    if places.shape[0] > _MOST * rows * experts:
        return None
    starts = xp.searchsorted(places, xp.arange(0, (rows + 1) * experts, experts))
    counts = starts[1:] - starts[:-1]
    widest = int(xp.max(counts))
    if widest == 0:
        return None
    # the candidates of each row, side by side in a narrow matrix
    compact = xp.arange(places.shape[0])
    compact += xp.repeat(xp.arange(0, rows * widest, widest) - starts[:-1], counts)
    narrow = xp.full((rows * widest,), -float("inf"), dtype=values.dtype)
    narrow[compact] = xp.take(backend.reshape(values, (rows * experts,)), places)
    narrow = backend.reshape(narrow, (rows, widest))
    top = xp.max(narrow, axis=-1, keepdims=True)
    if not isfinite(float(xp.min(top))):
        return None
    narrow -= top
    narrow *= scale
    # the threshold relative to the top lies in [-1, -1/√N]
    usual = (mean - top) * scale + usual_threshold(experts)
    bound = usual - _MARGIN
    start = xp.maximum(xp.minimum(usual, -(experts**-0.5)), -1.0)
    weights, root = entmax15_root(backend, narrow, experts, start)
    result = xp.zeros_like(values)
    spread = backend.reshape(result, (rows * experts,))
    spread[places] = xp.take(backend.reshape(weights, (rows * widest,)), compact)
    return result, (root < bound)[:, 0]
