"""Modules of mixtures: made of a configuration, saved, and loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from tensormoe._layers import Costs, MixtureMethods, check_constructor
from tensormoe.mixtures import ExpertsConfig, MixtureConfig, OwnArray, draw_own, gated
from tensormoe_torch._activations import ACTIVATIONS, halves
from tensormoe_torch._adapter import BACKEND, library
from tensormoe_torch._checks import check_input
from tensormoe_torch._dtypes import checked_device, checked_dtype
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._saving import OF, Stored
from tensormoe_torch._sharded import put, stored
from tensormoe_torch.compression._experts import FactorizedExperts

M = TypeVar("M", bound=MixtureConfig)


class MixtureModule(Stored[M], MixtureMethods[Tensor, M]):
    """Modules of mixtures; the path of a parameter is its canonical name."""

    @classmethod
    def of(
        cls,
        config: M,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A mixture of a configuration: what the constructor makes of its arguments.

        Raises:
            TypeError: a class derived from the library's has a constructor of its own, and does
                not override this.
        """
        check_constructor(cls, OF)
        module = cls.__new__(cls)
        module._build(config, init, device, dtype)
        return module

    def _build(
        self,
        config: M,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        # no compiler has to follow the planner
        config.plan_ahead()
        self.config = config
        self._fill(init, checked_device(device), checked_dtype(dtype))

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        """Make the parts, under the names that the configuration gives them."""
        raise NotImplementedError

    @property
    def _weight(self) -> Tensor:
        """One of the factors: it has the mixture's dtype and device."""
        for module in self.modules():
            if isinstance(module, MuMoE):
                return module._weight
        return next(self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors; inputs must have it, unless autocast is on."""
        return self._weight.dtype

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        for module in self.children():
            reset_all(module)

    def _rows(self, x: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """The leading shape of a checked input, and the input as the formula takes it."""
        batch_shape = check_input(x, self.config.in_features, self._weight)
        return batch_shape, x.reshape(self.config.merged_shape(batch_shape))

    def _costs(self) -> Costs:
        return {"itemsize": self.dtype.itemsize, "library": library(self.dtype)}


def reset_all(module: nn.Module) -> None:
    """Reset a module, or else the modules in it."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for child in module.children():
        reset_all(child)


def make_experts(
    experts: ExpertsConfig, init: str, device: Any, dtype: torch.dtype
) -> FactorizedExperts:
    """Experts as a module that is called with tokens, indices and weights."""
    layers = {role: MuMoE.of(layer, init, device, dtype) for role, layer in experts.layers.items()}
    made = FactorizedExperts(layers, activation_of(experts))
    # as their costs count
    made.shares_work = False
    return made


def activation_of(experts: ExpertsConfig) -> Callable[[Tensor], Tensor]:
    """The activation of experts, of both halves where they are gated."""
    if experts.act_layer is None:
        return nn.Identity()
    act = ACTIVATIONS[experts.act_layer]
    return gated(act, halves) if experts.kind == "swiglu" else act


def reset_own(module: nn.Module, own: dict[str, OwnArray]) -> None:
    """Draw a module's own parameters anew.

    Args:
        module: holds them.
        own: their initial values, by their names in the module.
    """
    for name, parameter in stored(module, own).items():
        options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        drawn = draw_own(
            own[name],
            torch.zeros(parameter.shape, **options),
            BACKEND,
            partial(_normal, options),
            partial(_uniform, options),
        )
        put(parameter, drawn)


def _normal(options: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, **options)


def _uniform(options: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, **options).uniform_(-1.0, 1.0)
