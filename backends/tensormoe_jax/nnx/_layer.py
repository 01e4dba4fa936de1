"""The layer as a module."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Self

from jax import Array

from tensormoe._layers import LinearSizes
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import LayerConfig, Options
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._layers import built, first_values
from tensormoe_jax.nnx._base import Mixture
from tensormoe_jax.nnx._gate import Gated
from tensormoe_jax.nnx._rngs import Source, checked_rngs, parameters_key

__all__ = ["MuMoE"]


class MuMoE(Mixture, Gated[LayerConfig], LinearSizes):
    """A multilinear mixture of linear experts (Oldfield et al. 2024) in place of ``nnx.Linear``.

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
        init: ``"variance"`` (every expert starts like ``torch.nn.Linear``) or ``"paper"``.
        dtype: of the parameters, JAX's default one for None; inputs must have it.
        gate_dtype: of the gate's parameters: ``dtype`` for None, or float32 beside factors of 16
            bits, whose logits are in float32 anyway.
        rngs: ``nnx.Rngs`` with a stream ``params`` or a default one; a seed or a key will do. A
            gate with noise keeps the stream ``noise``.

    Attributes:
        factors: the factors and the bias by name, an ``nnx.Dict`` of ``nnx.Param``.
        gate: the :class:`ExpertGate`, or None.
        config: spec and gate as frozen values.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 7, 64))).shape
    (5, 7, 10)
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
        dtype: Any = None,
        gate_dtype: Any = None,
        rngs: Source,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        config = options.layer(in_features, out_features)
        source = checked_rngs(rngs)
        arrays = first_values(config, parameters_key(source), init, dtype, gate_dtype)
        super().__init__(config, arrays, source)

    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        *,
        use_running_average: bool | None = None,
    ) -> Array:
        """Run the layer.

        Args:
            x: (..., in), in the layer's dtype.
            coefficients: ready-made ones, an array (..., N_e) or a ``TopK`` a level; the gate
                makes them otherwise.
            use_running_average: takes the place of the gate's attribute.

        Returns:
            (..., out), in the layer's dtype.

        Raises:
            BackendError: no array of JAX's.
            ShapeError: input or coefficients do not fit the layer.
        """
        if coefficients is None and self.gate is not None:
            coefficients = self.gate(x, use_running_average)
        return _pure.apply(self.config, self.parameters, x, coefficients, legs=self.legs)

    @classmethod
    def load(cls, path: str | PathLike[str], *, rngs: Source | None = None) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            rngs: what a gate's noise is drawn by, for a layer that goes on training.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit.
        """
        return cls.restore(*cls._read(path), rngs=rngs)

    @classmethod
    def restore(
        cls, config: LayerConfig, arrays: Mapping[str, Array], *, rngs: Source | None = None
    ) -> Self:
        """A layer of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the layer.
            arrays: parameters and buffers by canonical name.
            rngs: what a gate's noise is drawn by, for a layer that goes on training.

        Raises:
            BackendError: arrays of another library.
            CheckpointError: names or shapes that are not the layer's; lists every difference.
            ShapeError: parameters of different dtypes, or of one that no layer has.
            SpecError: the configuration of another kind of layer.
        """
        cls._check(config, arrays)
        source = None if rngs is None else checked_rngs(rngs)
        return built(cls, Mixture, config, arrays, source)
