"""Experts of a model as stacks (experts, in, out), however they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tensormoe.errors import ShapeError, SpecError
from tensormoe.selection import Projection
from tensormoe_torch._dtypes import FLOATS
from tensormoe_torch.compression._dense import ROLES, DenseExperts, Stack
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import is_stacked, linears_by_role
from tensormoe_torch.compression._gate import has_own_gate, own_activation
from tensormoe_torch.compression._recognize import recognized
from tensormoe_torch.surgery._linears import Linear, read_linear


def read_experts(module: nn.Module, name: str) -> DenseExperts:
    """The experts of a module: their weights, and the activation between.

    Raises:
        SpecError: experts that compute something else than ``(act(gate(x)) · up(x))`` times their
            down projection, hold other parameters, or have no values.
        ShapeError: experts of different shapes.
    """
    if isinstance(module, FactorizedExperts):
        return DenseExperts(
            name, module, True, module.act_fn, _stacks_of_ours(module, name), module.groups
        )
    stacks = stacks_of(module, name)
    return recognized(DenseExperts(name, module, is_stacked(module), nn.Identity(), stacks))


def whole_stacks(module: nn.Module, name: str) -> dict[str, Stack]:
    """Parameters of stacked experts as they are stored: ``gate_up_proj`` is one of them.

    Raises:
        SpecError, ShapeError: as :func:`read_experts`.
    """
    held = dict(module.named_parameters())
    parts = 2 if "gate_up_proj" in held else 1
    key = "gate_up_proj" if parts == 2 else "up_proj"
    _check_held(held, {key, "down_proj", f"{key}_bias", "down_proj_bias"}, name)
    for each, parameter in held.items():
        _check_values(parameter, f"{name}.{each}")
    as_matrix = _stores_matrices(module, name, key)

    def stack(key: str) -> Stack:
        weight, bias = held[key].detach(), held.get(f"{key}_bias")
        weight = weight if as_matrix else weight.transpose(1, 2)
        return Stack(weight, None if bias is None else bias.detach())

    return {key: stack(key), "down_proj": stack("down_proj")}


def _stores_matrices(module: nn.Module, name: str, key: str) -> bool:
    """Whether stacks are (experts, in, out), not (experts, out, in), as nn.Linear has it.

    Raises:
        ShapeError: they are neither.
    """
    up, down = module.get_parameter(key), module.get_parameter("down_proj")
    parts = 2 if key == "gate_up_proj" else 1
    count, rows, columns = down.shape
    as_linear = up.shape == (count, parts * columns, rows)
    as_matrix = up.shape == (count, columns, parts * rows)
    if as_linear and as_matrix:
        return bool(getattr(module, "is_transposed", False))
    if not as_linear and not as_matrix:
        raise ShapeError(
            f"{name}.{key} and {name}.down_proj must be the projections of the same experts; got "
            f"shapes {tuple(up.shape)} and {tuple(down.shape)}."
        )
    return as_matrix


def stack_projections(module: nn.Module, name: str) -> tuple[int, tuple[Projection, ...]]:
    """Number of stacked experts, and their projections, by shapes alone.

    Raises:
        ShapeError: they do not fit.
    """
    held = dict(module.named_parameters())
    key = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
    count, rows, columns = held["down_proj"].shape
    hidden, out = (rows, columns) if _stores_matrices(module, name, key) else (columns, rows)
    if key == "gate_up_proj" and has_own_gate(module):
        # biases stay as they are
        return count, (Projection(key, out, 2 * hidden), Projection("down_proj", hidden, out))
    bias = f"{key}_bias" in held
    roles = ("gate_proj", "up_proj") if key == "gate_up_proj" else ("up_proj",)
    ahead = (Projection(role, out, hidden, bias) for role in roles)
    return count, (*ahead, Projection("down_proj", hidden, out, "down_proj_bias" in held))


def is_concatenated(module: nn.Module) -> bool:
    """Whether gate and up are halves of one parameter; else they take turns in it."""
    return bool(getattr(module, "is_concatenated", True))


def stacks_of(module: nn.Module, name: str) -> dict[str, Stack]:
    """Stacks by role, views of the module's parameters where it has stacks.

    Raises:
        SpecError, ShapeError: as :func:`read_experts`.
    """
    return _stacks_of(module, name) if is_stacked(module) else _stacks_of_list(module, name)


def _stacks_of(module: nn.Module, name: str) -> dict[str, Stack]:
    """Parameters of all experts; gate and up are halves of one, or take turns in it.

    They stay one where the experts have a gate of their own.
    """
    found = whole_stacks(module, name)
    if "gate_up_proj" not in found or has_own_gate(module):
        return found
    both, down = found["gate_up_proj"], found["down_proj"]
    hidden = down.sizes[0]
    gate, second = slice(0, hidden), slice(hidden, None)
    if not is_concatenated(module):
        gate, second = slice(0, None, 2), slice(1, None, 2)
    return {"gate_proj": both.part(gate), "up_proj": both.part(second), "down_proj": down}


def _stacks_of_ours(module: FactorizedExperts, name: str) -> dict[str, Stack]:
    """Parameters of dense layers; gate and up projection may be one."""
    found = {}
    layers: dict[str, Any] = dict(module.projections.items())
    for role, layer in layers.items():
        factors = {key: each.detach() for key, each in layer.factors.items()}
        for key, each in factors.items():
            _check_values(each, f"{name}.{role}.{key}")
        bias = module._parameters.get(f"{role}_bias", factors.get("bias"))
        found[role] = Stack(factors["weight"], None if bias is None else bias.detach())
    return found


def _stacks_of_list(module: nn.Module, name: str) -> dict[str, Stack]:
    """Experts one by one."""
    linears: list[dict[str, Linear]] = []
    kinds = []
    for index, expert in enumerate(module.children()):
        found = linears_by_role(expert)
        if not found:
            raise SpecError(
                f"experts must have linear layers gate, up and down, and no others; "
                f"{f'{name}.{index}'!r} is a {type(expert).__name__} of other parts. Leave "
                f"{name!r} out of the selection."
            )
        own = {id(each) for linear in found.values() for each in linear.parameters()}
        held = dict(expert.named_parameters())
        _check_held(held, {key for key, each in held.items() if id(each) in own}, f"{name}.{index}")
        linears.append(
            {role: read_linear(each, f"{name}.{index}.{role}") for role, each in found.items()}
        )
        kinds.append((type(expert), str(own_activation(expert))))
    for index, each in enumerate(linears):
        if _described(each) != _described(linears[0]):
            raise ShapeError(
                f"experts of {name!r} must all have the same shapes, biases, dtype and device; "
                f"expert 0 has {_described(linears[0])}, expert {index} {_described(each)}. Select "
                "lists of equal experts."
            )
        if kinds[index] != kinds[0]:
            raise SpecError(
                f"experts of {name!r} must be of one class and activation; expert 0 is {kinds[0]}, "
                f"expert {index} {kinds[index]}. Leave {name!r} out of the selection."
            )
    return {role: _stack([each[role] for each in linears]) for role in ROLES if role in linears[0]}


def _stack(linears: list[Linear]) -> Stack:
    biases = tuple(each.bias for each in linears if each.bias is not None)
    return Stack(tuple(each.weight for each in linears), biases or None)


def _described(linears: Mapping[str, Linear]) -> str:
    parts = []
    for role, each in linears.items():
        bias, weight = "no bias" if each.bias is None else "a bias", each.weight
        parts.append(
            f"{role} {each.sizes[0]} → {each.sizes[1]}, {bias}, {weight.dtype}, {weight.device}"
        )
    return f"({'; '.join(parts)})"


def _check_held(held: Mapping[str, Tensor], known: set[str], name: str) -> None:
    rest = [key for key in held if key not in known]
    if rest:
        raise SpecError(
            f"experts must hold the weights of their projections alone; {name!r} also holds "
            f"{', '.join(map(repr, rest[:3]))}. Leave it out of the selection."
        )


def _check_values(parameter: Tensor, name: str) -> None:
    if parameter.device.type == "meta":
        raise SpecError(f"{name} must hold values; it is on the meta device. Load it first.")
    if parameter.dtype not in FLOATS:
        raise SpecError(
            f"{name} must have floating-point weights; got {parameter.dtype}. Dequantize them."
        )
