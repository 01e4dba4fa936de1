"""The sparse mixture as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import SparseConfig, grouped_index, sparse_config, with_shared
from tensormoe.routing import Router, Routes
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures._base import MixtureModule, make_experts
from tensormoe_torch.mixtures._router import SparseRouter


class SparseMoE(MixtureModule[SparseConfig]):
    """A sparse mixture of experts: a router sends each token to k of N experts.

    ``y = Σ_k w_k(x) E_{n_k}(x)``, plus an expert that all tokens share if there is one
    (DeepSeekMoE). No token is dropped unless the router has a ``capacity``. Experts are dense, or
    all matrices of a role are one tensor network, of which k experts' entries are taken per token.

    Args:
        in_features: size of a token.
        hidden_features: size between the layers of an expert; None for ``kind="linear"``.
        out_features: size of an output; ``in_features`` by default.
        experts: N.
        top_k: experts per token.
        kind: "swiglu" (``D(act(G x) · U x)``), "mlp" (``D act(U x)``) or "linear".
        act_layer: name of the activation; "silu" for "swiglu" and "gelu" for "mlp" by default.
        bias: whether experts have biases.
        factorization: "dense", or a value or name for both layers of the experts, or a pair.
        rank: bond sizes of both, with a name. Without one, a named factorization gets the rank
            whose factors have the parameters of one expert's linear layer.
        budget: parameters of all that is built instead of a rank, experts, router and shared
            expert: a number, or a ``Budget(parameters=…)``, whose ``gate=False`` leaves the router
            out.
        router: a :class:`tensormoe.routing.Router`, or the name of its scores.
        shared_features: hidden size of an expert that every token runs, of the same kind; None for
            none.
        mix_shared: whether a learned softmax weights the sum of the chosen experts and the shared
            expert, as in CartesianMoE, instead of ones.
        groups: where experts were merged, the expert behind each of the router's outputs, which
            may then be more than N; None for one output per expert.
        init: ``"variance"`` or ``"paper"``, of every layer.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and scores are
            float32 at least.

    Attributes:
        router: the :class:`SparseRouter`; called with tokens, it gives their routing record.
        experts: the experts, called ``experts(hidden_states, top_k_index, top_k_weights)``.
        shared: the expert that every token runs, or None.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``top_k`` above N.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> import torch
    >>> from tensormoe.gates import load_balance_loss
    >>> layer = SparseMoE(32, 64, experts=8, top_k=2)
    >>> x = torch.randn(5, 7, 32)
    >>> routes = layer.route(x)
    >>> y = layer(x, routes)
    >>> y.shape, routes.top_k_index.shape
    (torch.Size([5, 7, 32]), torch.Size([5, 7, 2]))
    >>> loss = load_balance_loss(routes.scores, routes.choices, experts=8)
    """

    _kind = "SparseMoE"
    _config_kind = SparseConfig

    router: SparseRouter
    experts: FactorizedExperts
    shared: FactorizedExperts | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        experts: int,
        top_k: int,
        kind: str = "swiglu",
        act_layer: str | None = None,
        bias: bool = False,
        factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "dense",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | None = None,
        router: Router | str = "softmax",
        shared_features: int | None = None,
        mix_shared: bool = False,
        groups: Sequence[int] | None = None,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = sparse_config(
            in_features,
            hidden_features,
            out_features,
            experts=experts,
            top_k=top_k,
            kind=kind,
            act_layer=act_layer,
            bias=bias,
            factorization=factorization,
            rank=rank,
            budget=budget,
            router=router,
            shared_features=shared_features,
            mix_shared=mix_shared,
            groups=groups,
        )
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        config = self.config
        self.experts = make_experts(config.experts, init, device, dtype)
        shared = config.shared
        self.shared = None if shared is None else make_experts(shared, init, device, dtype)
        self.router = SparseRouter(config, device, dtype)

    def follow(self, config: SparseConfig, kept: Sequence[int] | None = None) -> None:
        """Follow experts that were replaced in place, as merged or pruned ones are.

        Args:
            config: of the mixture with the experts that it has now.
            kept: outputs that the router keeps, in their order; all by default.
        """
        if kept is not None:
            self.router = self.router.pruned(config, kept)
        self.router.config = self.config = config

    def route(self, x: Tensor) -> Routes:
        """The routing record of tokens (..., in): their experts, weights, logits and scores.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        routes: Routes = self.router(x)
        return routes

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """Run the mixture: (..., in) → (..., out).

        Args:
            x: (..., in), in the mixture's dtype; under autocast, in any dtype that it narrows.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input or record do not fit.
        """
        batch_shape, rows = self._rows(x)
        config = self.config
        if routes is None:
            routes = self.router(rows)
        else:
            config.check_routes(routes, batch_shape)
        k = config.top_k
        index, weights = (
            each.reshape(-1, k) for each in (routes.top_k_index, routes.top_k_weights)
        )
        if config.groups is not None:
            index = grouped_index(index, config.groups, BACKEND)
        y: Tensor = self.experts(rows, index, weights)
        if self.shared is not None:
            mixing = None if routes.mixing is None else routes.mixing.reshape(-1, 2)
            y = with_shared(y, self.shared.everywhere(rows), mixing, BACKEND)
        # fully_shard warns of outputs that are views
        return y if len(batch_shape) == 1 else y.reshape(*batch_shape, config.out_features)
