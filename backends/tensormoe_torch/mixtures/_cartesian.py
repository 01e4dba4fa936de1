"""The Cartesian product of experts as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import CartesianConfig, cartesian_config
from tensormoe.routing import CartesianRoutes, Router, Routes
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch.mixtures._base import MixtureModule
from tensormoe_torch.mixtures._sparse import SparseMoE


class CartesianMoE(MixtureModule[CartesianConfig]):
    """A Cartesian product of experts: N sub-experts, then N more on their outputs.

    ``m = A(x)``, ``y = m + B(norm(x + m))``, with two sparse mixtures A and B of N sub-experts each
    (CartesianMoE, Su et al. 2025): k of N in each, and N² compositions, of which those with a
    common sub-expert share what it knows. The output is added to the residual stream, as that of
    an MLP. Experts are dense, or all matrices of a role are one tensor network.

    Args:
        in_features: size of a token.
        hidden_features: size between the layers of a sub-expert, half of an expert's in the paper;
            None for ``kind="linear"``.
        out_features: ``in_features``, as outputs are added to inputs.
        experts: N, the sub-experts of each half.
        top_k: sub-experts per token of each half.
        kind: "swiglu" (``D(act(G x) · U x)``), "mlp" (``D act(U x)``) or "linear".
        act_layer: name of the activation; "silu" for "swiglu" and "gelu" for "mlp" by default.
        bias: whether experts have biases.
        factorization: "dense", or a value or name for both layers of the experts, or a pair.
        rank: bond sizes of both, with a name. Without one, a named factorization gets the rank
            whose factors have the parameters of one expert's linear layer.
        budget: parameters of all that is built instead of a rank, routers and norms included: a
            number, or a ``Budget(parameters=…)``, whose ``gate=False`` leaves the routers out.
        router: a :class:`tensormoe.routing.Router`, or the name of its scores, for each half.
        shared_features: hidden size of a sub-expert in each half that every token runs; None for
            none.
        mix_shared: whether a learned softmax weights the sum of the chosen sub-experts and the
            shared one, instead of ones.
        pre_norm: whether x is the residual stream itself, which the layer normalizes before A: the
            paper's block without its own norm. Without, x is what the block's norm made of it.
        eps: what the norms add to mean squares.
        init: ``"variance"`` or ``"paper"``, of every layer.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and scores are
            float32 at least.

    Attributes:
        first: A, a :class:`SparseMoE`.
        second: B, another.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, or outputs of another size.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> import torch
    >>> layer = CartesianMoE(32, 16, experts=8, top_k=2, shared_features=16)
    >>> x = torch.randn(5, 7, 32)
    >>> routes = layer.route(x)
    >>> layer(x, routes).shape, routes.pairs.indices.shape
    (torch.Size([5, 7, 32]), torch.Size([5, 7, 4]))
    """

    _kind = "CartesianMoE"
    _config_kind = CartesianConfig

    first: SparseMoE
    second: SparseMoE

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
        mix_shared: bool = True,
        pre_norm: bool = False,
        eps: float = 1e-6,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = cartesian_config(
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
            pre_norm=pre_norm,
            eps=eps,
        )
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        config = self.config
        self.first, self.second = (SparseMoE.of(config.half, init, device, dtype) for _ in range(2))
        for name in config.norms:
            norm = nn.RMSNorm(config.in_features, eps=config.eps, device=device, dtype=dtype)
            self.add_module(name, norm)

    def route(self, x: Tensor) -> CartesianRoutes:
        """The routing record of tokens (..., in): of both halves, the first of which it runs.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        batch_shape, rows = self._rows(x)
        records: dict[str, Routes] = {}

        def half(name: str, rows: Tensor) -> Tensor:
            module: SparseMoE = self.get_submodule(name)  # type: ignore[assignment]
            records[name] = module.route(rows)
            return module(rows, records[name]) if name == "first" else rows

        self.config.compose(rows, self._call, half)
        return CartesianRoutes(**records).reshaped(batch_shape, BACKEND)

    def forward(self, x: Tensor, routes: CartesianRoutes | None = None) -> Tensor:
        """Run the mixture: (..., in) → (..., in).

        Args:
            x: (..., in), in the mixture's dtype; under autocast, in any dtype that it narrows.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input or record do not fit.
        """
        batch_shape, rows = self._rows(x)
        if routes is None:
            y: Tensor = self.config.compose(rows, self._call, self._call)
        else:
            self.config.check_routes(routes, batch_shape)
            merged = routes.reshaped(rows.shape[:-1], BACKEND)

            def half(name: str, rows: Tensor) -> Tensor:
                made: Tensor = self.get_submodule(name)(rows, getattr(merged, name))
                return made

            y = self.config.compose(rows, self._call, half)
        return y.reshape(*batch_shape, self.config.out_features)

    def _call(self, name: str, rows: Tensor) -> Tensor:
        made: Tensor = self.get_submodule(name)(rows)
        return made
