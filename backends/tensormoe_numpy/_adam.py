"""A small optimizer, so that a layer can be trained with nothing but its array library."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np

from tensormoe import backend_of, functional
from tensormoe._validation import brief, instance
from tensormoe.backend import Array
from tensormoe.errors import ShapeError, SpecError


class Adam:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019).

    Args:
        parameters: arrays by name, updated in place.
        lr: learning rate; may be set between steps.
        betas: decay of the running mean and of the running square.
        eps: added to the root of the running square.
        weight_decay: share of a parameter, times ``lr``, taken off at each step.
        rules: by name, as :func:`tensormoe.functional.parameter_rules` makes them: multipliers of
            ``lr``, and which parameters ``weight_decay`` is for; the share that it takes off is the
            same for all of these. A parameter without a rule has ``lr``, and decays.

    Raises:
        SpecError: a number outside its range, or a rule for a name that is not a parameter's.
        BackendError: parameters of no known library, or of several.

    >>> import numpy as np
    >>> weight = {"w": np.array([1.0])}
    >>> adam = Adam(weight, lr=0.1)
    >>> adam.step({"w": np.array([5.0])})
    >>> weight["w"].round(6)
    array([0.9])
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rules: Mapping[str, functional.ParameterRule] | None = None,
    ) -> None:
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        if not pair or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
            raise SpecError(f"betas must be two numbers in [0, 1); got {betas!r}.")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not _is_number(value) or not 0.0 <= value < float("inf"):
                raise SpecError(f"{name} must be a number of at least 0; got {value!r}.")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        instance(parameters, Mapping, "parameters", "a mapping from names to arrays", SpecError)
        self._parameters = dict(parameters)
        self._rules = _checked_rules(rules, parameters)
        self._means, self._squares = _zeros(parameters), _zeros(parameters)
        self._steps = 0

    def step(self, gradients: Mapping[str, Array]) -> None:
        """Move every parameter against its gradient.

        Raises:
            ShapeError: a gradient is missing or has another shape than its parameter.
            BackendError: a gradient is of another library than its parameter.
        """
        instance(gradients, Mapping, "gradients", "a mapping from names to arrays", ShapeError)
        if not self._parameters:
            return
        backend = backend_of(*self._parameters.values())
        for name, value in self._parameters.items():
            if name in gradients:
                functional.check_array(gradients[name], backend, f"the gradient of {name}")
            if name not in gradients or gradients[name].shape != value.shape:
                found = gradients[name].shape if name in gradients else "none"
                raise ShapeError(
                    f"the gradient of {name} must have shape {value.shape}; got {found}."
                )
        self._steps += 1
        first, second = self.betas
        scale = self.lr / (1.0 - first**self._steps)
        usual = functional.ParameterRule("other")
        root = 1.0 / sqrt(1.0 - second**self._steps)
        for name, value in self._parameters.items():
            gradient, mean, square = gradients[name], self._means[name], self._squares[name]
            mean += (1.0 - first) * (gradient - mean)
            square += (1.0 - second) * (gradient * gradient - square)
            rule = self._rules.get(name, usual)
            if self.weight_decay and rule.decays:
                value *= 1.0 - self.lr * self.weight_decay
            deviation = backend.namespace.sqrt(square)
            value -= rule.multiplier * scale * mean / (deviation * root + self.eps)


def _checked_rules(
    rules: Mapping[str, functional.ParameterRule] | None, parameters: Mapping[str, Array]
) -> dict[str, functional.ParameterRule]:
    """Rules, each for a parameter that is there."""
    if rules is None:
        return {}
    instance(rules, Mapping, "rules", "a mapping from names to rules", SpecError)
    for name, rule in rules.items():
        instance(rule, functional.ParameterRule, f"rules[{name!r}]", "a ParameterRule", SpecError)
    if unknown := [name for name in rules if name not in parameters]:
        raise SpecError(
            f"rules must be for parameters; got one for {brief(unknown[0])}, and the parameters "
            f"are {brief([*parameters])}. Pass parameter_rules of the layer's own config."
        )
    return dict(rules)


def _zeros(arrays: Mapping[str, Array]) -> dict[str, Array]:
    if not arrays:
        return {}
    xp = backend_of(*arrays.values()).namespace
    return {name: xp.zeros_like(array) for name, array in arrays.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
