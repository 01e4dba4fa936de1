"""Soft routing: slots of experts are averages of tokens, and outputs are averages of slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensormoe.backend import Array, Backend, backend_of
from tensormoe.errors import GateError, ShapeError
from tensormoe.gates._top_k import check_k, largest


@dataclass(frozen=True, eq=False)
class SoftRoutes:
    """Routing record of sets of tokens: how much each token gives to each slot, and takes from it.

    Attributes:
        logits: (..., tokens, N, p), in float32 at least.
        dispatch: (..., tokens, N, p): the weights of the tokens in every slot, which sum to one
            over the tokens that count.
        combine: (..., tokens, N, p): the weights of the slots in every output, which sum to one
            over all slots; zeros for a token that does not count.
    """

    logits: Array
    dispatch: Array
    combine: Array

    def reshaped(self, batch_shape: tuple[int, ...], backend: Backend) -> SoftRoutes:
        """The record with other leading axes, that of the tokens the last."""
        return SoftRoutes(
            *(
                backend.reshape(array, (*batch_shape, *array.shape[-2:]))
                for array in (self.logits, self.dispatch, self.combine)
            )
        )


def soft_routes(
    logits: Array, *, mask: Array | None = None, backend: Backend | None = None
) -> SoftRoutes:
    """Dispatch and combine weights (Puigcerver et al. 2024, section 2), from logits.

    A set in which no token counts has zeros in both: its slots and its outputs are zero.

    Args:
        logits: (sets, tokens, N, p), in float32 or wider.
        mask: (sets, tokens), which tokens count; all by default. Logits of others may be anything.
        backend: the adapter to run on; that of the logits' library by default.

    Raises:
        GateError: logits that are not a floating-point array of four axes, or a mask of another
            shape or dtype; where the backend checks values, also where logits are NaN.

    >>> import numpy as np
    >>> logits = np.log([[[[1.0], [3.0]], [[3.0], [1.0]], [[9.0], [9.0]]]])
    >>> routes = soft_routes(logits, mask=np.array([[True, True, False]]))
    >>> routes.dispatch[0, :, :, 0].tolist(), routes.combine[0, :, :, 0].tolist()
    ([[0.25, 0.75], [0.75, 0.25], [0.0, 0.0]], [[0.25, 0.75], [0.75, 0.25], [0.0, 0.0]])
    """
    backend = backend or backend_of(logits)
    xp = backend.namespace
    if logits.ndim != 4 or not xp.isdtype(logits.dtype, "real floating"):
        raise GateError(
            "logits must be a floating-point array (sets, tokens, experts, slots); got "
            f"{logits.dtype} {tuple(logits.shape)}. Merge the leading axes of sets."
        )
    if mask is not None:
        if tuple(mask.shape) != tuple(logits.shape[:2]) or not xp.isdtype(mask.dtype, "bool"):
            raise GateError(
                f"mask must be booleans of shape {tuple(logits.shape[:2])}, one per token; got "
                f"{mask.dtype} {tuple(mask.shape)}. Compare it with zero, or reshape it."
            )
        # what does not count may be anything, infinite too
        logits = xp.where(mask[:, :, None, None], logits, xp.zeros_like(logits[:1, :1]))
    if backend.checks_values and bool(xp.any(xp.isnan(logits))):
        raise GateError("logits must not be NaN; got some. Look for the layer that made them.")
    sets, tokens, experts, slots = logits.shape
    flat = backend.reshape(logits, (sets, tokens, experts * slots))
    counts = None if mask is None else mask[:, :, None]
    dispatch = _softmax(flat, 1, counts, backend)
    combine = _softmax(flat, 2, None, backend)
    if counts is not None:
        combine = combine * xp.astype(counts, combine.dtype)
    back = logits.shape
    return SoftRoutes(logits, backend.reshape(dispatch, back), backend.reshape(combine, back))


def select_experts(combine: Array, k: int, *, backend: Backend | None = None) -> Array:
    """The k experts with the largest combine weights, set by set (Chung et al. 2025).

    The score of an expert is the sum of its combine weights over tokens and slots. Ties go to the
    lower index.

    Args:
        combine: (sets, tokens, N, p), as in :class:`SoftRoutes`.
        k: experts to keep, from 1 to N.
        backend: the adapter to run on; that of the array's library by default.

    Returns:
        (sets, k) numbers of experts, the best first.

    Raises:
        GateError: k is out of range.
        ShapeError: an array of other axes.

    >>> import numpy as np
    >>> combine = np.array([[[[0.1], [0.6], [0.3]], [[0.2], [0.5], [0.3]]]])
    >>> select_experts(combine, 2).tolist()
    [[1, 2]]
    """
    backend = backend or backend_of(combine)
    if combine.ndim != 4:
        raise ShapeError(
            f"combine must have shape (sets, tokens, experts, slots); got {tuple(combine.shape)}. "
            "Merge the leading axes of sets."
        )
    return most(backend.sum(combine, (1, 3)), k, backend)


def most(scores: Array, k: int, backend: Backend) -> Array:
    """Indices (sets, k) of the largest of scores (sets, N), the largest first."""
    check_k(k, scores.shape[-1])
    return largest(backend, scores, k)[0]


def _softmax(logits: Array, axis: int, counts: Array | None, backend: Backend) -> Array:
    """Softmax over an axis, of the entries that count; zeros where none does."""
    xp: Any = backend.namespace
    if 0 in logits.shape:
        return logits
    considered = logits
    if counts is not None:
        considered = xp.where(counts, logits, xp.full_like(logits[:1, :1], -float("inf")))
    top = backend.stop_gradient(xp.max(considered, axis=axis, keepdims=True))
    if counts is None:
        powers = xp.exp(logits - top)
        return powers / xp.sum(powers, axis=axis, keepdims=True)
    none = ~xp.any(counts, axis=axis, keepdims=True)
    top = xp.where(none, xp.zeros_like(top), top)
    # zero before the exponential, as what does not count may lie far above the others
    powers = xp.exp(xp.where(counts, logits - top, xp.zeros_like(logits[:1, :1])))
    powers = powers * xp.astype(counts, powers.dtype)
    total = xp.sum(powers, axis=axis, keepdims=True)
    return powers / xp.where(none, xp.ones_like(total), total)
