"""Rules for every parameter of a model, as labels for an optimizer."""

from __future__ import annotations

from typing import Any, TypeVar

import equinox as eqx
import jax

from tensormoe import functional
from tensormoe.functional import DIRECTIONS, ParameterRule
from tensormoe_jax.equinox._base import Mixture
from tensormoe_jax.equinox._gate import ExpertGate

__all__ = ["parameter_rules"]

T = TypeVar("T")


def parameter_rules(model: T, *, init: str = "variance", directions: float = DIRECTIONS) -> T:
    """A rule for every parameter of a model, in the structure of its inexact arrays.

    Layers of tensormoe have those of :func:`tensormoe.functional.parameter_rules`. Parameters of
    other layers have multiplier 1, and decay if they have two axes or more, except for the table of
    an ``equinox.nn.Embedding``.

    Args:
        model: any pytree, with layers of tensormoe anywhere inside.
        init: the scheme that these layers start by.
        directions: of gradients, as for the functional form.

    Returns:
        The model with rules in the place of arrays, and None in that of all that
        ``equinox.is_inexact_array`` is false for. Rules are hashable and ordered, as the labels of
        ``optax.multi_transform`` have to be; behind a ``lambda``, as optax calls labels that are
        callable, which modules are.

    Raises:
        SpecError: options that cannot be.

    >>> import equinox as eqx, jax, optax
    >>> from tensormoe_jax.equinox import MuMoE
    >>> one, two = jax.random.split(jax.random.key(0))
    >>> model = eqx.nn.Sequential([eqx.nn.Linear(8, 8, key=one), MuMoE(8, 4, 3, rank=2, key=two)])
    >>> rules = parameter_rules(model)
    >>> transforms = {
    ...     rule: optax.adamw(1e-3 * rule.multiplier, weight_decay=0.1 if rule.decays else 0.0)
    ...     for rule in jax.tree.leaves(rules)
    ... }
    >>> adam = optax.multi_transform(transforms, lambda _: rules)
    >>> state = adam.init(eqx.filter(model, eqx.is_inexact_array))
    """
    nodes = Mixture, ExpertGate, eqx.nn.Embedding

    def of_node(node: Any) -> Any:
        if isinstance(node, eqx.nn.Embedding):
            return jax.tree.map(lambda _: ParameterRule("other", decays=False), node)
        if not isinstance(node, Mixture | ExpertGate):
            return ParameterRule("other", decays=node.ndim >= 2)
        if isinstance(node, ExpertGate):
            return jax.tree.map(lambda each: ParameterRule("gate", decays=each.ndim >= 2), node)
        found = functional.parameter_rules(node.config, init=init, directions=directions)
        factors = {name: found[f"factors.{name}"] for name in node.factors}
        gate = None if node.gate is None else of_node(node.gate)
        return eqx.tree_at(_parts, node, (factors, gate), is_leaf=lambda each: each is None)

    arrays = eqx.filter(model, eqx.is_inexact_array)
    labelled: T = jax.tree.map(of_node, arrays, is_leaf=lambda node: isinstance(node, nodes))
    return labelled


def _parts(layer: Mixture) -> tuple[Any, Any]:
    return layer.factors, layer.gate
