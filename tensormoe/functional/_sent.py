"""Layers of tokens that were sent to experts, with what a token's rows share done once for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.execution import execute
from tensormoe.functional._dtypes import cast
from tensormoe.functional._experts import operands_of
from tensormoe.gates import OneExpert
from tensormoe.planning._sent import Stages


@dataclass(frozen=True, eq=False)
class Sent:
    """Rows that tokens were sent as, one for each of their experts.

    Attributes:
        token: (rows,) the token of each row.
        chosen: the expert of each row; with counts, rows are sorted by expert, and otherwise they
            are in the order of tokens, as many for each.
        tokens: their number.
    """

    token: Array
    chosen: OneExpert
    tokens: int


def enter_experts(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    sent: Sent,
    backend: Backend,
    *,
    any_batch: bool = False,
) -> Array:
    """Outputs (rows, out) of experts for tokens (tokens, in), of which each row takes its own.

    What does not depend on the expert is computed once per token.

    Args:
        config: the layer, of one level.
        parameters: by canonical name.
        x: (tokens, in).
        sent: the rows.
        backend: the adapter of the arrays' library.
        any_batch: whether to run the program for large batches, which is right for all.
    """
    stages, _ = _stages(config, sent, any_batch)
    arrays = operands_of(stages.first, parameters, x, [sent.chosen], backend)
    shared, _ = execute(stages.first, arrays, backend)
    taken = {
        name: backend.take(array, sent.token, axis)
        for name, array, axis in zip(stages.carried, shared, stages.axes, strict=True)
    }
    del shared
    arrays = operands_of(stages.second, parameters, x, [sent.chosen], backend, taken)
    taken.clear()
    made: Array = execute(stages.second, arrays, backend)[0][0]
    return made


def leave_experts(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    sent: Sent,
    weights: Array,
    backend: Backend,
    *,
    any_batch: bool = False,
) -> Array:
    """Outputs (tokens, out) of experts for rows (rows, in), weighted and summed over each token's.

    What is linear and the same for all experts is computed once per token, behind the sum.

    Args:
        config: the layer, of one level.
        parameters: by canonical name.
        x: (rows, in).
        sent: the rows.
        weights: (rows,) of the rows, in any floating-point dtype.
        backend: the adapter of the arrays' library.
        any_batch: whether to run the program for large batches, which is right for all.
    """
    _, stages = _stages(config, sent, any_batch)
    arrays = operands_of(stages.first, parameters, x, [sent.chosen], backend)
    made = list(execute(stages.first, arrays, backend)[0])
    summed = {}
    for name, axis in zip(stages.carried, stages.axes, strict=True):
        summed[name] = sum_rows(made.pop(0), sent, weights, axis, backend)
    arrays = operands_of(stages.second, parameters, x, [sent.chosen], backend, summed)
    summed.clear()
    found: Array = execute(stages.second, arrays, backend)[0][0]
    return found


def sum_rows(array: Array, sent: Sent, weights: Array, axis: int, backend: Backend) -> Array:
    """Sums over each token's rows along an axis, each times its weight."""
    around = (1,) * axis, (1,) * (array.ndim - axis - 1)
    shares = backend.reshape(cast(weights, array.dtype, backend), (*around[0], -1, *around[1]))
    array = array * shares
    if sent.chosen.counts is not None:
        return backend.scatter_add(array, sent.token, axis, sent.tokens)
    k = sent.token.shape[0] // sent.tokens if sent.tokens else 1
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    apart = backend.reshape(array, (*before, sent.tokens, k, *after))
    return backend.sum(apart, (axis + 1,))


def _stages(config: LayerConfig, sent: Sent, any_batch: bool) -> tuple[Stages, Stages]:
    ordered = sent.chosen.counts is not None
    regimes, stages = config.routed_regimes[ordered], config.sent_stages[ordered]
    return stages[-1 if any_batch else regimes.index(sent.token.shape[0])]
