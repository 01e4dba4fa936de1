"""The layer as a module."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar, overload

from equinox.nn import State, StatefulLayer
from jax import Array

from tensormoe._layers import LinearSizes
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import LayerConfig, Options
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._layers import first_values
from tensormoe_jax.equinox._base import Mixture
from tensormoe_jax.equinox._gate import Gated

__all__ = ["MuMoE"]


class MuMoE(Mixture, Gated[LayerConfig], LinearSizes, StatefulLayer):
    """A multilinear mixture of linear experts (Oldfield et al. 2024) in place of ``nn.Linear``.

    ``y = Σ_n a_n(x) (W_nᵀ x + b_n)``, with all W_n stored as one tensor network that is never
    multiplied out. Unlike ``equinox.nn.Linear``, a layer takes batches of any shape, so that no
    ``jax.vmap`` is needed; it works under one as well.

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
            activation; None for a layer that is always given coefficients. One with batch norm
            or balance keeps arrays in a state: make the layer by ``equinox.nn.make_with_state``.
        init: ``"variance"`` (every expert starts like ``torch.nn.Linear``) or ``"paper"``.
        dtype: of the parameters, JAX's default one for None; inputs must have it.
        gate_dtype: of the gate's parameters: ``dtype`` for None, or float32 beside factors of 16
            bits, whose logits are in float32 anyway.
        axis_name: for batch norm under ``jax.vmap``: the names of the axes that are part of the
            batch, as ``equinox.nn.BatchNorm`` takes them.
        key: of ``jax.random``.

    Attributes:
        factors: the factors and the bias by name, a dictionary.
        gate: the :class:`ExpertGate`, or None.
        config: spec and gate as frozen values; no leaf.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import jax, jax.numpy as jnp
    >>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, key=jax.random.key(0))
    >>> layer(jnp.ones((5, 7, 64))).shape
    (5, 7, 10)
    """

    _kind: ClassVar[str] = "MuMoE"

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
        dtype: Any = None,
        gate_dtype: Any = None,
        axis_name: Hashable = None,
        key: Array,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        config = options.layer(in_features, out_features)
        arrays = first_values(config, key, init, dtype, gate_dtype)
        super().__init__(config, arrays, axis_name)

    @overload
    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        state: None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        *,
        state: State,
        key: Any = None,
        inference: bool | None = None,
    ) -> tuple[Array, State]: ...

    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        state: State | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> Array | tuple[Array, State]:
        """Run the layer.

        Args:
            x: (..., in), in the layer's dtype.
            coefficients: ready-made ones, an array (..., N_e) or a ``TopK`` a level; the gate
                makes them otherwise.
            state: running statistics of batch norm, biases of ``balance``.
            key: what a gate's noise is drawn by, in training; other layers ignore it.
            inference: takes the place of the gate's attribute.

        Returns:
            (..., out), in the layer's dtype; and the state afterwards if one was given.

        Raises:
            BackendError: no array of JAX's.
            ShapeError: input or coefficients do not fit the layer.
            GateError: batch norm or balance without a state.
            SpecError: noise is to be drawn, and there is no key.
        """
        if coefficients is None and self.gate is not None:
            if state is None:
                coefficients = self.gate(x, key=key, inference=inference)
            else:
                coefficients, state = self.gate(x, state, key=key, inference=inference)
        result = _pure.apply(self.config, self.parameters, x, coefficients, legs=self.legs)
        return result if state is None else (result, state)
