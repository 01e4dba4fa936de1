"""Contexts: experts that are edited for a while, and coefficients that are changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from tensormoe.editing._amounts import check_amounts
from tensormoe.editing._slices import check_indices
from tensormoe.errors import SpecError
from tensormoe_torch._base import Mixture
from tensormoe_torch._editable import gate_arrays
from tensormoe_torch._gate import ExpertGate, Steering
from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch._sharded import stored


def steered(
    layers: nn.Module | Sequence[nn.Module],
    additions: Mapping[int, float],
    level: int = 0,
) -> AbstractContextManager[None]:
    """A context in which gates add amounts to the coefficients of some experts.

    It is :func:`tensormoe.editing.steer_experts` for layers anywhere inside a model: while it is
    open, every call of such a layer, and of its ``coefficients``, gets the changed ones. Parameters
    are not touched. Contexts may be nested, and their amounts add up. Calls that are given
    coefficients use those. Copies and exported programs that are made meanwhile stay steered; files
    and compiled models do not.

    Args:
        layers: a layer or block with a gate of its own, such as :class:`MuMoE`,
            :class:`MuMoEMLP`, :class:`ConvMoE` or ``mxd.MixtureOfDecoders``, a :class:`PreNormed`
            of one, or a list of several.
        additions: a finite amount by the expert's index.
        level: of the hierarchy.

    Raises:
        TypeError: not such a layer, or not a mapping.
        ShapeError: a level or an index out of range.
        SpecError: a layer without a gate, no layer, or an amount that is not a finite number.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> model = torch.nn.Sequential(MuMoE(8, 4, experts=3, rank=2), torch.nn.ReLU())
    >>> with steered(model[0], {2: 0.5}):
    ...     (model[0].coefficients(torch.zeros(8))[0] * 6).round().tolist()
    [2.0, 2.0, 5.0]
    >>> (model[0].coefficients(torch.zeros(8))[0] * 6).round().tolist()
    [2.0, 2.0, 2.0]
    """
    several: list[Any] = [*layers] if isinstance(layers, list | tuple | nn.ModuleList) else [layers]
    if not several:
        raise SpecError("layers must name at least one layer; got none.")
    gates = []
    for layer in several:
        gate = _gate(layer)
        experts = gate.config.spec.experts
        check_indices(experts, [], level)
        gates.append((gate, (level, tuple(check_amounts(additions, experts[level])))))
    return _steered(gates)


def _gate(layer: nn.Module) -> ExpertGate:
    """The gate of a layer that is steered."""
    block = layer.block if isinstance(layer, PreNormed) else layer
    gate = block if isinstance(block, ExpertGate) else getattr(block, "gate", block)
    if isinstance(gate, ExpertGate):
        return gate
    if isinstance(layer, nn.Module) and gate is None:
        raise SpecError(
            f"a layer must have a gate to be steered; got a {type(layer).__qualname__} without "
            "one. Change the coefficients that it is given, with tensormoe.editing."
        )
    raise TypeError(
        "layers must be layers or blocks whose gate is an ExpertGate; got "
        f"{type(layer).__qualname__}. Pass the layers inside that you mean."
    )


@contextmanager
def _steered(gates: list[tuple[ExpertGate, Steering]]) -> Iterator[None]:
    for gate, entry in gates:
        gate.steering = (*gate.steering, entry)
    try:
        yield
    finally:
        for gate, entry in gates:
            # others may have been opened since; export puts equal entries in the place of these
            left = [*gate.steering]
            if entry in left:
                left.remove(entry)
            gate.steering = tuple(left)


def restored(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which experts can be edited, and after which they are as before, bit for bit.

    On leaving, also by an exception, every factor of every μMoE layer inside ``module``, and every
    parameter and buffer of their gates, gets the values that it had on entering, whatever happened
    to it; parameters of gates that are computed are left alone. Other parameters are not restored.
    It holds one copy of what it restores, of sharded parameters one of this process's part.

    Args:
        module: a layer, or a model with layers anywhere inside.

    Raises:
        TypeError: not a module, or one without a μMoE layer.

    >>> import torch
    >>> from tensormoe_torch import MuMoE, silence_experts
    >>> layer = MuMoE(8, 4, experts=3, rank=2)
    >>> before = layer(torch.ones(8))
    >>> with restored(layer):
    ...     silence_experts(layer, [0, 1, 2])
    ...     print(layer(torch.ones(8)).detach())
    tensor([0., 0., 0., 0.])
    >>> bool((layer(torch.ones(8)) == before).all())
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__qualname__}.")
    layers = [each for each in module.modules() if isinstance(each, Mixture)]
    if not layers:
        raise TypeError(f"module must be or hold a μMoE layer; got {type(module).__qualname__}.")
    gates = [each for each in module.modules() if isinstance(each, ExpertGate)]
    return _restored(layers, [stored(each.factors, each.spec.shapes) for each in layers], gates)


@contextmanager
def _restored(
    layers: list[Mixture], factors: list[dict[str, nn.Parameter]], gates: list[ExpertGate]
) -> Iterator[None]:
    kept = [[each.detach().clone() for each in held.values()] for held in factors]
    before = [{name: a.detach().clone() for name, a in gate_arrays(each).items()} for each in gates]
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, held, values in zip(layers, factors, kept, strict=True):
                stored(layer.factors, held)  # shards take the place of what the last call gathered
                for parameter, value in zip(held.values(), values, strict=True):
                    parameter.copy_(value)
            for gate, arrays in zip(gates, before, strict=True):
                for name, array in gate_arrays(gate).items():
                    array.copy_(arrays[name])
