"""Initial values of a layer's parameters."""

from __future__ import annotations

from math import sqrt

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.factorizations import Draw, draw_factor
from tensormoe.functional._dtypes import cast

__all__ = ["initial_span", "initialize"]


def initial_span(config: LayerConfig, name: str) -> float:
    """Half the width of the interval around 0 that an array of the gate starts in; 0 for zeros.

    Gates start at zero, so that experts start alike. A gate that chooses k experts would then
    choose the same ones for every token, and the others would never learn: its projections start
    uniform on ±1/√in, as the weight of ``torch.nn.Linear``. So do the biases of a gate whose
    coefficients are positive logits, which at zero have no gradient.

    Args:
        config: the layer.
        name: of the array, such as ``gate.projection_0``.

    >>> from tensormoe import CP, Gate, LayerSpec
    >>> spec = LayerSpec(16, 4, 3, CP(2))
    >>> configs = [LayerConfig(spec, gate) for gate in (Gate(), Gate("top_k", k=1))]
    >>> [initial_span(config, "gate.projection_0") for config in configs]
    [0.0, 0.25]
    """
    gate = config.gate
    if gate is None or gate.k is None or (gate.sums_to_one and "projection" not in name):
        return 0.0
    return 1.0 / sqrt(config.spec.in_features)


def initialize(
    config: LayerConfig,
    backend: Backend,
    normal: Draw,
    uniform: Draw,
    zeros: Draw,
    init: str = "variance",
) -> dict[str, Array]:
    """Draw all parameters, those of the gate as :func:`initial_span` says.

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
    parameters = {}
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
            if span := initial_span(config, name):
                parameters[name] = span * cast(uniform(shape), parameters[name].dtype, backend)
    return parameters
