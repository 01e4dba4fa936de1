"""MLP blocks of other code, recognized by running them once and watching.

Names of submodules say little: a module with ``fc1`` and ``fc2`` may do anything in between. So
the block runs on a few inputs, its first linear layer is made to return known values, and what
reaches the second one, and leaves it, says whether the block is ``fc2(act(fc1(x)))`` and which
``act`` it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch._hooks import without_hooks
from tensormoe_torch._surgery._activation import grid, match_activation, named_activation
from tensormoe_torch._surgery._linears import Linear, is_linear, read_linear

__all__ = ["Block", "read_block"]


@dataclass(frozen=True, eq=False)
class Block:
    """``fc2(act(fc1(x)))``, with dropout behind ``act`` and behind ``fc2``.

    Args:
        first: fc1.
        second: fc2.
        activation: name of the activation.
        drops: rates behind the activation and behind the second layer.
    """

    first: Linear
    second: Linear
    activation: str
    drops: tuple[float, ...] = (0.0, 0.0)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In, hidden, out."""
        return (*self.first.sizes, self.second.sizes[1])

    @property
    def num_parameters(self) -> int:
        """Stored entries."""
        return self.first.num_parameters + self.second.num_parameters


def read_block(block: Any, name: str, values: bool = True) -> Block:
    """The parts of an MLP block.

    Args:
        block: a module that holds two linear layers, an activation and dropout, whatever their
            names; or the tuple (fc1, act, fc2).
        name: for messages.
        values: whether finite values are needed, not only sizes.

    Raises:
        SpecError: no such block.
    """
    if isinstance(block, tuple):
        if len(block) != 3:
            raise SpecError(
                f"{name} must have three parts, (fc1, act, fc2); got {len(block)}: {block!r}."
            )
        first, second = (
            read_linear(block[place], f"fc{1 + place // 2} of {name}", values) for place in (0, 2)
        )
        found = Block(first, second, named_activation(block[1]))
    elif isinstance(block, nn.Module):
        found = _read_module(block, name, values)
    else:
        raise SpecError(
            f"{name} must be a module with two linear layers, or the tuple (fc1, act, fc2); got "
            f"{block!r}."
        )
    _check_fit(found, name)
    return found


def _check_fit(block: Block, name: str) -> None:
    first, second = block.first.weight, block.second.weight
    if first.shape[1] != second.shape[0]:
        raise SpecError(
            f"the layers of {name} must fit: fc1 gives {first.shape[1]} features, fc2 takes "
            f"{second.shape[0]}. Give them in the order in which they run."
        )
    if (first.dtype, first.device) != (second.dtype, second.device):
        raise SpecError(
            f"the layers of {name} must have one dtype and device; got {first.dtype} on "
            f"{first.device} and {second.dtype} on {second.device}. Move one with .to(…)."
        )


def _read_module(module: nn.Module, name: str, values: bool) -> Block:
    linears = [each for each in module.modules() if is_linear(each)]
    if len(linears) != 2:
        raise SpecError(
            f"{name} ({type(module).__name__}) is no linear layer and no MLP: an MLP has two "
            f"linear layers, and this has {len(linears)}."
        )
    owned = {id(p) for linear in linears for p in (*linear.parameters(), *linear.buffers())}
    rest = [
        key
        for key, p in (*module.named_parameters(), *module.named_buffers())
        if id(p) not in owned
    ]
    if rest:
        raise SpecError(
            f"{name} ({type(module).__name__}) is no MLP: besides two linear layers it holds "
            f"{', '.join(map(repr, rest[:3]))}. Replace its linear layers alone."
        )
    first, second = (
        read_linear(each, f"layer {k} of {name}", values) for k, each in enumerate(linears)
    )
    if first.weight.device.type == "meta":
        raise SpecError(
            f"{name} can't be tried out as an MLP on the meta device. Load its weights first."
        )
    watch = _watch(module, linears, first)
    if watch.calls[:1] == ["second"]:
        linears, first, second = linears[::-1], second, first
        watch = _watch(module, linears, first)
    if not watch.plain:
        raise SpecError(
            f"{name} ({type(module).__name__}) is no MLP: it does more than fc2(act(fc1(x)))"
            f"{watch.trouble}. Replace its linear layers alone, or give the parts as "
            "(fc1, act, fc2)."
        )
    return Block(first, second, match_activation(*watch.middle, name), tuple(watch.rates))


@dataclass(eq=False)
class _Watch:
    """What was seen while a block ran."""

    calls: list[str] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    middle: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0),) * 2)
    rates: list[float] = field(default_factory=lambda: [0.0, 0.0])
    plain: bool = False
    trouble: str = ""


def _watch(module: nn.Module, linears: list[nn.Module], first: Linear) -> _Watch:
    """Run the block and see whether nothing but an activation happens between two linear layers."""
    weight, (rows, hidden) = first.weight, first.sizes
    values = grid(hidden, weight.device)
    count = values.shape[1]
    x = torch.linspace(-1.0, 1.0, count * rows, device=weight.device).sin()
    x = x.reshape(1, count, rows).to(weight.dtype)
    watch = _Watch()

    def enter_first(_: nn.Module, args: tuple[Any, ...]) -> None:
        watch.calls.append("first")
        watch.seen.extend(arg for arg in args if isinstance(arg, Tensor))

    def leave_first(*_: Any) -> Tensor:
        # a copy: the activation may work in place
        return values.clone()

    def enter_second(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        watch.calls.append("second")
        watch.middle = (values, args[0].clone())
        return (args[0].to(weight.dtype), *args[1:])

    def leave_second(_: nn.Module, args: Any, output: Tensor) -> None:
        watch.left.append(output)

    def drop(layer: nn.Module, *_: Any) -> None:
        rate, passed = float(getattr(layer, "p", 0.0)), len(watch.calls)
        if rate and passed in (1, 2):
            before = watch.rates[passed - 1]
            watch.rates[passed - 1] = 1.0 - (1.0 - before) * (1.0 - rate) if before else rate
        elif rate:
            watch.calls.append("dropout")

    with without_hooks(module), _alone(module) as drops:
        handles = [
            linears[0].register_forward_pre_hook(enter_first),
            linears[0].register_forward_hook(leave_first),
            linears[1].register_forward_pre_hook(enter_second),
            linears[1].register_forward_hook(leave_second),
            *(each.register_forward_hook(drop) for each in drops),
        ]
        result: Any = None
        try:
            with torch.no_grad():
                result = module(x)
        except Exception as error:
            # any code may run here, and may want other arguments
            watch.trouble = f", or takes more than one input ({error})"
        finally:
            for handle in handles:
                handle.remove()
    watch.plain = (
        watch.calls == ["first", "second"]
        and len(watch.seen) == 1
        and torch.equal(watch.seen[0], x)
        and len(watch.left) == 1
        and isinstance(result, Tensor)
        and torch.equal(result, watch.left[0])
    )
    return watch


@contextmanager
def _alone(module: nn.Module) -> Iterator[Sequence[nn.Module]]:
    """The block in training mode but for its dropout modules, which are given.

    What drops entries without a module of its own would show in training mode alone.
    """
    modes = [(each, each.training) for each in module.modules()]
    drops = [each for each, _ in modes if isinstance(each, nn.modules.dropout._DropoutNd)]
    try:
        for each, _ in modes:
            each.training = each not in drops
        yield drops
    finally:
        for each, mode in modes:
            each.training = mode
