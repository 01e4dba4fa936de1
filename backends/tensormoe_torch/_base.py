"""Layers of one mixture: factors by name, and experts of given coefficients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._layers import Costs, LayerMethods, check_constructor
from tensormoe._rounding import checked_bits
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
from tensormoe_torch._hooks import move_hooks
from tensormoe_torch._rounded import RoundedFactor, RoundedFactors
from tensormoe_torch._saving import OF, Stored
from tensormoe_torch._sharded import gathered, held_here, is_sharded, put, stored
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
        weight: Any = getattr(self.factors, self._first, None)
        if isinstance(weight, RoundedFactor):
            return weight.scales
        found: Tensor = next(self.factors.parameters()) if weight is None else weight
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

    @property
    def bits(self) -> int | None:
        """8 or 4 where the factors are rounded to so many bits; None elsewhere."""
        return self.factors.bits if isinstance(self.factors, RoundedFactors) else None

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors as they are stored, scales included."""
        held = (*self.factors.parameters(), *self.factors.buffers())
        return sum(each.numel() * each.element_size() for each in held)

    def quantize(self, bits: int) -> Self:
        """Round the factors to 8 or 4 bits, in place.

        They become buffers of integers with a scale for every 64 entries, and floating-point
        numbers again whenever the layer is called. They do not train, nor can they be edited;
        gradients of inputs and gates stay.

        Args:
            bits: 8 or 4.

        Returns:
            The layer itself.

        Raises:
            SpecError: other bits, or factors that are rounded, computed or cut over devices.
            ShapeError: factors that are not finite.

        >>> import torch
        >>> from tensormoe_torch import MuMoE
        >>> layer = MuMoE(64, 32, experts=8, rank=16, bias=False)
        >>> before = layer.factor_bytes
        >>> layer.quantize(8).factor_bytes / before
        0.265625
        """
        bits = _given_bits(bits)
        if self.bits is not None:
            raise SpecError(
                f"factors must be floating-point to be rounded; got some of {self.bits} bits. Call "
                "dequantize() first."
            )
        held = stored(self.factors, self.spec.shapes)
        weight = self._weight
        if self._part is not None or any(is_sharded(each) for each in held.values()):
            raise SpecError(
                "factors must be whole on every device to be rounded; got some that are cut or "
                "sharded. Round them before."
            )
        new = RoundedFactors(self.config, bits, weight.device, weight.dtype)
        if weight.device.type != "meta":
            for name, parameter in held.items():
                new.factor(name).put(parameter.detach())
        self._exchange_factors(new)
        return self

    def dequantize(self) -> Self:
        """Turn rounded factors into parameters of their values, in place.

        Returns:
            The layer itself; as it was where its factors are not rounded.
        """
        if self.bits is not None:
            values = {name: nn.Parameter(each) for name, each in self.factors.items()}
            self._exchange_factors(Factors(self.config, values))
        return self

    def _exchange_factors(self, new: Factors) -> None:
        new.train(self.factors.training)
        move_hooks(self.factors, new)
        self.factors = new

    def __repr__(self) -> str:
        rounded = "" if self.bits is None else f".quantize({self.bits})"
        return f"{super().__repr__()}{rounded}"

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


def _given_bits(bits: int) -> int:
    """8 or 4.

    Raises:
        SpecError: neither.
    """
    found = checked_bits(bits)
    if found is None:
        raise SpecError(f"bits must be 8 or 4 to round to; got {bits!r}.")
    return found
