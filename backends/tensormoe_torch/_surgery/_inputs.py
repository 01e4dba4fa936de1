"""How many inputs each layer of a model gets, from a run of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError

__all__ = ["count_inputs"]


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
    modes = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_pre_hook(_counter(counts, name, widths[name]), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    for name, count in counts.items():
        if count == 0:
            raise SpecError(
                f"the example must give every selected module inputs; {name!r} got none. Give "
                "another example, or batch=…"
            )
    return counts


def _run(model: nn.Module, example: Any) -> None:
    if isinstance(example, Tensor):
        model(example)
    elif isinstance(example, tuple):
        model(*example)
    elif isinstance(example, Mapping):
        model(**example)
    else:
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
