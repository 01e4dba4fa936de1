"""Initial values of a mixture's arrays."""

from __future__ import annotations

from tensormoe._mixture import MixtureConfig, OwnArray
from tensormoe._names import makes_logits
from tensormoe.backend import Array, Backend
from tensormoe.factorizations import Draw
from tensormoe.functional import initialize
from tensormoe.functional._dtypes import cast


def initialize_mixture(
    config: MixtureConfig,
    backend: Backend,
    normal: Draw,
    uniform: Draw,
    zeros: Draw,
    init: str = "variance",
) -> dict[str, Array]:
    """Draw all parameters, layer by layer, then the mixture's own arrays.

    Args:
        config: the mixture.
        backend: adapter of the library that draws.
        normal: draws standard normal arrays of a shape, in the layer's dtype.
        uniform: draws arrays uniform on [-1, 1) of a shape, in the layer's dtype.
        zeros: makes arrays of zeros of a shape; they have the dtype of the router.
        init: ``"variance"`` or ``"paper"``, see :meth:`LayerSpec.initializers`.

    Raises:
        SpecError: an unknown scheme.
    """
    parameters: dict[str, Array] = {}
    for name, layer in config.layers.items():
        drawn = initialize(layer, backend, normal, uniform, zeros, init)
        parameters |= {f"{name}.{each}": array for each, array in drawn.items()}
    for name, own in config.own.items():
        # only a router may have another dtype than the layers
        start = zeros(own.shape) if makes_logits(name) else 0.0 * uniform(own.shape)
        parameters[name] = draw_own(own, start, backend, normal, uniform)
    return parameters


def draw_own(own: OwnArray, zeros: Array, backend: Backend, normal: Draw, uniform: Draw) -> Array:
    """Initial values of an array that is not a factor, in the dtype of ``zeros``."""
    if own.start == "ones":
        return zeros + 1.0
    if own.start == "zeros":
        return zeros
    drawn = normal(own.shape) if own.start == "normal" else uniform(own.shape)
    return own.size * cast(drawn, zeros.dtype, backend)
