"""Activations of other code, recognized by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch._mlp import ACTIVATIONS

__all__ = ["grid", "match_activation", "named_activation"]


def grid(count: int, device: torch.device) -> Tensor:
    """At least 64 values across where activations differ, float32, a multiple of ``count``."""
    rows = max(4, -(-64 // count))
    return torch.linspace(-4.0, 4.0, rows * count, device=device).reshape(1, rows, count)


def match_activation(values: Tensor, results: Tensor, name: str) -> str:
    """The name of the activation that takes ``values`` to ``results``.

    Libraries write one function in many ways (GPT-2's GELU has half a dozen classes); what they
    compute tells them apart: the two GELUs differ by 5e-4, rounding by less than 1e-6.

    Raises:
        SpecError: none does.
    """
    if results.shape == values.shape and results.is_floating_point():
        tolerance = 16 * torch.finfo(results.dtype).eps
        for known, function in ACTIVATIONS.items():
            wanted = function(values)
            if torch.allclose(results.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance):
                return known
    quoted = ", ".join(repr(known) for known in ACTIVATIONS)
    raise SpecError(
        f"the activation of {name} must be one of {quoted}; it computes something else. Give "
        "the parts as (fc1, act, fc2) with one of these names, or replace its linear layers alone."
    )


def named_activation(act: Any) -> str:
    """The name of an activation given as a name, a module, its class, or a function.

    Raises:
        SpecError: none of these, or another function than the known ones.
    """
    if isinstance(act, str):
        if act in ACTIVATIONS:
            return act
        quoted = ", ".join(repr(known) for known in ACTIVATIONS)
        raise SpecError(f"act must be one of {quoted}; got {act!r}.")
    function: Callable[[Tensor], Tensor] = act
    if isinstance(act, type) and issubclass(act, nn.Module):
        function = act()
    if not callable(function) or (isinstance(act, type) and not issubclass(act, nn.Module)):
        raise SpecError(
            f"act must be an activation: a name, a module or a function; got {act!r}. Give "
            "(fc1, act, fc2) in this order."
        )
    values = grid(1, torch.device("cpu"))
    try:
        with torch.no_grad():
            results = function(values.clone())
    except Exception as error:
        raise SpecError(f"act must be an activation; calling {act!r} failed: {error}") from error
    if not isinstance(results, Tensor):
        raise SpecError(f"act must give a tensor; {act!r} gave {type(results).__name__}.")
    return match_activation(values, results, "the block")
