"""From inputs to coefficients, through a layer's own gate, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.execution import plus
from tensormoe.functional._checks import own_gate
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import Across, Activation, Statistics, activate, activate_vjp

__all__ = ["Routed", "gate_vjp", "route"]


@dataclass(frozen=True, eq=False)
class Routed:
    """Results of a gate.

    Args:
        coefficients: one array (batch, N_e) a level.
        logits: what they came from, for the backward pass.
        statistics: batch norm's new running statistics, one a level; None for other gates.
    """

    coefficients: list[Array]
    logits: list[Array]
    statistics: list[Statistics] | None


def route(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    backend: Backend,
    *,
    buffers: Mapping[str, Array] | None = None,
    keep: bool = False,
    training: bool = False,
    across: Across | None = None,
    activation: Callable[..., Activation] = activate,
) -> Routed:
    """Coefficients of inputs (batch, in), from the layer's own gate.

    Logits and coefficients are float32 or wider, whatever the layer's dtype.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in).
        backend: the adapter of the arrays' library.
        buffers: batch norm's running statistics by canonical name.
        keep: whether to return the logits, for the backward pass.
        training: whether batch norm uses the batch's own statistics.
        across: as for :func:`tensormoe.gates.activate`.
        activation: that function, or another with its arguments.
    """
    gate = own_gate(config.gate, config)
    wide = widened(x, backend)
    found: list[Activation] = []
    kept = []
    for level in range(config.spec.levels):
        projection = widened(parameters[f"gate.projection_{level}"], backend)
        logits = backend.matmul(wide, projection)
        if gate.bias:
            logits = plus(logits, widened(parameters[f"gate.bias_{level}"], backend), backend)
        found.append(
            activation(
                gate,
                logits,
                statistics=_statistics(buffers, level),
                training=training,
                backend=backend,
                across=across,
            )
        )
        if keep:
            kept.append(logits)
        del logits
    statistics = [each.statistics for each in found if each.statistics is not None]
    return Routed([each.coefficients for each in found], kept, statistics or None)


def gate_vjp(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    routed: Routed,
    cotangents: Sequence[Array],
    backend: Backend,
    *,
    buffers: Mapping[str, Array] | None = None,
    training: bool = True,
    by_input: bool = True,
    across: Across | None = None,
) -> tuple[Array | None, dict[str, Array]]:
    """Gradients of :func:`route` by its input and its parameters.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), as in the forward call.
        routed: what the forward call, with ``keep=True``, returned.
        cotangents: one array (batch, N_e) a level.
        backend: the adapter of the arrays' library.
        buffers: the running statistics that the forward call was given.
        training: whether batch norm used the batch's own statistics.
        by_input: whether the gradient by ``x`` is wanted too.
        across: as in the forward call.

    Returns:
        The gradient by ``x`` or None, and the parameters' by canonical name.
    """
    gate = config.gate
    assert gate is not None
    wide = widened(x, backend)
    gradients: dict[str, Array] = {}
    total = None
    for level, (logits, weights, cotangent) in enumerate(
        zip(routed.logits, routed.coefficients, cotangents, strict=True)
    ):
        inner = activate_vjp(
            gate,
            logits,
            weights,
            widened(cotangent, backend),
            statistics=_statistics(buffers, level),
            training=training,
            backend=backend,
            across=across,
        )
        projection = parameters[f"gate.projection_{level}"]
        dtype = projection.dtype
        table = backend.matmul(backend.permute(wide, (1, 0)), inner)
        gradients[f"gate.projection_{level}"] = cast(table, dtype, backend)
        if gate.bias:
            row = backend.sum(inner, (0,))
            gradients[f"gate.bias_{level}"] = cast(row, dtype, backend)
        if by_input:
            back = backend.permute(widened(projection, backend), (1, 0))
            part = backend.matmul(inner, back)
            total = part if total is None else plus(total, part, backend)
            del part  # not held while the next level's is made
        del inner
    return None if total is None else cast(total, x.dtype, backend), gradients


def _statistics(buffers: Mapping[str, Array] | None, level: int) -> Statistics | None:
    if not buffers:
        return None
    return Statistics(
        buffers[f"gate.running_mean_{level}"], buffers[f"gate.running_variance_{level}"]
    )
