"""MLP blocks of other code, recognized by running them once and watching.

Names of submodules say little: a module with ``fc1`` and ``fc2`` may do anything in between. So
the block runs on a few inputs, its first linear layers are made to return known values, and what
reaches the last one, and leaves it, says whether the block is ``fc2(act(fc1(x)))`` or
``down(act(gate(x)) * up(x))``, and which ``act`` it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._validation import brief
from tensormoe.errors import SpecError
from tensormoe_torch._activations import ACTIVATIONS, match, own_activation, read_activation
from tensormoe_torch.surgery._linears import Linear, is_linear, read_linear
from tensormoe_torch.surgery._watch import Watch, call_order, watch


@dataclass(frozen=True, eq=False)
class Block:
    """``second(act(first(x)))`` or, gated, ``second(act(first(x)) * up(x))``.

    Args:
        first: fc1, or gate.
        second: fc2, or down.
        activation: name of the activation; None for one that has no name.
        drops: rates of dropout behind the activation and behind the second layer.
        up: the layer that the activation is multiplied by, of a gated block.
        act: the activation without a name.
    """

    first: Linear
    second: Linear
    activation: str | None
    drops: tuple[float, ...] = (0.0, 0.0)
    up: Linear | None = None
    act: Callable[[Tensor], Tensor] | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In, hidden, out."""
        return (*self.first.sizes, self.second.sizes[1])

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, in the order in which they run."""
        return tuple(each for each in (self.first, self.up, self.second) if each is not None)

    @property
    def ahead(self) -> Linear:
        """The layers before the activation as one: two matrices are side by side, in a copy."""
        if self.up is None:
            return self.first
        parts = (self.first, self.up)
        biases = [
            part.weight.new_zeros(part.sizes[1]) if part.bias is None else part.bias
            for part in parts
        ]
        none = all(part.bias is None for part in parts)
        weight = torch.cat([part.weight for part in parts], dim=1)
        return Linear(weight, None if none else torch.cat(biases))


def read_block(block: Any, name: str, values: bool = True) -> Block:
    """The parts of an MLP block.

    Args:
        block: a module that holds two linear layers, or three if it is gated, an activation and
            dropout, whatever their names; or the tuple (fc1, act, fc2), or (gate, act, up, down).
        name: for messages.
        values: whether finite values are needed, not only sizes.

    Raises:
        SpecError: no such block.
    """
    if isinstance(block, tuple):
        found = _read_parts(block, name, values)
    elif isinstance(block, nn.Module):
        found = _read_module(block, name, values)
    else:
        raise SpecError(
            f"{name} must be a module with two linear layers (three if it is gated), or the tuple "
            f"(fc1, act, fc2) or (gate, act, up, down); got {brief(block)}."
        )
    _check_fit(found, name)
    return found


def _read_parts(parts: tuple[Any, ...], name: str, values: bool) -> Block:
    if len(parts) not in (3, 4):
        raise SpecError(
            f"{name} must have three parts, (fc1, act, fc2), or four, (gate, act, up, down); got "
            f"{len(parts)}: {brief(parts)}."
        )
    titles = ("fc1", "fc2") if len(parts) == 3 else ("gate", "up", "down")
    first, *up, second = (
        read_linear(part, f"{title} of {name}", values)
        for part, title in zip((parts[0], *parts[2:]), titles, strict=True)
    )
    known, given = read_activation(parts[1], "act")
    own = None
    if given is not None:
        own = own_activation(known, given, first.weight.device, first.weight.dtype)
    return Block(first, second, known, up=up[0] if up else None, act=own)


def _check_fit(block: Block, name: str) -> None:
    first, second = block.first.weight, block.second.weight
    if first.shape[1] != second.shape[0]:
        raise SpecError(
            f"the layers of {name} must fit: fc1 gives {first.shape[1]} features, fc2 takes "
            f"{second.shape[0]}. Give them in the order in which they run."
        )
    if block.up is not None and block.up.sizes != block.first.sizes:
        raise SpecError(
            f"the layers of {name} must fit: gate is {block.first.sizes} and up is "
            f"{block.up.sizes}. Give them in the order (gate, act, up, down)."
        )
    for each in block.linears:
        if (each.weight.dtype, each.weight.device) != (second.dtype, second.device):
            raise SpecError(
                f"the layers of {name} must have one dtype and device; got {each.weight.dtype} on "
                f"{each.weight.device} and {second.dtype} on {second.device}. Move one with "
                ".to(…)."
            )


def _read_module(module: nn.Module, name: str, values: bool) -> Block:
    linears = [each for each in module.modules() if is_linear(each)]
    kind = type(module).__name__
    if len(linears) not in (2, 3):
        raise SpecError(
            f"{name} ({kind}) is no linear layer and no MLP: an MLP has two linear layers, or "
            f"three if it is gated, and this has {len(linears)}."
        )
    read = {
        id(each): read_linear(each, f"layer {k} of {name}", values)
        for k, each in enumerate(linears)
    }
    if read[id(linears[0])].weight.device.type == "meta":
        raise SpecError(
            f"{name} can't be tried out as an MLP on the meta device. Load its weights first."
        )
    linears = call_order(module, linears, [read[id(each)].sizes[0] for each in linears])
    *heads, second = (read[id(each)] for each in linears)
    seen = watch(module, linears, [*heads, second])
    matched = _match(seen)
    _check_rest(module, name, linears, None if matched is None else matched.act)
    if not seen.plain:
        raise SpecError(
            f"{name} ({kind}) is no MLP: it does more than fc2(act(fc1(x))) or "
            f"down(act(gate(x)) * up(x)){seen.trouble}. Replace its linear layers alone, or give "
            "the parts as (fc1, act, fc2) or (gate, act, up, down)."
        )
    if matched is None:
        quoted = ", ".join(map(repr, ACTIVATIONS))
        raise SpecError(
            f"the activation of {name} must be one of {quoted}, or a module that is given what the "
            "first layer returns; it computes something else. Give the parts as (fc1, act, fc2) "
            "or (gate, act, up, down), or replace its linear layers alone."
        )
    halves = heads
    if len(seen.returned) > len(heads):
        size = second.sizes[0]
        halves = [_columns(heads[0], 0, size), _columns(heads[0], size, 2 * size)]
    first, *up = halves if matched.gate == 0 else halves[::-1]
    return Block(first, second, matched.name, tuple(seen.rates), up[0] if up else None, matched.act)


def _columns(linear: Linear, start: int, stop: int) -> Linear:
    bias = None if linear.bias is None else linear.bias[start:stop]
    return Linear(linear.weight[:, start:stop], bias)


def _check_rest(module: nn.Module, name: str, linears: list[nn.Module], act: object | None) -> None:
    """Nothing but linear layers and the activation may hold numbers."""
    parts = [*linears, *([act] if isinstance(act, nn.Module) else [])]
    owned = {id(p) for part in parts for p in (*part.parameters(), *part.buffers())}
    rest = [
        key
        for key, p in (*module.named_parameters(), *module.named_buffers())
        if id(p) not in owned
    ]
    if rest:
        count = {2: "two", 3: "three"}[len(linears)]
        raise SpecError(
            f"{name} ({type(module).__name__}) is no MLP: besides {count} linear layers it holds "
            f"{', '.join(map(repr, rest[:3]))}. Replace its linear layers alone."
        )


@dataclass(frozen=True, eq=False)
class _Matched:
    """Outputs of the first layer by the activation that they went through."""

    gate: int
    name: str | None
    act: nn.Module | None


def _match(seen: Watch) -> _Matched | None:
    """The activation that takes what the first layers returned to what the last one was given."""
    if seen.middle is None:
        return None
    for index, values in enumerate(seen.returned):
        others = _without(seen.returned, index)
        for part, given, result in seen.modules:
            held = any(True for _ in (*part.parameters(), *part.buffers()))
            if not torch.equal(given, values) or not _close(seen.middle, result, others):
                continue
            name = None if held else match(given, result)
            return _Matched(index, name, None if name else part)
    named = [
        _Matched(index, name, None)
        for index, values in enumerate(seen.returned)
        for name, function in ACTIVATIONS.items()
        if _close(seen.middle, function(values), _without(seen.returned, index))
    ]
    # in 16 bits, several give the same values
    return named[0] if len(named) == 1 else None


def _without(values: list[Tensor], place: int) -> list[Tensor]:
    return [*values[:place], *values[place + 1 :]]


def _close(middle: Tensor, result: Tensor, others: list[Tensor]) -> bool:
    """Whether ``middle`` is a result times the outputs that went through no activation."""
    for other in others:
        if result.shape != other.shape:
            return False
        result = result * other
    if middle.shape != result.shape or not middle.is_floating_point():
        return False
    tolerance = 16 * torch.finfo(middle.dtype).eps
    return torch.allclose(middle.to(result.dtype), result, rtol=tolerance, atol=tolerance)
