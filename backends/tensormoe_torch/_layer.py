"""The layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormoe._layers import LinearSizes
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import LayerConfig, Options
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_torch._base import Mixture
from tensormoe_torch._checks import Given, check_input
from tensormoe_torch._declared import declared
from tensormoe_torch._gate import Gated


class MuMoE(Mixture, Gated[LayerConfig], LinearSizes):
    """A multilinear mixture of linear experts (Oldfield et al. 2024) in place of a ``nn.Linear``.

    ``y = Σ_n a_n(x) (W_nᵀ x + b_n)``, with all W_n stored as one tensor network that is never
    multiplied out.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name.
        budget: upper limits for the layer with its gate instead (:class:`tensormoe.Budget`, a
            number of parameters, or ``"linear"``, those of the linear layer of the same size);
            ``Budget(…, gate=False)`` leaves the gate out. Without rank or budget the factors get
            the linear layer's parameters, and the gate comes on top: ``num_parameters`` counts
            both, ``spec.num_parameters`` the factors alone.
        bias: whether every expert has a bias.
        gate: how inputs become coefficients: a :class:`tensormoe.Gate` or the name of its
            activation; None for a layer that is always given coefficients.
        init: ``"variance"`` (every expert starts like ``nn.Linear``) or ``"paper"``.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on.

    Attributes:
        factors: the factors and the bias by name, an ``nn.ParameterDict``.
        gate: the :class:`ExpertGate`, or None.
        config: spec and gate as frozen values.
        in_features, out_features, weight, bias: as of an ``nn.Linear``, but the last two say shape,
            dtype and device alone.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import torch
    >>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16)
    >>> layer(torch.ones(5, 7, 64)).shape
    torch.Size([5, 7, 10])
    """

    _kind = "MuMoE"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike = "cp",
        *,
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        bias: bool = True,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        super().__init__(options.layer(in_features, out_features), init, device, dtype)

    @property
    def weight(self) -> Tensor:
        """The shape (out, in), dtype and device of an expert's matrix, for code that reads those.

        It has no values: whatever needs some raises a ``SpecError``. Models cast inputs to
        ``layer.weight.dtype``; there is no one matrix that computes what the layer computes.

        >>> layer = MuMoE(8, 4, experts=3, rank=2)
        >>> layer.weight.dtype, tuple(layer.weight.shape)
        (torch.float32, (4, 8))
        """
        return self._declared((self.out_features, self.in_features), "weight")

    @property
    def bias(self) -> Tensor | None:
        """The same for an expert's bias (out,): no values; None where experts have none."""
        return self._declared((self.out_features,), "bias") if self.spec.bias else None

    def _declared(self, shape: tuple[int, ...], name: str) -> Tensor:
        like, trained = self._weight, any(each.requires_grad for each in self.factors.values())
        return declared(shape, like, trained, f"{name} of {type(self).__name__}")

    def forward(self, x: Tensor, coefficients: Given | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: (..., in), in the layer's dtype; under autocast, in any dtype that it narrows.
            coefficients: ready-made ones, a tensor (..., N_e) or a ``TopK`` a level; the gate
                makes them otherwise.

        Returns:
            (..., out), in the layer's dtype, or in autocast's.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input or coefficients do not fit the layer.
        """
        weight = self._weight
        features = self.spec.in_features if self._part is None else self._part.in_features
        lead = check_input(x, features, weight)
        return self._mix(x, coefficients, lead, weight)
