"""The two-layer block: experts, activation, experts, with one gate for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._html import layer_html
from tensormoe.checkpoint import read_block
from tensormoe.errors import ShapeError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import BlockConfig
from tensormoe.gates import Gate
from tensormoe.planning import Cost, Plan
from tensormoe.selection import Budget
from tensormoe_torch._activations import ACTIVATIONS, Act, own_activation, read_activation
from tensormoe_torch._adapter import BACKEND, EAGER
from tensormoe_torch._base import check_init, filled, holding
from tensormoe_torch._checks import Given
from tensormoe_torch._dtypes import checked_dtype
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._products import copies_transposed
from tensormoe_torch._saving import save_module

__all__ = ["MuMoEMLP"]

Weights = tuple[Tensor, Tensor | None]


class MuMoEMLP(nn.Module):
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
        experts: N, or one size a level of hierarchy.
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
        config = functional.resolve_block(
            in_features,
            hidden_features,
            out_features,
            name,
            drop,
            gated=gated,
            experts=experts,
            factorization=factorization,
            rank=rank,
            budget=budget,
            bias=bias,
            gate=gate,
        )
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
        check_init(cls, MuMoEMLP)
        block = cls.__new__(cls)
        block._build(config, init, device, dtype, act)
        return block

    _repr_html_ = layer_html

    def __repr__(self) -> str:
        first, second = self.first.spec, self.second.spec
        experts = first.experts[0] if first.levels == 1 else first.experts
        gated = "gated=True, " if self.config.gated else ""
        return (
            f"MuMoEMLP({first.in_features}, {second.in_features}, {second.out_features}, "
            f"act_layer={self.config.act_layer or self.act!r}, bias={first.bias}, "
            f"drop={self.config.drop}, {gated}experts={experts}, "
            f"factorization={(first.factorization, second.factorization)!r}, "
            f"gate={self.config.first.gate!r}, dtype={self.dtype})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; inputs must have it, unless autocast is on."""
        return self.first.dtype

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        act = self.act.parameters() if isinstance(self.act, nn.Module) else ()
        return self.config.num_parameters + sum(each.numel() for each in act)

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.first.in_features

    @property
    def hidden_features(self) -> int:
        """Size between the layers: of what the second is given."""
        return self.config.hidden_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.second.out_features

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        for part in (self.first, self.second, self.gate, self.act):
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()

    def plan(self, batch: int) -> tuple[Plan, Plan]:
        """How each of the two layers runs ``batch`` inputs."""
        return self.first.plan(batch), self.second.plan(batch)

    def expert(self, *index: int) -> tuple[Weights, Weights]:
        """One expert, an MLP of its own, as matrix and bias of both of its layers; differentiable.

        The block with coefficient 1 for this expert computes ``act(x @ W1 + b1) @ W2 + b2``, and if
        it is gated ``(act(g) * u) @ W2 + b2`` with ``g`` and ``u`` the halves of ``x @ W1 + b1``.

        Args:
            index: one number per level.

        Returns:
            ``(W1, b1), (W2, b2)``: (in, hidden) and (hidden,), twice as many columns if the block
            is gated; (hidden, out) and (out,). Biases are None where the block has none.

        Raises:
            ShapeError: another number of levels, or an index out of range.

        >>> import torch
        >>> block = MuMoEMLP(8, 16, experts=4, rank=3, gate=None)
        >>> (W1, b1), (W2, b2) = block.expert(2)
        >>> x, only = torch.randn(5, 8), torch.eye(4)[[2] * 5]
        >>> alone = torch.nn.functional.gelu(x @ W1 + b1) @ W2 + b2
        >>> torch.allclose(block(x, only), alone, atol=1e-5)
        True
        """
        return self.first.expert(*index), self.second.expert(*index)

    def materialize(self) -> tuple[Weights, Weights]:
        """The experts of both layers, built explicitly: of each as :meth:`MuMoE.materialize`."""
        return self.first.materialize(), self.second.materialize()

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """Cost of one call for ``batch`` inputs on the CPU: both layers, gate and activation."""
        return functional.block_cost(
            self.config,
            batch,
            EAGER,
            self.dtype.itemsize,
            keeps_input=self.config.act_layer not in ("relu", "tanh"),
            copies_transposed=copies_transposed(self.dtype),
            training=training,
        )

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
        name = self.config.act_layer
        function = self.act if name is None else ACTIVATIONS[name]
        assert function is not None
        middle = self.first(x, given)
        if self.config.gated:
            hidden = self.config.hidden_features
            middle = function(middle[..., :hidden]) * middle[..., hidden:]
        else:
            middle = function(middle)
        result: Tensor = self.second(F.dropout(middle, self.config.drop, self.training), given)
        return F.dropout(result, self.config.drop, self.training)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Of a sharded block, every process makes this call, as for :meth:`MuMoE.save`.

        Raises:
            CheckpointError: as :meth:`MuMoE.save`.
            SpecError: the activation is a module or function of the block's own.
        """
        save_module(self, path, self.config)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str | None = None) -> Self:
        """The block of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            device: of the parameters; the default one if none is given.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit.
        """
        config, arrays = read_block(path, "MuMoEMLP", BlockConfig, BACKEND)
        return filled(lambda dtype: cls.of(config, device="meta", dtype=dtype), arrays, device)

    @classmethod
    def restore(cls, config: BlockConfig, arrays: Mapping[str, Tensor]) -> Self:
        """A block of tensors that exist already; it trains them in place, and copies none.

        Args:
            config: the block, whose activation has a name.
            arrays: parameters and buffers by canonical name, as ``state_dict()`` has them.

        Raises:
            BackendError, CheckpointError, ShapeError: as :meth:`MuMoE.restore`.
            SpecError: the activation has no name.
        """
        return holding(lambda dtype: cls.of(config, device="meta", dtype=dtype), config, arrays)
