"""Very many small experts as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormoe._validation import flag
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import ProductConfig, merged_choices, product_config
from tensormoe.routing import ProductRoutes, Router
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch.mixtures._base import MixtureModule
from tensormoe_torch.mixtures._neurons import NeuronNetworks, NeuronTables
from tensormoe_torch.mixtures._router import MixtureRouter


class ProductMoE(MixtureModule[ProductConfig]):
    """Very many experts of one neuron each, found by product keys (PEER, He 2024).

    ``y = Σ_heads Σ_k w_k(x) act(u_kᵀ x) v_k``: each head has a query per level, scores the
    sub-keys of the level, and takes the k experts (i, j) of the largest sums of scores. A million
    experts in two levels cost two thousand scores. Their vectors are rows of tables, or entries of
    a tensor network over the levels, whose size grows with N₁ + N₂ instead of N₁ · N₂.

    Args:
        in_features: size of a token.
        hidden_features: hidden units per expert; 1 by default, a single neuron.
        out_features: size of an output; ``in_features`` by default.
        experts: one number per level, (1000, 1000) for a million experts.
        top_k: experts per head.
        heads: choices per token, each with queries of its own; all choose from the same experts.
        act_layer: name of the activation.
        factorization: "dense" for tables, or a value or name for both layers of the experts, or a
            pair.
        rank: bond sizes of both, with a name.
        key_features: size of queries and sub-keys; None for logits that are projected from the
            token, as in OmniMoE.
        share_keys: whether all heads have the same sub-keys.
        query_norm: whether each query is normalized to mean zero and variance one.
        router: a :class:`tensormoe.routing.Router` or the name of its scores: see
            :func:`tensormoe.routing.choose_product`.
        sparse: whether the tables get sparse gradients, which have the rows that were read alone:
            for ``torch.optim.SparseAdam``, ``SGD`` and ``Adagrad``. Not kept in checkpoints.
        init: ``"variance"`` or ``"paper"``, of factorized experts.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and scores are
            float32 at least.

    Attributes:
        router: called with tokens, it gives their routing record.
        experts: called ``experts(hidden_states, top_k_index, top_k_weights)``.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``top_k`` above all experts.
        RankError: a rank that does not fit the factorization.
        GateError: a router that cannot be.

    >>> import torch
    >>> layer = ProductMoE(32, experts=(20, 30), top_k=4, heads=2, key_features=8)
    >>> x = torch.randn(5, 7, 32)
    >>> routes = layer.route(x)
    >>> layer(x, routes).shape, routes.top_k_index.shape
    (torch.Size([5, 7, 32]), torch.Size([5, 7, 2, 4]))
    """

    _kind = "ProductMoE"
    _config_kind = ProductConfig

    router: MixtureRouter
    experts: NeuronTables | NeuronNetworks

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        experts: tuple[int, ...],
        top_k: int,
        heads: int = 1,
        act_layer: str = "gelu",
        factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "dense",
        rank: int | tuple[int, ...] | None = None,
        key_features: int | None = 128,
        share_keys: bool = True,
        query_norm: bool = True,
        router: Router | str = "softmax",
        sparse: bool = False,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = product_config(
            in_features,
            hidden_features,
            out_features,
            experts=experts,
            top_k=top_k,
            heads=heads,
            act_layer=act_layer,
            factorization=factorization,
            rank=rank,
            key_features=key_features,
            share_keys=share_keys,
            query_norm=query_norm,
            router=router,
        )
        self._build(config, init, device, dtype)
        if flag(sparse, "sparse"):
            self.sparse_gradients()

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        config = self.config
        self.experts = (
            NeuronTables(config, False, device, dtype)
            if config.factorized is None
            else NeuronNetworks(config, init, device, dtype)
        )
        self.router = MixtureRouter(config, device, dtype)

    def sparse_gradients(self, sparse: bool = True) -> ProductMoE:
        """Give the tables sparse gradients, or dense ones, and return the module.

        A loaded module has dense ones.

        Raises:
            SpecError: factorized experts, which have no tables.
        """
        if not isinstance(self.experts, NeuronTables):
            raise SpecError(
                "sparse gradients are those of tables; got factorized experts, whose factors are "
                "small. Leave sparse=False."
            )
        for table in self.experts.tables.values():
            table.sparse = sparse
        return self

    def route(self, x: Tensor) -> ProductRoutes:
        """The routing record of tokens (..., in): their experts, weights and logits.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        routes: ProductRoutes = self.router(x)
        return routes

    def forward(self, x: Tensor, routes: ProductRoutes | None = None) -> Tensor:
        """Run the mixture: (..., in) → (..., out).

        Args:
            x: (..., in), in the mixture's dtype; under autocast, in any dtype that it narrows.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input or record do not fit.
        """
        batch_shape, rows = self._rows(x)
        if routes is None:
            routes = self.router(rows)
        else:
            self.config.check_routes(routes, batch_shape)
            routes = routes.reshaped(rows.shape[:-1], BACKEND)
        y: Tensor = self.experts(rows, *merged_choices(routes, BACKEND))
        return y.reshape(*batch_shape, self.config.out_features)
