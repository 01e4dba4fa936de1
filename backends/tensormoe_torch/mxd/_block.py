"""The block: a dense encoder, and a decoder for every expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe import Gate, Hadamard
from tensormoe._validation import flag, positive_int
from tensormoe.errors import SpecError
from tensormoe.functional import Options
from tensormoe_torch._activations import ACTIVATIONS, Act, own_activation, read_activation
from tensormoe_torch._checks import Given, check_input
from tensormoe_torch._dtypes import checked_device, checked_dtype
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._sharded import stored
from tensormoe_torch.surgery._block import read_block

__all__ = ["MixtureOfDecoders"]


class MixtureOfDecoders(nn.Module):
    """``y = (Cᵀa) * (Dᵀz) + b``: Mixture of Decoders (Oldfield et al. 2025, arXiv 2505.21364).

    ``z = act(Eᵀx)`` are hidden units as those of an MLP, and ``a`` the k largest of
    ``relu(Gᵀx + g)``, not renormalized. So ``y = Σ_n a_n W_nᵀ z + b`` with experts
    ``W_n = D diag(c_n)``, every one of full rank: :class:`tensormoe.Hadamard`. It is a
    linear layer, a :class:`MuMoE` that is given its coefficients, and an :class:`ExpertGate`.

    D starts at zero, and so does the output; the rest starts as in these layers, C divided so that
    ``Cᵀa`` is one on average for inputs of unit variance, whatever N and k: D then learns as the
    second layer of an MLP does. An expert takes as many parameters as a hidden unit of a
    transcoder: with N = T − H experts the block has as many as a transcoder of width T.

    Args:
        in_features: size of an input.
        hidden_features: size of z; ``4 * in_features`` by default.
        out_features: size of an output; ``in_features`` by default.
        act_layer: act, as for :class:`MuMoEMLP`.
        bias: whether there is a b, one for all experts.
        experts: N, or one size per level of hierarchy.
        k: the most experts per token and level.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on.

    Attributes:
        encoder: E, an ``nn.Linear`` with a bias.
        decoder: C and D, a :class:`MuMoE` without a gate: ``decoder.expert(n)`` is W_n.
        gate: G and g.
        bias: b (out,), or None.
        act: the activation, if it has no name; None otherwise.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``k`` above the number of experts.
        GateError: ``k`` is no count.

    >>> import torch
    >>> block = MixtureOfDecoders(16, experts=200, k=8)
    >>> block(torch.ones(5, 16)).shape
    torch.Size([5, 16])
    >>> (coefficients,) = block.coefficients(torch.randn(5, 16))
    >>> int((coefficients > 0).sum(-1).max())
    8
    """

    act: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Act = "gelu",
        bias: bool = True,
        *,
        experts: int | tuple[int, ...],
        k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype, device = checked_dtype(dtype), checked_device(device)
        size = positive_int(in_features, "in_features")
        hidden = 4 * size if hidden_features is None else hidden_features
        hidden = positive_int(hidden, "hidden_features")
        out = size if out_features is None else out_features
        self._name, act = read_activation(act_layer)
        self.act = own_activation(self._name, act, device, dtype)
        gate = Options(experts, Hadamard(), bias=False, gate=Gate("relu_top_k", k=k, bias=True))
        reads = gate.layer(size, out)
        writes = replace(reads, spec=replace(reads.spec, in_features=hidden), gate=None)
        self.encoder = nn.Linear(size, hidden, device=device, dtype=dtype)
        self.decoder = MuMoE.of(writes, device=device, dtype=dtype)
        self.gate = ExpertGate(reads, device, dtype)
        self.bias: nn.Parameter | None = None
        if flag(bias, "bias"):
            self.bias = nn.Parameter(
                torch.empty(reads.spec.out_features, device=device, dtype=dtype)
            )
        self._start()

    def extra_repr(self) -> str:
        act = "" if self._name is None else f", act_layer={self._name!r}"
        return f"bias={self.bias is not None}{act}"

    @property
    def num_parameters(self) -> int:
        """Stored entries, the gate's included."""
        return sum(each.numel() for each in self.parameters())

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        for part in (self.encoder, self.decoder, self.gate, self.act):
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        experts = self.decoder.config.spec.experts
        names = [f"expert_{level}" for level in range(len(experts))]
        factors = stored(self.decoder.factors, (*names, "input"))
        factors["input"].zero_()
        k = self.gate.gate.k
        assert k is not None
        for name, count in zip(names, experts, strict=True):
            factors[name].div_(_usual_sum(count, k, self.encoder.in_features))
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def encode_like(self, mlp: nn.Module | tuple[nn.Module, Any, nn.Module]) -> None:
        """Copy an MLP's first layer into the encoder: z is then what the MLP's second layer reads.

        Args:
            mlp: an MLP without a gate of its own, as for :func:`from_mlp`.

        Raises:
            SpecError: no such MLP, or one of other sizes or another activation.
        """
        found = read_block(mlp, "mlp")
        wanted = (self.encoder.in_features, self.encoder.out_features)
        if found.up is not None or found.first.sizes != wanted or found.activation != self._name:
            raise SpecError(
                f"mlp must have a first layer of sizes {wanted}, the activation {self._name!r} and "
                f"no gate; got {found.first.sizes}, {found.activation!r} and "
                f"{'one' if found.up else 'none'}. Leave the encoder as it is."
            )
        weight, bias = found.first.weight.t(), found.first.bias
        self.encoder.weight.copy_(weight)
        self.encoder.bias.copy_(torch.zeros_like(self.encoder.bias) if bias is None else bias)

    def hidden(self, x: Tensor) -> Tensor:
        """z, the hidden units (..., hidden) of inputs (..., in)."""
        function = self.act if self._name is None else ACTIVATIONS[self._name]
        assert function is not None
        found: Tensor = function(self.encoder(x))
        return found

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """a, the coefficients of inputs (..., in): one tensor (..., N_e) per level.

        Rows do not sum to one.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        found: tuple[Tensor, ...] = self.gate(x)
        return found

    def forward(self, x: Tensor, coefficients: Given | None = None) -> Tensor:
        """Run the block: (..., in) → (..., out).

        Args:
            x: (..., in), in the block's dtype; under autocast, in any dtype that it narrows.
            coefficients: ready-made ones instead of the gate's, as for :class:`MuMoE`.

        Raises:
            BackendError, ShapeError: input or coefficients do not fit.
        """
        check_input(x, self.encoder.in_features, self.encoder.weight)
        given = self.gate(x) if coefficients is None else coefficients
        y: Tensor = self.decoder(self.hidden(x), given)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _usual_sum(experts: int, k: int, features: int) -> float:
    """Expected sum of the k largest positive ones of a fresh gate's logits.

    Weights and biases are uniform on ±1/√features. So logits of an input of unit variance are close
    to normal, and the mean of all above a quantile q of N normal ones is N φ(q), times their
    standard deviation.
    """
    normal = NormalDist()
    cut = normal.inv_cdf(1.0 - min(k / experts, 0.5))
    return experts * normal.pdf(cut) * sqrt((1.0 + 1.0 / features) / 3.0)
