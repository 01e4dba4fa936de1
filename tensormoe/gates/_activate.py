"""From logits to coefficients, and the gradient of that."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError
from tensormoe.gates._functions import activation_vjp, entmax_block
from tensormoe.gates._gate import Gate
from tensormoe.gates._normalization import (
    Across,
    Affine,
    LayerNorm,
    Standardize,
    batch_moments,
    layer_norm_vjp,
    scaled,
)
from tensormoe.gates._relu_top_k import (
    centred_layer_norm_vjp,
    relu_top_k_block,
    relu_top_k_vjp,
)
from tensormoe.gates._rows import Rows, as_rows, blocks, map_rows
from tensormoe.gates._top_k import check_k, top_k_block


@dataclass(frozen=True, eq=False)
class Statistics:
    """Batch norm's running statistics, which the caller keeps.

    Attributes:
        mean: (experts,), starting at 0.
        variance: (experts,), starting at 1; unbiased, as PyTorch keeps it.
    """

    mean: Array
    variance: Array


@dataclass(frozen=True, eq=False)
class Activation:
    """Coefficients of logits.

    Attributes:
        coefficients: the logits' shape, non-negative, summing to one over the last axis if
            ``gate.sums_to_one``.
        statistics: new running statistics where batch norm trains, else the ones passed in.
    """

    coefficients: Array
    statistics: Statistics | None = None


def activate(
    gate: Gate,
    logits: Array,
    *,
    mask: Array | None = None,
    statistics: Statistics | None = None,
    training: bool = False,
    backend: Backend | None = None,
    across: Across | None = None,
    choice: Array | None = None,
) -> Activation:
    """Normalize logits and apply the gate's activation.

    It works on blocks of rows of ``backend.row_block_bytes``, so at its peak holds, besides its
    arguments, the coefficients and temporaries that :func:`workspace` counts.

    Args:
        gate: normalization and activation.
        logits: (..., experts), real floating point; in float32 at least inside and in the result.
        mask: booleans that broadcast to ``logits``, true where an expert may be used. Masked and
            infinite logits do not count in the normalization's statistics.
        statistics: batch norm's running statistics: needed unless training, where ``None`` means
            mean 0 and variance 1. They are not changed; new ones are returned.
        training: whether batch norm uses the batch's own statistics (biased variance), and mixes
            them into the running ones (unbiased variance), with weight ``gate.momentum``.
        backend: the adapter to run on; that of the logits' library by default.
        across: where others have further rows of the batch, the sum of an array over all of them;
            batch norm's statistics in training are then those of the whole batch.
        choice: for "top_k": (experts,), or of the logits' shape. It is added to the normalized
            logits to find the k largest, and is left out of their coefficients: noise, or the
            biases of :func:`balanced_bias`. Nothing is differentiated by it.

    Returns:
        Coefficients, and new statistics where batch norm trains.

    Raises:
        GateError: as :func:`entmax`, :func:`top_k` and :func:`relu_top_k`; also where the logits'
            variance overflows, ``choice`` does not fit, or batch norm lacks statistics, or trains
            on a batch of fewer than two tokens.

    Example:
        >>> import numpy as np
        >>> activate(Gate("sparsemax"), np.array([[3.0, 1.0, -4.0]])).coefficients.round(3)
        array([[0.822, 0.178, 0.   ]])
        >>> gate, bias = Gate("top_k", k=1), np.array([0.0, 5.0, 0.0])
        >>> activate(gate, np.array([[3.0, 1.0, -4.0]]), choice=bias).coefficients
        array([[0., 1., 0.]])
    """
    rows = as_rows(logits, mask=mask, backend=backend)
    backend = rows.backend
    how, updated = _standardize(gate, rows, statistics, training, across)
    added = None if choice is None else _choice(gate, rows, choice)
    if gate.activation == "top_k":
        k = check_k(gate.k, rows.shape[-1])

        def cut(x: Array, m: Array | None, first: int) -> Array:
            block = added
            if block is not None and block.shape[0] != 1:
                block = block[first : first + x.shape[0], :]
            return top_k_block(backend, x, m, first, how, k, block)

        weights = map_rows(rows, cut)
    elif gate.k is not None:
        k = check_k(gate.k, rows.shape[-1])
        weights = map_rows(rows, lambda x, m, first: relu_top_k_block(backend, x, m, first, how, k))
    else:
        alpha = gate.effective_alpha
        weights = map_rows(rows, lambda x, m, first: entmax_block(backend, x, m, first, how, alpha))
    if across is not None and isinstance(how, Affine) and rows.values.shape[0] == 0:
        # this part of the batch has no rows, but the others wait for its part in the gradients
        weights = weights + how.mean + how.scale
    return Activation(rows.restore(weights), updated)


def _choice(gate: Gate, rows: Rows, choice: Array) -> Array:
    """Terms added for the choice, as (1, experts) or (rows, experts)."""
    shape = tuple(choice.shape)
    if gate.activation != "top_k":
        raise GateError(
            f"choice belongs to top_k; got activation {gate.activation!r}. Leave it out or use "
            "top_k."
        )
    if shape not in (rows.shape[-1:], rows.shape):
        raise GateError(
            f"choice must have one entry per expert, shape {rows.shape[-1:]}, or the logits' shape "
            f"{rows.shape}; got {shape}."
        )
    backend = rows.backend
    choice = backend.namespace.astype(backend.stop_gradient(choice), rows.values.dtype)
    matrix = (1, *shape) if len(shape) == 1 else tuple(rows.values.shape)
    return backend.reshape(choice, matrix)


def batch_norm(
    gate: Gate,
    logits: Array,
    *,
    statistics: Statistics | None = None,
    training: bool = False,
    backend: Backend | None = None,
    across: Across | None = None,
) -> tuple[Array, Statistics | None]:
    """The first half of :func:`activate` for gates with batch norm, with its arguments.

    What follows is the same gate without normalization. So the activation can be one operation,
    whatever differentiates the mean and the variance of a batch.

    Returns:
        Normalized logits of the logits' shape, in float32 at least, and new statistics.

    Raises:
        GateError: as :func:`activate`, or the gate has another normalization.

    Example:
        >>> import numpy as np
        >>> gate = Gate(normalization="batch")
        >>> normed, _ = batch_norm(gate, np.array([[3.0], [1.0]]), training=True)
        >>> normed.round(3).tolist()
        [[0.707], [-0.707]]
    """
    rows = as_rows(logits, backend=backend)
    how, updated = _standardize(gate, rows, statistics, training, across)
    if not isinstance(how, Affine):
        raise GateError(
            f"gate must have batch normalization; got {gate.normalization!r}. Call activate, which "
            "takes every gate."
        )
    return rows.restore(scaled(rows.backend, rows.values, how)), updated


def _standardize(
    gate: Gate,
    rows: Rows,
    statistics: Statistics | None,
    training: bool,
    across: Across | None,
) -> tuple[Standardize, Statistics | None]:
    alone = rows.shape[-1] == 1 and gate.sums_to_one and gate.normalization == "layer"
    if gate.normalization is None or alone:
        # one expert's coefficient is 1 under any norm, whose second derivative is 1/eps times zero
        return None, statistics
    spread = gate.spread_of(rows.shape[-1])
    if gate.normalization == "layer":
        return LayerNorm(gate.eps, spread), statistics
    xp = rows.backend.namespace
    count, experts = rows.values.shape
    if statistics is not None:
        for name, array in (("mean", statistics.mean), ("variance", statistics.variance)):
            if tuple(array.shape) != (experts,):
                raise GateError(
                    f"statistics.{name} must have one entry per expert, shape {(experts,)}; got "
                    f"{tuple(array.shape)}. Pass the statistics of this gate."
                )
    if not training:
        if statistics is None:
            raise GateError(
                "batch normalization needs running statistics outside training; got None. Pass the "
                "statistics that training returned."
            )
        mean, variance = statistics.mean[None, :], statistics.variance[None, :]
        return Affine(mean, spread / xp.sqrt(variance + gate.eps)), statistics
    if across is None:
        _check_tokens(count)
    mean, variance, tokens = batch_moments(rows, across)
    if across is not None and rows.backend.eager:
        _check_tokens(int(xp.max(rows.backend.stop_gradient(tokens), axis=-1)))
    how = Affine(mean, spread / xp.sqrt(variance + gate.eps))
    return how, _mix(gate, rows.backend, statistics, mean, variance, tokens)


def _check_tokens(count: int) -> None:
    if count < 2:
        raise GateError(
            f"batch normalization must train on at least 2 tokens; got {count}. Use larger batches "
            "or normalization='layer'."
        )


def _mix(
    gate: Gate,
    backend: Backend,
    statistics: Statistics | None,
    mean: Array,
    variance: Array,
    tokens: Array,
) -> Statistics:
    xp = backend.namespace
    mean, variance, tokens = (
        backend.stop_gradient(array)[0, :] for array in (mean, variance, tokens)
    )
    old_mean = xp.zeros_like(mean) if statistics is None else statistics.mean
    old_variance = xp.ones_like(mean) if statistics is None else statistics.variance
    unbiased = variance * (tokens / xp.maximum(tokens - 1.0, xp.ones_like(tokens)))
    weight = gate.momentum * xp.astype(tokens > 1.0, tokens.dtype)
    return Statistics(
        old_mean + weight * (mean - old_mean), old_variance + weight * (unbiased - old_variance)
    )


def activate_vjp(
    gate: Gate,
    logits: Array,
    coefficients: Array,
    cotangent: Array,
    *,
    mask: Array | None = None,
    statistics: Statistics | None = None,
    training: bool = False,
    backend: Backend | None = None,
    across: Across | None = None,
) -> Array:
    """The gradient with respect to the logits of :func:`activate`, for libraries without one.

    Args:
        gate: as in the forward call, like ``logits``, ``mask``, ``statistics`` and ``training``.
        logits: (..., experts).
        coefficients: the result of the forward call.
        cotangent: the derivative with respect to the coefficients, of their shape.
        mask: as in the forward call.
        statistics: the running statistics that were passed in, not those that came out.
        training: as in the forward call.
        backend: as in the forward call.
        across: as in the forward call; the gradient then includes all parts of the batch.

    Returns:
        (..., experts), in the coefficients' dtype; zero for experts that are not usable.

    Raises:
        GateError: the shapes differ, or the forward call would have raised it.

    Example:
        >>> import numpy as np
        >>> gate, x = Gate("softmax", normalization=None), np.zeros((1, 2))
        >>> a = activate(gate, x).coefficients
        >>> activate_vjp(gate, x, a, np.array([[1.0, 0.0]]))
        array([[ 0.25, -0.25]])
    """
    rows = as_rows(logits, mask=mask, backend=backend)
    backend, xp = rows.backend, rows.backend.namespace
    for name, array in (("coefficients", coefficients), ("cotangent", cotangent)):
        if tuple(array.shape) != rows.shape:
            raise GateError(
                f"{name} must have the logits' shape {rows.shape}; got {tuple(array.shape)}. Pass "
                "arrays of the same forward call."
            )
    shared = across is not None and training and gate.normalization == "batch"
    if rows.values.shape[0] == 0 and not shared:
        return rows.restore(rows.values)
    matrix = tuple(rows.values.shape)
    weights = backend.reshape(coefficients, matrix)
    cotangent = backend.reshape(cotangent, matrix)
    alpha = gate.effective_alpha
    norm = LayerNorm(gate.eps, gate.spread_of(rows.shape[-1]))
    # only activations that are blind to a shift of all logits spare the term of the mean
    layer_vjp = layer_norm_vjp if gate.sums_to_one else centred_layer_norm_vjp

    def gradient(values: Array, some: Array | None, first: int) -> Array:
        stop = first + values.shape[0]
        some_weights, some_cotangent = weights[first:stop, :], cotangent[first:stop, :]
        if gate.sums_to_one:
            inner = activation_vjp(backend, some_weights, some_cotangent, alpha)
        else:
            inner = relu_top_k_vjp(some_weights, some_cotangent, backend)
        if gate.normalization == "layer":
            return layer_vjp(backend, values, some, first, norm, inner)
        return xp.where(xp.isinf(values), xp.zeros_like(inner), inner)

    result = map_rows(rows, gradient)
    if gate.normalization == "batch":
        result = _batch_vjp(gate, rows, result, statistics, training, across)
    return rows.restore(result)


def _batch_vjp(
    gate: Gate,
    rows: Rows,
    inner: Array,
    statistics: Statistics | None,
    training: bool,
    across: Across | None,
) -> Array:
    if not training:
        how, _ = _standardize(gate, rows, statistics, training, across)
        assert isinstance(how, Affine)
        return inner * how.scale
    xp = rows.backend.namespace
    mean, variance, tokens = batch_moments(rows, across)
    how = Affine(mean, 1.0 / xp.sqrt(variance + gate.eps))
    tokens = xp.maximum(tokens, xp.ones_like(tokens))
    slope = gate.spread_of(rows.shape[-1]) * how.scale

    def unit(values: Array, mask: Array | None) -> tuple[Array, Array]:
        live = ~xp.isinf(values) if mask is None else ~xp.isinf(values) & mask
        values = xp.where(live, values, xp.zeros_like(values))
        return xp.where(live, (values - how.mean) * how.scale, xp.zeros_like(values)), live

    along = total = xp.zeros_like(how.mean)
    for start, stop in blocks(rows):
        mask = None if rows.mask is None else rows.mask[start:stop, :]
        block = inner[start:stop, :]
        scaled, _ = unit(rows.values[start:stop, :], mask)
        total = total + xp.sum(block, axis=0, keepdims=True)
        along = along + xp.sum(block * scaled, axis=0, keepdims=True)
    if across is not None:
        both = across(xp.concat((total, along), axis=0))
        total, along = both[:1, :], both[1:, :]

    def gradient(values: Array, mask: Array | None, first: int) -> Array:
        scaled, live = unit(values, mask)
        block = inner[first : first + values.shape[0], :]
        block = (block - total / tokens - scaled * (along / tokens)) * slope
        return xp.where(live, block, xp.zeros_like(block))

    return map_rows(rows, gradient)
