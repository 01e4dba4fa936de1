"""Rules for every parameter of a model, as labels for an optimizer."""

from __future__ import annotations

from typing import Any

from flax import nnx

from tensormoe import functional
from tensormoe._validation import instance
from tensormoe.errors import SpecError
from tensormoe.functional import DIRECTIONS, ParameterRule
from tensormoe_jax.nnx._base import Mixture
from tensormoe_jax.nnx._gate import ExpertGate

__all__ = ["parameter_rules"]


def parameter_rules(
    model: nnx.Module, *, init: str = "variance", directions: float = DIRECTIONS
) -> nnx.State[Any, Any]:
    """A rule for every ``nnx.Param`` of a model, in the structure of their state.

    Layers of tensormoe have those of :func:`tensormoe.functional.parameter_rules`. Parameters of
    other layers have multiplier 1, and decay if they have two axes or more, except for the table of
    an ``nnx.Embed``.

    Args:
        model: any module, with layers of tensormoe anywhere inside.
        init: the scheme that these layers start by.
        directions: of gradients, as for the functional form.

    Returns:
        Rules in the place of arrays. They are hashable and ordered, as the labels of
        ``optax.multi_transform`` have to be.

    Raises:
        SpecError: no module, or options that cannot be.

    >>> import jax, optax
    >>> from flax import nnx
    >>> from tensormoe_jax.nnx import MuMoE
    >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), MuMoE(8, 4, 3, rank=2, rngs=1))
    >>> rules = parameter_rules(model)
    >>> transforms = {
    ...     rule: optax.adamw(1e-3 * rule.multiplier, weight_decay=0.1 if rule.decays else 0.0)
    ...     for rule in jax.tree.leaves(rules)
    ... }
    >>> optimizer = nnx.Optimizer(model, optax.multi_transform(transforms, rules), wrt=nnx.Param)
    """
    instance(model, nnx.Module, "model", "an nnx.Module", SpecError)
    known: dict[tuple[Any, ...], ParameterRule] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Mixture | ExpertGate):
            part = "gate." if isinstance(module, ExpertGate) else "factors."
            found = functional.parameter_rules(module.config, init=init, directions=directions)
            for name, rule in found.items():
                if name.startswith(part):
                    short = name.removeprefix("gate.") if part == "gate." else name
                    known[*path, *short.split(".")] = rule
        elif isinstance(module, nnx.Embed):
            known[*path, "embedding"] = ParameterRule("other", decays=False)

    def rule_of(path: tuple[Any, ...], parameter: Any) -> ParameterRule:
        return known.get(path, ParameterRule("other", decays=parameter.ndim >= 2))

    return nnx.map_state(rule_of, nnx.state(model, nnx.Param))
