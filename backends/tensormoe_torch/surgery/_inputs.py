"""Number of inputs of each layer of a model, from a run of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError


def count_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
) -> dict[str, int]:
    """Inputs by module of one run of the model, all leading axes and all calls together.

    Args:
        model: it runs in evaluation mode and is in its own afterwards.
        modules: those to watch, by name.
        widths: the size of an input of each.
        example: the input, or the arguments, positional or by name.

    Raises:
        SpecError: no example, or one that does not reach a module.
    """
    counts = dict.fromkeys(modules, 0)
    handles = [
        module.register_forward_pre_hook(_counter(counts, name, widths[name]), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with evaluating(model):
            run_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for name, count in counts.items():
        if count == 0:
            raise SpecError(
                f"the example must give every selected module inputs; {name!r} got none. Give "
                "another example, or batch=…"
            )
    return counts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; modes and buffers are restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, dict(module._buffers), {k: _copied(each) for k, each in module._buffers.items()})
        for module in model.modules()
    ]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, held, values in buffers:
            module._buffers.clear()
            module._buffers.update(held)
            for name, value in values.items():
                _put_back(held[name], value)


def _copied(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or buffer.is_meta else buffer.detach().clone()


@torch.no_grad()
def _put_back(buffer: Tensor | None, value: Tensor | None) -> None:
    if buffer is not None and value is not None and not torch.equal(buffer, value):
        buffer.copy_(value)


def run_model(model: nn.Module, example: Any) -> Any:
    """Output of a model for an input, a tuple of arguments, or a mapping of them.

    Raises:
        SpecError: none of these.
    """
    if isinstance(example, Tensor):
        return model(example)
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping):
        return model(**example)
    raise SpecError(
        "example must be a tensor, a tuple of arguments or a mapping of them by name; got "
        f"{type(example).__name__}. For a number of inputs, give batch=…"
    )


def _counter(counts: dict[str, int], name: str, width: int) -> Callable[..., None]:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        first = next(found, None)
        counts[name] += 0 if first is None else first.numel() // width

    return count
