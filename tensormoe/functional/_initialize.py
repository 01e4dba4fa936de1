"""First values of a layer's parameters."""

from __future__ import annotations

from math import sqrt

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.factorizations import Draw, draw_factor
from tensormoe.functional._dtypes import cast

__all__ = ["gate_bound", "initialize"]


def initialize(
    config: LayerConfig,
    backend: Backend,
    normal: Draw,
    uniform: Draw,
    zeros: Draw,
    init: str = "variance",
) -> dict[str, Array]:
    """Draw all parameters; the gate's start as :func:`gate_bound` says.

    Args:
        config: the layer.
        backend: adapter of the library that draws.
        normal: draws standard normal arrays of a shape, in the layer's dtype.
        uniform: draws arrays uniform on [-1, 1) of a shape, in the layer's dtype.
        zeros: makes arrays of zeros of a shape, in the layer's dtype.
        init: ``"variance"`` or ``"paper"``, see :meth:`LayerSpec.initializers`.

    Raises:
        SpecError: an unknown scheme.
    """
    starts = config.spec.initializers(init)
    tables = {term.input_factor.name for term in config.spec.network.terms}
    parameters, bound = {}, gate_bound(config)
    for name, shape in config.parameter_shapes().items():
        kind, _, factor = name.partition(".")
        if kind == "factors":
            array = draw_factor(starts[factor], shape, backend, normal, uniform)
            if config.indexed_input and factor in tables:
                # rows of a table are used alone: they start with variance 1, as nn.Embedding's
                array = array * sqrt(3.0 * config.spec.in_features)
            parameters[name] = array
        else:
            parameters[name] = zeros(shape)
            if bound:
                drawn = cast(uniform(shape), parameters[name].dtype, backend)
                parameters[name] = bound * drawn
    return parameters


def gate_bound(config: LayerConfig) -> float:
    """Bound of the uniform initial values of a gate's projection and bias; 0 for zeros.

    Zeros make experts start alike. A gate whose coefficients are positive logits would stay at
    zero, without a gradient: it starts like ``torch.nn.Linear``.

    >>> from tensormoe import CP, Gate, LayerSpec
    >>> spec = LayerSpec(16, 4, 3, CP(2))
    >>> [gate_bound(LayerConfig(spec, gate)) for gate in (Gate(), Gate("relu_top_k", k=1))]
    [0.0, 0.25]
    """
    if config.gate is None or config.gate.sums_to_one:
        return 0.0
    return float(config.spec.in_features**-0.5)
