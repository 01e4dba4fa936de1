"""Embedding tables as experts: the input mode is indexed by token ids."""

from __future__ import annotations

from typing import Any

from jax import Array

from tensormoe._layers import EmbeddingSizes
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._layers import first_values
from tensormoe_jax.nnx._base import Mixture
from tensormoe_jax.nnx._rngs import Source, parameters_key


class MuMoEEmbedding(Mixture, EmbeddingSizes):
    """A mixture of embedding tables: token ids pick a row of every expert, coefficients mix them.

    An id is a one-hot input that is never built: the input mode is indexed by a gather. The layer
    has no gate of its own, since an id says nothing but itself; coefficients come from the model.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of an embedding.
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name.
        budget: upper limits instead; ``"linear"``, the default, stands for the parameters of one
            table.
        init: ``"variance"`` or ``"paper"``.
        dtype: of the parameters.
        rngs: as for :class:`MuMoE`.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import jax.numpy as jnp
    >>> table = MuMoEEmbedding(1000, 32, experts=4, factorization="cp", rank=8, rngs=0)
    >>> table(jnp.array([[1, 5, 7], [2, 2, 999]]), jnp.full((2, 3, 4), 0.25)).shape
    (2, 3, 32)
    """

    _kind = "MuMoEEmbedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike = "cp",
        *,
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        init: str = "variance",
        dtype: Any = None,
        rngs: Source,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias=False, gate=None)
        config = options.layer(num_embeddings, embedding_dim, indexed_input=True)
        super().__init__(config, first_values(config, parameters_key(rngs), init, dtype))

    def __call__(self, ids: Array, coefficients: _pure.Given) -> Array:
        """Embeddings (..., dim) of ids (...), mixed by coefficients (..., N_e) per level.

        Ids out of range are errors where they can be looked at, and rows of NaN under
        transformations.

        Raises:
            BackendError: no arrays of JAX's.
            ShapeError: ids that are no integers or out of range, or coefficients of other shapes.
        """
        return _pure.apply(self.config, self.parameters, ids, coefficients, legs=self.legs)
