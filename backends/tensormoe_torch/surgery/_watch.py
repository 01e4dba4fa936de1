"""Run a block of linear layers on generated values, and record the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tensormoe_torch._activations import probe
from tensormoe_torch._hooks import without_hooks
from tensormoe_torch.surgery._linears import Linear, is_linear


@dataclass(eq=False)
class Watch:
    """Arrays and modules recorded while a block ran.

    Args:
        returned: what the first linear layers were made to return; the halves of one array if one
            layer makes both the gate and what it gates.
        middle: what the last linear layer was given.
        modules: modules between that take and give one tensor, each with both.
        rates: of dropout, behind the first layers and behind the last.
        plain: whether inputs go to the first layers, and the last one's output is the block's.
        trouble: what went wrong.
    """

    returned: list[Tensor] = field(default_factory=list)
    middle: Tensor | None = None
    modules: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=lambda: [0.0, 0.0])
    plain: bool = False
    trouble: str = ""


def call_order(
    module: nn.Module, linears: Sequence[nn.Module], widths: Sequence[int]
) -> list[nn.Module]:
    """Linear layers in the order in which a block first calls them.

    Args:
        module: the block; it runs, without its hooks, and may fail.
        linears: those in it.
        widths: the size of an input of each.
    """
    calls: list[nn.Module] = []
    handles = []
    like = next(linears[0].parameters())
    try:
        with without_hooks(module), _alone(module), torch.no_grad():
            handles = [
                each.register_forward_pre_hook(lambda part, _: calls.append(part))
                for each in linears
            ]
            for _ in range(2):
                # the block's own input has the width of the layer that it is given to
                first = calls[0] if calls else linears[0]
                calls.clear()
                width = next(
                    size for each, size in zip(linears, widths, strict=True) if each is first
                )
                try:
                    module(torch.ones(1, 4, width, device=like.device, dtype=like.dtype))
                except Exception:
                    # any code may run here; errors appear again in the recorded run
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return list({id(each): each for each in (*calls, *linears)}.values())


def watch(module: nn.Module, linears: Sequence[nn.Module], sizes: Sequence[Linear]) -> Watch:
    """Run a block and check that there is only an activation between its linear layers.

    Args:
        module: the block; it runs without its hooks.
        linears: in the order in which they run.
        sizes: the same, as values.
    """
    like, rows, hidden = sizes[0].weight, sizes[0].sizes[0], sizes[-1].sizes[0]
    fused = len(linears) == 2 and sizes[0].sizes[1] == 2 * hidden
    values = probe(hidden, like.device)
    # not what the activation is given; near 1, so that rounding stays what it is
    others = torch.linspace(0.5, 1.5, values.numel(), device=like.device).reshape(values.shape)
    returned = [values, others][: max(len(linears) - 1, 1 + fused)]
    count = values.shape[1]
    x = torch.linspace(-1.0, 1.0, count * rows, device=like.device).sin()
    x = x.reshape(1, count, rows).to(like.dtype)
    run = _Run(linears, like.dtype, Watch(returned))
    with without_hooks(module), _alone(module) as drops:
        handles = run.hooks(module, drops)
        result: Any = None
        try:
            with torch.no_grad():
                result = module(x)
        except Exception as error:
            # any code may run here, and may want other arguments
            run.seen.trouble = f", or takes more than one input ({error})"
        finally:
            for handle in handles:
                handle.remove()
    run.seen.plain = run.is_plain(x, result)
    return run.seen


@dataclass(eq=False)
class _Run:
    """One run of a block, recorded by hooks that give known tensors for what layers return."""

    linears: Sequence[nn.Module]
    dtype: torch.dtype
    seen: Watch
    calls: list[nn.Module] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> Sequence[nn.Module]:
        """The linear layers before the activation."""
        return self.linears[:-1]

    def hooks(self, module: nn.Module, drops: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Record linear layers, dropout, and what is between."""
        handles = [each.register_forward_pre_hook(self.enter) for each in self.linears]
        handles += [each.register_forward_hook(self.leave) for each in self.linears]
        handles += [each.register_forward_hook(self.drop) for each in drops]
        for each in module.modules():
            if not any(part in drops or is_linear(part) for part in each.modules()):
                handles.append(each.register_forward_pre_hook(self.enter_between))
                handles.append(each.register_forward_hook(self.leave_between))
        return handles

    def is_plain(self, x: Tensor, result: object) -> bool:
        """Whether each layer ran once, in order, on nothing but the input and the activation."""
        calls, linears = self.calls, self.linears
        return (
            len(calls) == len(linears)
            and all(one is other for one, other in zip(calls, linears, strict=True))
            and len(self.inputs) == len(self.heads)
            and all(torch.equal(each, x) for each in self.inputs)
            and len(self.left) == 1
            and isinstance(result, Tensor)
            and torch.equal(result, self.left[0])
        )

    def enter(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.calls.append(part)
        if part is not self.linears[-1]:
            self.inputs.extend(arg for arg in args if isinstance(arg, Tensor))
            return None
        self.seen.middle = args[0].clone()
        return (args[0].to(self.dtype), *args[1:])

    def leave(self, part: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if part is self.linears[-1]:
            self.left.append(output)
            return None
        returned = self.seen.returned
        if len(returned) > len(self.heads):
            return torch.cat(returned, dim=-1)
        # a copy: the activation may work in place
        return returned[next(k for k, each in enumerate(self.heads) if each is part)].clone()

    def drop(self, part: nn.Module, *_: Any) -> None:
        rate = float(getattr(part, "p", 0.0))
        behind = len(self.calls) - len(self.heads)
        if rate and behind in (0, 1):
            before = self.seen.rates[behind]
            self.seen.rates[behind] = 1.0 - (1.0 - before) * (1.0 - rate) if before else rate
        elif rate:
            self.calls.append(part)

    def enter_between(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            self.given[id(part)] = args[0].clone()

    def leave_between(self, part: nn.Module, args: Any, output: Any) -> None:
        known = id(part) in self.given and isinstance(output, Tensor)
        if known and self.linears[-1] not in self.calls:
            self.seen.modules.append((part, self.given.pop(id(part)), output.clone()))


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
