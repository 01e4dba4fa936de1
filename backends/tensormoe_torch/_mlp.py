"""The two-layer block: experts, activation, experts, with one gate for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._validation import choice
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Factorization
from tensormoe.functional import BlockConfig
from tensormoe.gates import Gate
from tensormoe.planning import Budget, Cost
from tensormoe_torch._adapter import BACKEND, EAGER
from tensormoe_torch._base import checked_dtype, filled, holding
from tensormoe_torch._checks import Given
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._layer import MuMoE

__all__ = ["ACTIVATIONS", "MuMoEMLP"]


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

_MODULES: Mapping[type[nn.Module], str] = MappingProxyType(
    {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
)


class MuMoEMLP(nn.Module):
    """A μMoE block in place of an MLP (Oldfield et al. 2024, section 3): two mixtures, one gate.

    The coefficients are computed once, from the block's input, and mix the experts of both layers.
    Argument names are those that vision codebases give their MLPs.

    Args:
        in_features: size of an input.
        hidden_features: size between the layers; ``in_features`` by default.
        out_features: size of an output; ``in_features`` by default.
        act_layer: the activation between: "gelu", "gelu_tanh", "relu", "silu" or "tanh", or the
            class ``nn.GELU``, ``nn.ReLU``, ``nn.SiLU`` or ``nn.Tanh``.
        bias: whether every expert has a bias.
        drop: share of entries dropped, in training, behind the activation and the second layer.
        experts: N, or one size a level of hierarchy.
        factorization: a value or a name for both layers, or a pair of them.
        rank: bond sizes of both layers, with a name.
        budget: upper limits for the block instead, both layers and the gate together;
            ``"linear"`` stands for the parameters of the two linear layers that it replaces, and
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
        config: specs, gate and options as frozen values.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import torch
    >>> block = MuMoEMLP(32, 64, experts=16, factorization="tensor_ring", rank=(2, 2, 8))
    >>> block(torch.ones(5, 32)).shape
    torch.Size([5, 32])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | type[nn.Module] = "gelu",
        bias: bool = True,
        drop: float = 0.0,
        *,
        experts: int | tuple[int, ...],
        factorization: str | Factorization | tuple[str | Factorization, str | Factorization] = "cp",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act = _MODULES.get(act_layer, act_layer) if isinstance(act_layer, type) else act_layer
        config = functional.resolve_block(
            in_features,
            hidden_features,
            out_features,
            choice(act, ACTIVATIONS, "act_layer", SpecError),
            drop,
            experts=experts,
            factorization=factorization,
            rank=rank,
            budget=budget,
            bias=bias,
            gate=gate,
        )
        self._build(config, init, device, dtype)

    def _build(
        self,
        config: BlockConfig,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dtype = checked_dtype(dtype)
        self.config = config
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
    ) -> Self:
        """A block of a configuration: what the constructor makes of its arguments."""
        block = cls.__new__(cls)
        block._build(config, init, device, dtype)
        return block

    def __repr__(self) -> str:
        first, second = self.first.spec, self.second.spec
        experts = first.experts[0] if first.levels == 1 else first.experts
        return (
            f"MuMoEMLP({first.in_features}, {first.out_features}, {second.out_features}, "
            f"act_layer={self.config.act_layer!r}, bias={first.bias}, drop={self.config.drop}, "
            f"experts={experts}, factorization={(first.factorization, second.factorization)!r}, "
            f"gate={self.config.first.gate!r}, dtype={self.dtype})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; inputs must have it, unless autocast is on."""
        return self.first.dtype

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.config.first.num_parameters + self.config.second.num_parameters

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        self.first.reset_parameters()
        self.second.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """What one call costs for ``batch`` inputs; the activation between is not counted."""
        first = functional.layer_cost(
            self.config.first, batch, EAGER, self.dtype.itemsize, training=training
        )
        return first.then(self.second.cost(batch, training=training))

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients (..., N_e) a level that both layers share."""
        if self.gate is None:
            raise ShapeError(
                "this block has no gate, and makes no coefficients. Build it with one."
            )
        made: tuple[Tensor, ...] = self.gate(x)
        return made

    def forward(self, x: Tensor, coefficients: Given | None = None) -> Tensor:
        """Run the block: (..., in) → (..., out).

        Args:
            x: (..., in), in the block's dtype; under autocast, in any dtype that it narrows.
            coefficients: ready-made ones for both layers; the gate makes them otherwise.
        """
        given = self.coefficients(x) if coefficients is None else coefficients
        middle = ACTIVATIONS[self.config.act_layer](self.first(x, given))
        result: Tensor = self.second(F.dropout(middle, self.config.drop, self.training), given)
        return F.dropout(result, self.config.drop, self.training)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        save_checkpoint(path, "MuMoEMLP", self.config.to_dict(), self.state_dict())

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str | None = None) -> Self:
        """The block of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            device: of the parameters; the default one if none is given.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit.
        """
        config, arrays = functional.read_block(path, "MuMoEMLP", BlockConfig, BACKEND)
        return filled(lambda dtype: cls.of(config, device="meta", dtype=dtype), arrays, device)

    @classmethod
    def restore(cls, config: BlockConfig, arrays: Mapping[str, Tensor]) -> Self:
        """A block of tensors that exist already; it trains them in place, and copies none.

        Args:
            config: the block.
            arrays: parameters and buffers by canonical name, as ``state_dict()`` has them.

        Raises:
            BackendError, CheckpointError, ShapeError: as :meth:`MuMoE.restore`.
        """
        return holding(lambda dtype: cls.of(config, device="meta", dtype=dtype), config, arrays)
