"""Experts that gate in a way of their own: a function of gate and up projection together."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch._activations import halves
from tensormoe_torch.compression._experts import Activation

_NAMES = ("act_fn", "act", "activation", "activation_fn")


def has_own_gate(module: nn.Module) -> bool:
    """Whether stacked experts of transformers gate otherwise than by ``act(gate) · up``.

    Such are those of GPT-OSS, whose gate and up projection take turns and are clamped.
    """
    # what transformers adds to all other experts has another name
    apply = getattr(type(module), "_apply_gate", None)
    return apply is not None and apply.__name__ == "_apply_gate"


def own_activation(module: nn.Module) -> Activation | None:
    """The activation of a module, by the names that models use."""
    found = (getattr(module, name, None) for name in _NAMES)
    return next((each for each in found if callable(each)), None)


class Own(nn.Module):
    """Activation of transformers' experts, between projections: (..., 2 · hidden) → (..., hidden).

    Args:
        experts: as transformers makes them; their weights are not kept.

    Raises:
        SpecError: they do not say how they are gated, and have no activation.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        if not hasattr(experts, "_apply_gate") and own_activation(experts) is None:
            raise SpecError(
                f"experts whose gate and up projection are one must say how they are gated; "
                f"{type(experts).__name__} does not."
            )
        bare = copy.copy(experts)
        bare._parameters = dict.fromkeys(experts._parameters)
        # not a submodule: it would be given initial values
        self._experts = (bare,)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to the gates, and multiply."""
        experts: Any = self._experts[0]
        if hasattr(experts, "_apply_gate"):
            found: Tensor = experts._apply_gate(x)
            return found
        act: Any = own_activation(experts)
        gate, up = halves(x)
        return act(gate) * up

    def extra_repr(self) -> str:
        """Class of the experts whose gate it is."""
        return type(self._experts[0]).__name__
