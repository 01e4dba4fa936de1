"""The two-layer block: experts, activation, experts, with one gate for both."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, overload

import equinox as eqx
import jax
from equinox.nn import State, StatefulLayer
from jax import Array

from tensormoe._names import block_names, split_names
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import BlockConfig, Options
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._activations import Act, activation_name, own_activation
from tensormoe_jax._keys import checked_key
from tensormoe_jax._layers import Block, built, first_values
from tensormoe_jax._specs import MeshCut
from tensormoe_jax.equinox._base import Stateful
from tensormoe_jax.equinox._gate import ExpertGate, Gated
from tensormoe_jax.equinox._layer import MuMoE

__all__ = ["MuMoEMLP"]


class Pair(Stateful[BlockConfig], Block):
    """Two layers, their gate and their activation."""

    first: MuMoE
    second: MuMoE
    gate: ExpertGate | None
    act: Callable[[Array], Array] | None
    dropout: eqx.nn.Dropout
    config: BlockConfig = eqx.field(static=True)
    cut: MeshCut | None = eqx.field(static=True)

    def __init__(
        self,
        config: BlockConfig,
        arrays: Mapping[str, Array],
        act: Act | None,
        axis_name: Hashable = None,
    ) -> None:
        parts = split_names(arrays)
        has_gate = config.first.gate is not None
        self.config = config
        self.cut = None
        self.act = own_activation(config.act_layer, act)
        self.first = MuMoE.restore(replace(config.first, gate=None), parts["first"])
        self.second = MuMoE.restore(config.second, parts["second"])
        self.gate = ExpertGate(config.first, arrays, axis_name) if has_gate else None
        self.dropout = eqx.nn.Dropout(config.drop)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""
        named = block_names(self.first.parameters, self.second.parameters)
        return named if self.gate is None else named | self.gate.parameters

    def _saved_config(self) -> BlockConfig:
        return replace(self.config, drop=float(self.dropout.p))


class MuMoEMLP(Pair, Gated[BlockConfig], StatefulLayer):
    """A μMoE block in place of an MLP (Oldfield et al. 2024, section 3): two mixtures, one gate.

    The coefficients are computed once, from the block's input, and mix the experts of both layers.
    Argument names are those that vision codebases give their MLPs.

    Args:
        in_features: size of an input.
        hidden_features: size between the layers; ``in_features`` by default.
        out_features: size of an output; ``in_features`` by default.
        act_layer: the activation between: "gelu", "gelu_tanh", "relu", "silu" or "tanh"; or any
            function of arrays, ``jax.nn.gelu`` (which is "gelu_tanh") or an ``eqx.Module``, such as
            ``eqx.nn.PReLU()``. One without a name here is kept as ``act``, and the block can't be
            saved.
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
        axis_name: as for :class:`MuMoE`.
        key: of ``jax.random``.

    Attributes:
        first: the layer before the activation, a :class:`MuMoE` without a gate.
        second: the one behind.
        gate: the :class:`ExpertGate` of both, or None.
        act: the activation, if it has no name; None otherwise.
        dropout: the ``equinox.nn.Dropout`` of both.
        config: specs, gate and options as frozen values; no leaf.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import jax, jax.numpy as jnp
    >>> block = MuMoEMLP(32, 64, experts=16, rank=8, key=jax.random.key(0))
    >>> block(jnp.ones((5, 32))).shape
    (5, 32)
    """

    _kind: ClassVar[str] = "MuMoEMLP"

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
        axis_name: Hashable = None,
        key: Array,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        name = activation_name(act_layer)
        config = options.block(in_features, hidden_features, out_features, name, drop, gated=gated)
        arrays = first_values(config, key, init, dtype, gate_dtype)
        super().__init__(config, arrays, act_layer, axis_name)

    @overload
    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        state: None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        *,
        state: State,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> tuple[Array, State]: ...

    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        state: State | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Array | tuple[Array, State]:
        """Run the block: (..., in) → (..., out).

        Args:
            x: (..., in), in the block's dtype.
            coefficients: ready-made ones for both layers; the gate makes them otherwise.
            state: running statistics of batch norm, biases of ``balance``.
            key: what to drop entries by, and what a gate's noise is drawn by.
            inference: takes the place of the attribute of gate and dropout.

        Returns:
            (..., out); and the state afterwards if one was given.

        Raises:
            BackendError, GateError, ShapeError: as :class:`MuMoE`.
            RuntimeError: entries are to be dropped, and there is no key.
        """
        if coefficients is None:
            # entries are dropped by the key's halves
            own = None if key is None else jax.random.fold_in(checked_key(key), 2)
            if state is None:
                coefficients = self.coefficients(x, key=own, inference=inference)
            else:
                coefficients, state = self.coefficients(x, state, key=own, inference=inference)
        keys = (None, None) if key is None else jax.random.split(checked_key(key))
        middle, last = (partial(self.dropout, key=each, inference=inference) for each in keys)
        result = _pure.mix_block(
            self.config, self.parameters, x, coefficients, middle, last, self.act, self.legs
        )
        return result if state is None else (result, state)

    @classmethod
    def restore(
        cls,
        config: BlockConfig,
        arrays: Mapping[str, Array],
        *,
        act: Callable[[Array], Array] | None = None,
        axis_name: Hashable = None,
    ) -> Self:
        """A block of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the block.
            arrays: parameters and buffers by canonical name.
            act: the activation, where the configuration names none.
            axis_name: as for the constructor.

        Raises:
            BackendError, CheckpointError, ShapeError: as :meth:`MuMoE.restore`.
            SpecError: no activation, or two.
        """
        cls._check(config, arrays)
        named = config.act_layer if act is None else act
        return built(cls, Pair, config, arrays, named, axis_name)
