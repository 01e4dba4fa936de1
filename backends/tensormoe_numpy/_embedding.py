"""Embedding tables as experts: the input mode is indexed by token ids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe._layers import EmbeddingSizes
from tensormoe.backend import Array
from tensormoe.factorizations import FactorizationLike
from tensormoe.selection import Budget
from tensormoe_numpy._base import Given, Gradients, Layer, check_cotangent
from tensormoe_numpy._random import checked_dtype, draw


class MuMoEEmbedding(Layer, EmbeddingSizes):
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
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``.
        seed: of the initial values; a NumPy generator is drawn from.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import numpy as np
    >>> table = MuMoEEmbedding(1000, 32, experts=4, factorization="cp", rank=8, seed=0)
    >>> even = np.full((2, 3, 4), 0.25, dtype="float32")
    >>> table(np.array([[1, 5, 7], [2, 2, 999]]), even).shape
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
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        options = functional.Options(experts, factorization, rank, budget, bias=False, gate=None)
        config = options.layer(num_embeddings, embedding_dim, indexed_input=True)
        self._hold(config, draw(config, checked_dtype(dtype), seed, init, self.backend))

    def __call__(self, ids: Array, coefficients: Given) -> Array:
        """Embeddings (..., dim) of ids (...), mixed by coefficients (..., N_e) per level.

        Raises:
            ShapeError: ids that are no integers or out of range, or coefficients of other shapes.
        """
        ids = functional.check_ids(ids, self.spec.in_features, self.backend)
        lead = ids.shape
        given = self._merged(coefficients, lead)
        result: Array = functional.apply_experts(
            self.config, self.parameters, ids.reshape(-1), given, self.backend, consume=True
        )
        return result.reshape(*lead, self.spec.out_features)

    def vjp(self, ids: Array, coefficients: Given) -> tuple[Array, Callable[[Array], Gradients]]:
        """Run the layer and return its output with its backward pass, as :meth:`MuMoE.vjp`."""
        ids = functional.check_ids(ids, self.spec.in_features, self.backend)
        lead = ids.shape
        given = self._merged(coefficients, lead)
        result, pull = functional.experts_vjp(
            self.config, self.parameters, ids.reshape(-1), given, self.backend
        )
        shape = (*lead, self.spec.out_features)

        def pullback(cotangent: Array) -> Gradients:
            check_cotangent(cotangent, shape, result.dtype, self.backend)
            found = pull(cotangent.reshape(result.shape))
            by_level = [found.pop(f"coefficients_{e}") for e in range(self.spec.levels)]
            wide = tuple(each.reshape(*lead, each.shape[-1]) for each in by_level)
            return Gradients(None, found, wide)

        return result.reshape(shape), pullback
