"""Groups for an optimizer: decay or none, learning rates of factors, and gates."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe.functional import ParameterRule, parameter_rules
from tensormoe_torch._base import Mixture
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch.mixtures import MixtureRouter, SoftRouter, TaskRouter

_EXEMPT = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    gate_lr: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups for an optimizer: decaying or not, and gates.

    Decay pulls a parameter towards zero, so it suits those that start around zero. In a μMoE layer
    these decay: input, output and core factors, dense weights, and the gate's projections. These
    don't:

    - expert factors. They start at ones or identities plus noise, which is what all experts share;
      pulled towards zero, they would take the shared part of every expert along, and decay the
      product of factors once more.
    - biases of experts and gates, whatever their number of axes.
    - the table of an embedding, whose rows decay in steps that never see them.

    The rest of a model follows the usual rule: parameters of fewer than two axes don't decay,
    neither do embeddings and norms, and all else does. (The released code of Oldfield et al. 2024
    goes by the number of axes alone, so its expert factors and biases of tensor rings decay too.)

    Args:
        model: any module, with μMoE layers anywhere inside.
        weight_decay: of what decays, not negative.
        lr: the learning rate of linear layers, not negative. Groups have learning rates of their
            own then: for factors, those with which :func:`tensormoe.functional.parameter_rules`
            lets a fresh layer move like a linear one under Adam; ``lr`` for all else. Their weight
            decay is divided by the same multiplier, so that AdamW's product of both is the same
            for all. By default every group has the optimizer's learning rate.
        gate_lr: a learning rate for gates and routers alone, not negative; by default they have
            the optimizer's, as everything else.

    Returns:
        Two groups, the decaying one first; with ``gate_lr``, two more that have it, the gates'
        projections, which decay, and their biases. Any may be empty. With ``lr``, one more for
        every other multiplier. Every trainable parameter is in exactly one of them, shared ones
        too: what one module keeps from decay does not decay, and the smallest multiplier counts.
        Frozen ones are left out.

    Raises:
        TypeError: ``model`` is no module.
        SpecError: ``weight_decay``, ``lr`` or ``gate_lr`` is not a number, negative or not finite.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> model = torch.nn.Sequential(MuMoE(8, 4, experts=3, rank=2), torch.nn.Linear(4, 2))
    >>> decayed, kept = parameter_groups(model, weight_decay=0.1)
    >>> [tuple(each.shape) for each in decayed["params"]]
    [(8, 2), (4, 2), (8, 3), (2, 4)]
    >>> [tuple(each.shape) for each in kept["params"]]
    [(2,), (3, 2), (2,)]
    >>> optimizer = torch.optim.AdamW([decayed, kept], lr=1e-3)
    >>> groups = parameter_groups(model, weight_decay=0.1, gate_lr=1e-4)
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    >>> [(len(each["params"]), each["weight_decay"], each["lr"]) for each in optimizer.param_groups]
    [(3, 0.1, 0.001), (3, 0.0, 0.001), (1, 0.1, 0.0001), (0, 0.0, 0.0001)]
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1, lr=1e-3))
    >>> rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    >>> round(rates[model[0].factors["expert_0"]] / rates[model[1].weight], 2)
    4.62
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}.")
    _check_number(weight_decay, "weight_decay", "Use 0.1 or less.")
    exempt = {id(each) for module in model.modules() for each in _exempt(module)}
    gates: set[int] = set()
    if gate_lr is not None:
        _check_number(gate_lr, "gate_lr", "Leave it out to train gates as everything else.")
        gates = {
            id(each)
            for module in model.modules()
            if isinstance(module, ExpertGate | MixtureRouter | SoftRouter | TaskRouter)
            for each in module.parameters()
        }
    multipliers: dict[int, float] = {}
    if lr is not None:
        _check_number(lr, "lr", "Leave it out to give the optimizer one rate for all.")
        multipliers = _multipliers(model)
    sorted_in: dict[tuple[bool, float, bool], list[nn.Parameter]] = {
        (gate, 1.0, decays): []
        for gate in ((False,) if gate_lr is None else (False, True))
        for decays in (True, False)
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in exempt
            key = id(parameter) in gates, multipliers.get(id(parameter), 1.0), decays
            sorted_in.setdefault(key, []).append(parameter)
    groups = []
    for (gate, multiplier, decays), parameters in sorted_in.items():
        rate = gate_lr if gate else None if lr is None else lr * multiplier
        groups.append(
            {"params": parameters, "weight_decay": weight_decay / multiplier if decays else 0.0}
            | ({} if rate is None else {"lr": rate})
        )
    return groups


def _check_number(value: float, name: str, remedy: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not isfinite(value) or value < 0:
        raise SpecError(f"{name} must be a number of at least 0; got {value!r}. {remedy}")


def _exempt(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters that must not decay, whatever their number of axes."""
    if isinstance(module, _EXEMPT):
        yield from module.parameters(recurse=False)
    for parameter, rule in _ruled(module):
        if not rule.decays:
            yield parameter


def _multipliers(model: nn.Module) -> dict[int, float]:
    """The multiplier of every parameter of a factor, by its identity."""
    found: dict[int, float] = {}
    for module in model.modules():
        for parameter, rule in _ruled(module):
            known = found.get(id(parameter), rule.multiplier)
            found[id(parameter)] = min(known, rule.multiplier)
    return found


def _ruled(module: nn.Module) -> Iterator[tuple[nn.Parameter, ParameterRule]]:
    """A layer's factors and biases with their rules."""
    if isinstance(module, Mixture):
        rules = parameter_rules(module.config, init=module.init)
        for key, parameter in module.factors.named_parameters():
            yield parameter, rules[f"factors.{_origin(key)}"]


def _origin(key: str) -> str:
    """The name of a factor by that of a parameter which it may be computed from."""
    parts = key.split(".")
    if "parametrizations" in parts:
        return parts[parts.index("parametrizations") + 1]
    return parts[-1].removesuffix("_orig")
