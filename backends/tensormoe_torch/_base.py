"""Layers of one mixture: factors by name, and experts of given coefficients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._layers import Costs, LayerMethods, check_constructor
from tensormoe.errors import SpecError
from tensormoe.factorizations import OUTPUT
from tensormoe.functional import EachExpert, LayerConfig
from tensormoe.gates import TopK
from tensormoe.mixtures import send
from tensormoe_torch._adapter import BACKEND, library
from tensormoe_torch._autograd import is_autocast
from tensormoe_torch._checks import Given, merged
from tensormoe_torch._dtypes import checked_device, checked_dtype
from tensormoe_torch._factors import Factors, with_lead
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._saving import OF, Stored
from tensormoe_torch._sharded import gathered, held_here, put, stored
from tensormoe_torch._tracing import is_traced

if TYPE_CHECKING:
    from tensormoe_torch._parts import Part


class Mixture(Stored[LayerConfig], LayerMethods[Tensor]):
    """Layers of one mixture; parameters are ``factors.<name>`` and ``gate.<name>``."""

    factors: Factors
    gate: ExpertGate | None

    def __init__(
        self,
        config: LayerConfig,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dtype, device = checked_dtype(dtype), checked_device(device)
        config.spec.initializers(init)  # an unknown scheme fails before anything is allocated
        self.config = config
        # no compiler has to follow the planner
        config.plan_ahead()
        self.init = init
        self.factors = Factors(
            config,
            {
                name: nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                for name, shape in config.spec.shapes.items()
            },
        )
        self._first = next(iter(config.spec.shapes))
        self.gate = None if config.gate is None else ExpertGate(config, device, dtype)
        self._reset_factors()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; inputs must have it, unless autocast is on."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """One of the factors: it has the layer's dtype and device."""
        # an adapter around the factors has what it adapts first
        weight: Tensor | None = getattr(self.factors, self._first, None)
        found = next(self.factors.parameters()) if weight is None else weight
        # a layer that is cut over devices takes plain inputs
        return found if self._part is None else held_here(found)

    @property
    def _part(self) -> Part | None:
        """This device's part of a layer that is cut over several."""
        part: Part | None = getattr(self.factors, "part", None)
        return part

    @property
    def _makes_slices(self) -> bool:
        """Whether outputs of a cut layer's parts are slices, and not terms of a sum."""
        return self._part is not None and self._part.leg == OUTPUT

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        self._reset_factors()
        if self.gate is not None:
            self.gate.reset_parameters()

    @torch.no_grad()
    def _reset_factors(self) -> None:
        parameters = stored(self.factors, self.spec.shapes)
        like = self._weight
        options: Any = {"device": like.device, "dtype": like.dtype}
        drawn = functional.initialize(
            replace(self.config, gate=None),
            BACKEND,
            normal=lambda shape: torch.randn(shape, **options),
            uniform=lambda shape: torch.empty(shape, **options).uniform_(-1.0, 1.0),
            zeros=lambda shape: torch.zeros(shape, **options),
            init=self.init,
        )
        for name, parameter in parameters.items():
            put(parameter, drawn[f"factors.{name}"])

    @classmethod
    def of(
        cls,
        config: LayerConfig,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer of a configuration: what a constructor makes of its arguments.

        Raises:
            TypeError: a class derived from the library's has a constructor of its own, and does
                not override this.
        """
        check_constructor(cls, OF)
        layer = cls.__new__(cls)
        Mixture.__init__(layer, config, init, device, dtype)
        return layer

    def _weights(self) -> dict[str, Tensor]:
        """All entries of the factors in this process, which may hold a part of them."""
        if not isinstance(self.factors, Factors):
            raise SpecError(
                "factors must be the layer's own to be read by expert; got a "
                f"{type(self.factors).__qualname__} around them. Take the adapter off first."
            )
        shapes = self.config.parameter_shapes()
        return {
            name: gathered(array, shapes[name]) for name, array in self.factors.by_name().items()
        }

    def _costs(self) -> Costs:
        return {"itemsize": self.dtype.itemsize, "library": library(self.dtype)}

    def _mix(
        self, x: Tensor, coefficients: Given | None, lead: tuple[int, ...], weight: Tensor
    ) -> Tensor:
        """The experts, mixed by the gate's coefficients or by given ones."""
        part = self._part
        config = self.config if part is None else part.called(self.config, coefficients)
        if isinstance(coefficients, EachExpert):
            made: Tensor = self.factors(x, coefficients)
            return made
        if coefficients is None:
            given = functional.own_gate(self.gate, self.config)(x)
        else:
            given = merged(config, coefficients, lead, weight)
            first = given[0]
            if len(given) == 1 and isinstance(first, TopK) and self._sends(x, first):
                return self._sent(x, first, lead)
            if len(lead) != 1:
                given = [with_lead(each, lead) for each in given]
        result: Tensor = self.factors(x, *given)
        return result

    def _sends(self, x: Tensor, chosen: TopK) -> bool:
        """Whether tokens are sent to their experts: where one product per expert is the fastest."""
        # as many rows would be summed over the devices as are sent
        if self._part is not None:
            return False
        # compilers do not know k, and autocast chooses the dtype of a sum
        if self.config.indexed_input or is_traced(x) or is_autocast(x.device.type):
            return False
        return self.config.sorts(chosen.indices.numel())

    def _sent(self, x: Tensor, chosen: TopK, lead: tuple[int, ...]) -> Tensor:
        spec = self.config.spec
        made = send(
            self.factors,
            x.reshape(-1, spec.in_features),
            chosen.indices,
            chosen.values,
            spec.num_experts,
            BACKEND,
            sort=True,
        )
        return made.reshape(*lead, spec.out_features)
