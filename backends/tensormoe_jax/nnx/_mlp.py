"""The two-layer block: experts, activation, experts, with one gate for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Self

from flax import nnx
from jax import Array

from tensormoe._names import block_names, split_names
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import BlockConfig, Options
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._activations import Act, activation_name, own_activation
from tensormoe_jax._layers import Block, built, first_values
from tensormoe_jax.nnx._gate import ExpertGate, Gated
from tensormoe_jax.nnx._layer import MuMoE
from tensormoe_jax.nnx._rngs import Source, checked_rngs, parameters_key

__all__ = ["MuMoEMLP"]


class Pair(Block, nnx.Module):
    """Two layers, their gate and their activation."""

    gate: ExpertGate | None

    def __init__(
        self,
        config: BlockConfig,
        arrays: Mapping[str, Array],
        act: Act | None,
        rngs: nnx.Rngs | None,
    ) -> None:
        parts = split_names(arrays)
        self.config = config
        self.cut = None
        self.act = own_activation(config.act_layer, act)
        self.first = MuMoE.restore(replace(config.first, gate=None), parts["first"])
        self.second = MuMoE.restore(config.second, parts["second"])
        has_gate = config.first.gate is not None
        self.gate = ExpertGate(config.first, arrays, rngs=rngs) if has_gate else None
        # a block that drops nothing needs no state for it
        self.dropout = nnx.Dropout(config.drop, rngs=rngs if config.drop > 0.0 else None)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""
        named = block_names(self.first.parameters, self.second.parameters)
        return named if self.gate is None else named | self.gate.parameters

    @property
    def buffers(self) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name."""
        return {} if self.gate is None else self.gate.buffers

    def _saved_config(self) -> BlockConfig:
        return replace(self.config, drop=float(self.dropout.rate))

    def _saved_arrays(self) -> dict[str, Array]:
        return self.parameters | self.buffers


class MuMoEMLP(Pair, Gated[BlockConfig]):
    """A μMoE block in place of an MLP (Oldfield et al. 2024, section 3): two mixtures, one gate.

    The coefficients are computed once, from the block's input, and mix the experts of both layers.
    Argument names are those that vision codebases give their MLPs.

    Args:
        in_features: size of an input.
        hidden_features: size between the layers; ``in_features`` by default.
        out_features: size of an output; ``in_features`` by default.
        act_layer: the activation between: "gelu", "gelu_tanh", "relu", "silu" or "tanh"; or any
            function of arrays, ``jax.nn.gelu`` (which is "gelu_tanh") or an ``nnx.Module``.
            One without a name here is kept as ``act``, and the block can't be saved.
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
        dtype: of the parameters.
        gate_dtype: of the gate's parameters: ``dtype`` for None, or float32 beside factors of 16
            bits, whose logits are in float32 anyway.
        rngs: as for :class:`MuMoE`; a block that drops entries keeps its stream ``dropout``, and a
            gate with noise its stream ``noise``.

    Attributes:
        first: the layer before the activation, a :class:`MuMoE` without a gate.
        second: the one behind.
        gate: the :class:`ExpertGate` of both, or None.
        act: the activation, if it has no name; None otherwise.
        dropout: the ``nnx.Dropout`` of both.
        config: specs, gate and options as frozen values.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import jax.numpy as jnp
    >>> block = MuMoEMLP(32, 64, experts=16, factorization="cp", rank=8, rngs=0)
    >>> block(jnp.ones((5, 32))).shape
    (5, 32)
    """

    _kind = "MuMoEMLP"

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
        dtype: Any = None,
        gate_dtype: Any = None,
        rngs: Source,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        name = activation_name(act_layer)
        config = options.block(in_features, hidden_features, out_features, name, drop, gated=gated)
        source = checked_rngs(rngs)
        arrays = first_values(config, parameters_key(source), init, dtype, gate_dtype)
        super().__init__(config, arrays, act_layer, source)

    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        *,
        deterministic: bool | None = None,
        use_running_average: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Array:
        """Run the block: (..., in) → (..., out).

        Args:
            x: (..., in), in the block's dtype.
            coefficients: ready-made ones for both layers; the gate makes them otherwise.
            deterministic: whether nothing is dropped; takes the place of ``dropout``'s attribute.
            use_running_average: takes the place of the gate's attribute.
            rngs: what to drop by, instead of the block's own stream.

        Raises:
            BackendError, ShapeError: as :class:`MuMoE`.
        """
        if coefficients is None:
            coefficients = self.coefficients(x, use_running_average=use_running_average)
        drop = partial(self.dropout, deterministic=deterministic, rngs=rngs)
        return _pure.mix_block(
            self.config, self.parameters, x, coefficients, drop, drop, self.act, self.legs
        )

    @classmethod
    def load(cls, path: str | PathLike[str], *, rngs: Source | None = None) -> Self:
        """The block of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            rngs: what to drop entries by, and a gate's noise, for a block that goes on training.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit.
        """
        return cls.restore(*cls._read(path), rngs=rngs)

    @classmethod
    def restore(
        cls,
        config: BlockConfig,
        arrays: Mapping[str, Array],
        *,
        act: Callable[[Array], Array] | None = None,
        rngs: Source | None = None,
    ) -> Self:
        """A block of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the block.
            arrays: parameters and buffers by canonical name.
            act: the activation, where the configuration names none.
            rngs: what to drop entries by, and a gate's noise, for a block that goes on training.

        Raises:
            BackendError, CheckpointError, ShapeError: as :meth:`MuMoE.restore`.
            SpecError: no activation, or two.
        """
        cls._check(config, arrays)
        named = config.act_layer if act is None else act
        source = None if rngs is None else checked_rngs(rngs)
        return built(cls, Pair, config, arrays, named, source)
