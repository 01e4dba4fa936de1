"""Initial values with which a mixture adds nothing, and learns from the first step on."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.factorizations import INPUT, OUTPUT, Draw, Factor, Term
from tensormoe.functional import initial_span
from tensormoe.functional._dtypes import cast


def start_at_zero(
    config: LayerConfig, arrays: Mapping[str, Array], uniform: Draw, backend: Backend
) -> dict[str, Array]:
    """Initial values with which a mixture's outputs are zero, and its first step moves it.

    Of every term of the network one factor is zero, and no others: the derivative by it is not.
    It is one that tells no expert from another, an output factor where there is a choice, so that
    experts differ in what they start from. Dense experts are one factor each, all zero: with equal
    coefficients they would get equal gradients for ever, so that their gate starts like
    ``torch.nn.Linear`` instead of at zero.

    Args:
        config: the mixture.
        arrays: initial values by canonical name, as of any layer.
        uniform: draws arrays uniform on [-1, 1) of a shape.
        backend: the adapter of the arrays' library.

    Returns:
        The arrays that change, by canonical name.
    """
    xp, network = backend.namespace, config.spec.network
    changed: dict[str, Array] = {}
    for term in network.terms:
        chosen = _zero_of(term)
        names = [chosen.name]
        if term.bias is not None and chosen == term.input_factor:
            names.append(term.bias.name)
        for name in names:
            key = f"factors.{name}"
            changed[key] = xp.zeros_like(arrays[key])
    alive = {
        leg
        for factor in network.factors
        if f"factors.{factor.name}" not in changed
        for leg in factor.legs
    }
    for name in config.parameter_shapes():
        level = name.rpartition("projection_")[2]
        if not name.startswith("gate.projection_") or network.expert_legs[int(level)] in alive:
            continue
        if not initial_span(config, name):
            span = 1.0 / sqrt(config.spec.in_features)
            like = arrays[name]
            changed[name] = span * cast(uniform(tuple(like.shape)), like.dtype, backend)
    return changed


def _zero_of(term: Term) -> Factor:
    """The factor of a term that starts at zero."""

    def order(factor: Factor) -> tuple[bool, bool, bool]:
        tells = {leg for leg in factor.legs if leg.startswith("n")}
        others = {leg for each in term.factors if each != factor for leg in each.legs}
        writes = OUTPUT in factor.legs and INPUT not in factor.legs
        # experts must differ in what is left; then output factors, as LoRA's
        return not tells <= others, not writes, bool(tells)

    return min(term.factors, key=order)
