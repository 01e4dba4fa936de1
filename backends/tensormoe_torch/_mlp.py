"""The two-layer block: experts, activation, experts, with one gate for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._layers import BlockMethods, Costs, check_constructor
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import BlockConfig
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_torch._activations import ACTIVATIONS, Act, halves, own_activation, read_activation
from tensormoe_torch._adapter import library
from tensormoe_torch._checks import Given
from tensormoe_torch._dtypes import checked_dtype
from tensormoe_torch._gate import ExpertGate, Gated
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._saving import OF, Stored

if TYPE_CHECKING:
    from tensormoe_torch._parts import Boundary


class MuMoEMLP(Stored[BlockConfig], BlockMethods[Tensor], Gated[BlockConfig]):
    """A μMoE block in place of an MLP (Oldfield et al. 2024, section 3): two mixtures, one gate.

    The coefficients are computed once, from the block's input, and mix the experts of both layers.
    Argument names are those that vision codebases give their MLPs.

    Args:
        in_features: size of an input.
        hidden_features: size between the layers; ``in_features`` by default.
        out_features: size of an output; ``in_features`` by default.
        act_layer: the activation between: "gelu", "gelu_tanh", "relu", "silu" or "tanh"; or any
            module, class of modules, or function of tensors. One that is none of these five by
            name (``nn.GELU()``, ``F.silu``) is kept as ``act``, with its parameters; ``save``
            refuses it, ``state_dict()`` does not.
        bias: whether every expert has a bias.
        drop: share of entries dropped, in training, behind the activation and the second layer.
        gated: whether the block is a gated linear unit (SwiGLU with ``act_layer="silu"``; Shazeer
            2020): ``second(act(g) * u)``, where ``g`` and ``u`` are the first and the second half
            of the ``2 * hidden_features`` outputs of the first layer.
        experts: N, or one size per level of hierarchy.
        factorization: a value or a name for both layers, or a pair of them.
        rank: bond sizes of both layers, with a name.
        budget: upper limits for the block instead, both layers and the gate together;
            ``"linear"`` stands for the parameters of the linear layers that it replaces, and
            ``Budget(…, gate=False)`` leaves the gate out. Layers share a budget as the linear ones
            would. Without rank or budget the factors of each layer get the parameters of its
            linear layer, and the gate comes on top.
        gate: how inputs become coefficients, or None for a block that is always given them.
        init: ``"variance"`` or ``"paper"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        first: the layer before the activation, a :class:`MuMoE` without a gate.
        second: the one behind.
        gate: the :class:`ExpertGate` of both, or None.
        act: the activation, if it has no name; None otherwise.
        config: specs, gate and options as frozen values.
        boundary: of the block, where its hidden features are cut over devices.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import torch
    >>> block = MuMoEMLP(32, 64, experts=16, factorization="tensor_ring", rank=(2, 2, 8))
    >>> block(torch.ones(5, 32)).shape
    torch.Size([5, 32])
    """

    _kind = "MuMoEMLP"

    act: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Act = "gelu",
        bias: bool = True,
        drop: float = 0.0,
        *,
        gated: bool = False,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "cp",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name, act = read_activation(act_layer)
        options = functional.Options(experts, factorization, rank, budget, bias, gate)
        config = options.block(in_features, hidden_features, out_features, name, drop, gated=gated)
        self._build(config, init, device, dtype, act)

    def _build(
        self,
        config: BlockConfig,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        act: Act | None,
    ) -> None:
        super().__init__()
        dtype = checked_dtype(dtype)
        self.config = config
        self.boundary: Boundary | None = None
        self.act = own_activation(config.act_layer, act, device, dtype)
        self.first = MuMoE.of(replace(config.first, gate=None), init, device, dtype)
        self.second = MuMoE.of(config.second, init, device, dtype)
        has_gate = config.first.gate is not None
        self.gate = ExpertGate(config.first, device, dtype) if has_gate else None

    @classmethod
    def of(
        cls,
        config: BlockConfig,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        act: Act | None = None,
    ) -> Self:
        """A block of a configuration: what the constructor makes of its arguments.

        Raises:
            SpecError: an activation though the configuration names one, or none at all.
            TypeError: as :meth:`MuMoE.of`.
        """
        check_constructor(cls, OF)
        block = cls.__new__(cls)
        block._build(config, init, device, dtype, act)
        return block

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; inputs must have it, unless autocast is on."""
        return self.first.dtype

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        act = self.act.parameters() if isinstance(self.act, nn.Module) else ()
        return super().num_parameters + sum(each.numel() for each in act)

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        for part in (self.first, self.second, self.gate, self.act):
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(self, x: Tensor, coefficients: Given | None = None) -> Tensor:
        """Run the block: (..., in) → (..., out).

        Args:
            x: (..., in), in the block's dtype; under autocast, in any dtype that it narrows.
            coefficients: ready-made ones for both layers; the gate makes them otherwise.
        """
        given = self.coefficients(x) if coefficients is None else coefficients
        name = self.config.act_layer
        function = self.act if name is None else ACTIVATIONS[name]
        assert function is not None
        boundary = self.boundary
        rows, given = (x, given) if boundary is None else boundary.entered(x, given)
        middle = self.first(rows, given)
        if self.config.gated:
            gate, up = halves(middle)
            # what a user gives may write in place, which PyTorch refuses for one of several views
            middle = function(gate if name is not None else gate.clone()) * up
        else:
            middle = function(middle)
        result: Tensor = self.second(self._dropped(middle, slices=True), given)
        if boundary is not None:
            result = boundary.leave(result, x)
        return self._dropped(result, slices=False)

    def _dropped(self, array: Tensor, *, slices: bool) -> Tensor:
        """Dropout of hidden features, which are slices where the block is cut, or of outputs."""
        drop = self.config.drop
        if self.boundary is None or not self.training or drop == 0.0:
            return F.dropout(array, drop, self.training)
        return self.boundary.dropout(array, drop, slices=slices)

    def _layers(self) -> tuple[MuMoE, MuMoE]:
        return self.first, self.second

    def _costs(self) -> Costs:
        keeps_input = self.config.act_layer not in ("relu", "tanh")
        used = library(self.dtype, keeps_input=keeps_input)
        return {"itemsize": self.dtype.itemsize, "library": used}
