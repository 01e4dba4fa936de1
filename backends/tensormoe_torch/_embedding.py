"""Embedding tables as experts: the input mode is indexed by token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormoe._layers import EmbeddingSizes
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.selection import Budget
from tensormoe_torch._base import Mixture
from tensormoe_torch._checks import Given, check_ids


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
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import torch
    >>> table = MuMoEEmbedding(1000, 32, experts=4, factorization="cp", rank=8)
    >>> table(torch.tensor([[1, 5, 7], [2, 2, 999]]), torch.full((2, 3, 4), 0.25)).shape
    torch.Size([2, 3, 32])
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias=False, gate=None)
        config = options.layer(num_embeddings, embedding_dim, indexed_input=True)
        super().__init__(config, init, device, dtype)

    def forward(self, ids: Tensor, coefficients: Given) -> Tensor:
        """Embeddings (..., dim) of ids (...), mixed by coefficients (..., N_e) per level.

        Raises:
            BackendError: no tensors, or some on another device.
            ShapeError: ids that are no integers or out of range, or coefficients of other shapes.
        """
        weight = self._weight
        ids = check_ids(ids, self.spec.in_features, weight)
        return self._mix(ids, coefficients, tuple(ids.shape), weight)
