"""Load of the experts, and balancing without a loss."""

from __future__ import annotations

from tensormoe.backend import Array, Backend, default_integer
from tensormoe.errors import GateError
from tensormoe.gates._normalization import Across
from tensormoe.gates._top_k import TopK
from tensormoe.gates._weights import as_weights, counts


def expert_load(
    coefficients: Array | TopK, threshold: float = 0.5, *, experts: int | None = None
) -> Array:
    """Tokens that give each expert at least ``threshold`` (Oldfield et al. 2024, section 4.1).

    Args:
        coefficients: (..., experts), or a ``TopK`` with ``experts``.
        threshold: the smallest coefficient that counts, in (0, 1].
        experts: number of experts, for a ``TopK``.

    Returns:
        (experts,) integers.

    Raises:
        GateError: ``threshold`` is out of range, or as in :func:`load_balance_loss`.

    Example:
        >>> import numpy as np
        >>> expert_load(np.array([[0.75, 0.25], [0.5, 0.5], [0.4, 0.6]]))
        array([2, 2])
    """
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float)
        or not (0 < threshold <= 1)
    ):
        raise GateError(f"threshold must be in (0, 1]; got {threshold!r}. Use 0.5.")
    weights = as_weights(coefficients, experts)
    xp = weights.backend.namespace
    return xp.sum(xp.astype(weights.matrix >= threshold, default_integer(xp)), axis=0)


def balanced_bias(
    bias: Array,
    coefficients: Array | TopK,
    speed: float = 0.001,
    *,
    across: Across | None = None,
    backend: Backend | None = None,
) -> Array:
    """Next biases of balancing without a loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2).

    An expert with less than the mean load gets ``speed`` more, one with more gets as much less. The
    biases are added to logits for the choice of experts alone (``choice`` of :func:`activate`),
    so that they change which experts work and not how their outputs are weighted. A layer whose
    gate has ``balance`` keeps and moves its own.

    Args:
        bias: (experts,), zeros at the start; not changed.
        coefficients: (..., experts) of a step's tokens, or a ``TopK``; an expert's load is the
            number of tokens whose coefficient for it is not zero. A step without tokens changes
            nothing.
        speed: what a step changes, positive.
        across: where others have further tokens of the step, the sum of an array over all of them.
        backend: the adapter to run on; that of the coefficients' library by default.

    Returns:
        (experts,), in the dtype of ``bias``; constant to differentiation.

    Raises:
        GateError: the number of experts differs, ``speed`` is not positive, or as in
            :func:`load_balance_loss`.

    Example:
        >>> import numpy as np
        >>> balanced_bias(np.zeros(3), np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]), speed=0.1)
        array([-0.1,  0. ,  0.1])
    """
    number = isinstance(speed, int | float) and not isinstance(speed, bool)
    # by comparison, since a compiler that takes the number for a variable follows no isfinite
    if not number or not 0 < speed < float("inf"):
        raise GateError(f"speed must be a positive, finite number; got {speed!r}. Use 0.001.")
    if len(bias.shape) != 1:
        raise GateError(
            f"bias must have one entry per expert; got shape {tuple(bias.shape)}. Start with zeros."
        )
    weights = as_weights(coefficients, bias.shape[0], any_tokens=True, backend=backend)
    load = counts(weights)
    load = load if across is None else weights.backend.stop_gradient(across(load))
    xp = weights.backend.namespace
    mean = xp.mean(load)
    error = xp.astype(load < mean, bias.dtype) - xp.astype(load > mean, bias.dtype)
    return weights.backend.stop_gradient(bias) + speed * error
