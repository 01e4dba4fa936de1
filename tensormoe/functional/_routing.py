"""From inputs to coefficients, through a layer's own gate, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError
from tensormoe.execution import plus
from tensormoe.functional._checks import own_gate
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import (
    Across,
    Activation,
    Gate,
    Statistics,
    activate,
    activate_vjp,
    balanced_bias,
)

__all__ = ["Routed", "gate_vjp", "route"]


@dataclass(frozen=True, eq=False)
class Routed:
    """Results of a gate.

    Args:
        coefficients: one array (batch, N_e) per level.
        logits: what they came from, before normalization: for the backward pass, and for losses.
        buffers: those that training changed, by canonical name.
    """

    coefficients: list[Array]
    logits: list[Array]
    buffers: dict[str, Array] = field(default_factory=dict)


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
    noise: Sequence[Array] | None = None,
    activation: Callable[..., Activation] = activate,
) -> Routed:
    """Coefficients of inputs (batch, in), from the layer's own gate.

    Logits and coefficients are float32 or wider, whatever the layer's dtype.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in).
        backend: the adapter of the arrays' library.
        buffers: batch norm's running statistics, and biases for the choice, by canonical name.
        keep: whether to return the logits.
        training: whether batch norm uses the batch's own statistics, and buffers move.
        across: as for :func:`tensormoe.gates.activate`.
        noise: standard normal arrays (batch, N_e), one per level, for a gate with ``noise`` in
            training; other calls leave them out.
        activation: that function, or another with its arguments.

    Raises:
        GateError: a gate with noise in training, and none given.
    """
    gate = own_gate(config.gate, config)
    wide = widened(x, backend)
    noises = _checked_noise(gate, noise, training, config.spec.levels)
    made, kept, changed = [], [], {}
    for level in range(config.spec.levels):
        projection = widened(parameters[f"gate.projection_{level}"], backend)
        logits = backend.matmul(wide, projection)
        if gate.bias:
            logits = plus(logits, widened(parameters[f"gate.bias_{level}"], backend), backend)
        bias = _choice_bias(gate, buffers, level)
        found = activation(
            gate,
            logits,
            statistics=_statistics(buffers, level),
            training=training,
            backend=backend,
            across=across,
            choice=_choice(gate, bias, noises[level], backend),
        )
        made.append(found.coefficients)
        if keep:
            kept.append(logits)
        del logits
        if training and found.statistics is not None:
            changed[f"gate.running_mean_{level}"] = found.statistics.mean
            changed[f"gate.running_variance_{level}"] = found.statistics.variance
        if training and bias is not None:
            changed[f"gate.choice_bias_{level}"] = balanced_bias(
                bias, made[-1], gate.balance, across=across, backend=backend
            )
    return Routed(made, kept, changed)


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
    by_logits: Sequence[Array | None] | None = None,
) -> tuple[Array | None, dict[str, Array]]:
    """Gradients of :func:`route` by its input and its parameters.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), as in the forward call.
        routed: what the forward call, with ``keep=True``, returned.
        cotangents: one array (batch, N_e) per level.
        backend: the adapter of the arrays' library.
        buffers: the running statistics that the forward call was given.
        training: whether batch norm used the batch's own statistics.
        by_input: whether the gradient by ``x`` is wanted too.
        across: as in the forward call.
        by_logits: further derivatives, with respect to the logits, that losses on them have: one
            array (batch, N_e) or None per level.

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
        more = None if by_logits is None else by_logits[level]
        if more is not None:
            inner = plus(inner, widened(more, backend), backend)
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
    if not buffers or f"gate.running_mean_{level}" not in buffers:
        return None
    return Statistics(
        buffers[f"gate.running_mean_{level}"], buffers[f"gate.running_variance_{level}"]
    )


def _choice_bias(gate: Gate, buffers: Mapping[str, Array] | None, level: int) -> Array | None:
    if not gate.balance:
        return None
    name = f"gate.choice_bias_{level}"
    if not buffers or name not in buffers:
        raise GateError(
            f"a gate with balance={gate.balance} needs its biases; got no {name!r}. Pass the "
            "buffers that the layer started with or that training returned."
        )
    return buffers[name]


def _choice(gate: Gate, bias: Array | None, noise: Array | None, backend: Backend) -> Array | None:
    """Terms added to the normalized logits for the choice of experts."""
    if noise is None:
        return bias
    noise = widened(noise, backend) * gate.noise
    return noise if bias is None else noise + bias


def _checked_noise(
    gate: Gate, noise: Sequence[Array] | None, training: bool, levels: int
) -> Sequence[Array | None]:
    if not gate.noise or not training:
        return [None] * levels
    if noise is None:
        raise GateError(
            f"a gate with noise={gate.noise} needs a source of random numbers in training; got "
            "none. Pass one, a key for instance, or train a gate without noise."
        )
    return noise
