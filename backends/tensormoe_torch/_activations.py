"""Elementwise functions between the two layers of a block, by name or as users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe._validation import brief, choice
from tensormoe.errors import SpecError
from tensormoe_torch._hooks import has_hooks

Act: TypeAlias = "str | type[nn.Module] | Callable[[Tensor], Tensor]"
"""A name, a class of modules, or a module or function itself."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
)
"""Function by name; ``gelu`` is the exact one, ``gelu_tanh`` GPT-2's."""


def halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of the last axis; their gradients are joined, where those of slices are added."""
    first, second = both.chunk(2, dim=-1)
    return first, second


def probe(count: int, device: torch.device) -> Tensor:
    """At least 64 values where activations differ, float32, (1, rows, ``count``)."""
    rows = max(4, -(-64 // count))
    # far out as well: those that are cut off differ only there
    far = torch.tensor([-512.0, -64.0, -16.0, -7.0, 7.0, 16.0, 64.0, 512.0], device=device)
    near = torch.linspace(-4.0, 4.0, rows * count - len(far), device=device)
    return torch.cat([near, far]).reshape(1, rows, count)


def match(values: Tensor, results: Tensor) -> str | None:
    """The name of the activation that takes ``values`` to ``results``.

    Libraries write one function in many ways (GPT-2's GELU has half a dozen classes); what they
    compute tells them apart: the two GELUs differ by 5e-4, rounding by less than 1e-6.
    """
    if results.shape != values.shape or not results.is_floating_point():
        return None
    tolerance = 16 * torch.finfo(results.dtype).eps
    for known, function in ACTIVATIONS.items():
        wanted = function(values)
        if torch.allclose(results.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance):
            return known
    return None


def read_activation(act: Any, name: str = "act_layer") -> tuple[str | None, Act | None]:
    """Read an activation given by a user: return a known name, or the activation itself.

    A module with parameters, buffers or hooks stays itself, whatever it computes now.

    Args:
        act: a name, a module, its class, or a function.
        name: of the argument, for messages.

    Raises:
        SpecError: none of these, or a class that needs arguments.
    """
    if isinstance(act, str):
        return choice(act, ACTIVATIONS, name, SpecError), None
    known = ", ".join(map(repr, ACTIVATIONS))
    if not callable(act) or (isinstance(act, type) and not issubclass(act, nn.Module)):
        raise SpecError(
            f"{name} must be one of {known}, or a module, a class of modules or a function of "
            f"tensors; got {brief(act)}."
        )
    function = _made(act, name) if isinstance(act, type) else act
    if isinstance(function, nn.Module) and (
        any(True for _ in function.parameters())
        or any(True for _ in function.buffers())
        or any(has_hooks(each) for each in function.modules())
    ):
        return None, act
    values = probe(1, torch.device("cpu"))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            results = function(values.clone())
    except TypeError as error:
        raise SpecError(f"{name} must be called with one tensor; {brief(act)}: {error}.") from error
    except Exception:
        # one that is made for other shapes or devices
        return None, act
    if not isinstance(results, Tensor):
        kind = type(results).__name__
        raise SpecError(f"{name} must give a tensor; {brief(act)} gave {kind}.")
    found = match(values, results)
    return (None, act) if found is None else (found, None)


def own_activation(
    name: str | None, act: Act | None, device: torch.device | str | None, dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """Return the activation that a block must hold: None if its configuration names one.

    Raises:
        SpecError: both or neither.
    """
    if (name is None) == (act is None):
        raise SpecError(
            "a block has one activation, by name in its configuration or given as act=…; got "
            f"{name!r} and {brief(act)}."
        )
    if isinstance(act, type):
        return _made(act, "act_layer").to(device=device, dtype=dtype)
    if act is None or not isinstance(act, str):
        return act
    raise SpecError(f"act must be a module or a function; got {brief(act)}.")


def _made(kind: type[nn.Module], name: str) -> nn.Module:
    try:
        return kind()
    except TypeError as error:
        raise SpecError(
            f"{name} must be a class that needs no arguments, or an instance; {kind.__name__}: "
            f"{error}."
        ) from error
