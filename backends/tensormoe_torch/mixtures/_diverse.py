"""The mixture of experts of different sizes as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import OneExpert
from tensormoe.mixtures import Dispatch, DiverseConfig, diverse_config, send_by_size
from tensormoe.routing import Router, Routes
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._tracing import is_traced
from tensormoe_torch.compression._calls import check_choices
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures._base import MixtureModule, make_experts
from tensormoe_torch.mixtures._router import MixtureRouter

Pair = tuple[FactorizationLike, FactorizationLike]


class DiverseMoE(MixtureModule[DiverseConfig]):
    """A sparse mixture of experts of different sizes (Sun et al. 2024).

    ``y = Σ_k w_k(x) E_{n_k}(x)`` as in SparseMoE, with experts of different hidden sizes: a token
    that needs more finds an expert with more. Every choice runs its own expert's size. Sizes come
    in pairs h + δ and h - δ, so that all experts have the parameters of as many equal ones.

    Args:
        in_features: size of a token.
        hidden_features: one hidden size per expert, equal ones side by side; or their mean h, for
            pairs h + δ and h - δ (:func:`tensormoe.mixtures.paired_sizes`).
        out_features: size of an output; ``in_features`` by default.
        experts: N, needed with a mean size, and even then.
        top_k: experts per token.
        spread: with a mean size, the largest δ relative to it; 0.5 unless given.
        kind: "swiglu" (``D(act(G x) · U x)``) or "mlp" (``D act(U x)``).
        act_layer: name of the activation; "silu" for "swiglu" and "gelu" for "mlp" by default.
        bias: whether experts have biases.
        factorization: "dense", or a value or name for both layers of the experts, or a pair, or a
            pair for each size.
        rank: bond sizes of both, with a name. Without one, a named factorization gets the rank
            whose factors have the parameters of one expert's linear layer, for each size.
        budget: parameters of all that is built instead of a rank, experts and router: a number, or
            a ``Budget(parameters=…)``, whose ``gate=False`` leaves the router out. Sizes get shares
            in proportion to their dense parameters.
        router: a :class:`tensormoe.routing.Router`, or the name of its scores.
        init: ``"variance"`` or ``"paper"``, of every layer.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and scores are
            float32 at least.

    Attributes:
        router: called with tokens, it gives their routing record.
        experts: the :class:`DiverseExperts`, called ``experts(hidden_states, top_k_index,
            top_k_weights)``; ``experts[3](x)`` runs one of them.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, an odd number of experts to pair, or a
            ``top_k`` above N.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> import torch
    >>> layer = DiverseMoE(32, 64, experts=4, top_k=2)
    >>> layer.config.hidden_features, layer(torch.randn(5, 7, 32)).shape
    ((96, 80, 48, 32), torch.Size([5, 7, 32]))
    """

    _kind = "DiverseMoE"
    _config_kind = DiverseConfig

    router: MixtureRouter
    experts: DiverseExperts

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int | None = None,
        *,
        experts: int | None = None,
        top_k: int,
        spread: float | None = None,
        kind: str = "swiglu",
        act_layer: str | None = None,
        bias: bool = False,
        factorization: FactorizationLike | Pair | Sequence[Pair] = "dense",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | None = None,
        router: Router | str = "softmax",
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = diverse_config(
            in_features,
            hidden_features,
            out_features,
            experts=experts,
            top_k=top_k,
            spread=spread,
            kind=kind,
            act_layer=act_layer,
            bias=bias,
            factorization=factorization,
            rank=rank,
            budget=budget,
            router=router,
        )
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        self.experts = DiverseExperts(self.config, init, device, dtype)
        self.router = MixtureRouter(self.config, device, dtype)

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
        if routes is None:
            routes = self.router(rows)
        else:
            self.config.check_routes(routes, batch_shape)
        k = self.config.top_k
        index, weights = (
            each.reshape(-1, k) for each in (routes.top_k_index, routes.top_k_weights)
        )
        y: Tensor = self.experts(rows, index, weights)
        # fully_shard warns of outputs that are views
        return y if len(batch_shape) == 1 else y.reshape(*batch_shape, self.config.out_features)


class DiverseExperts(nn.Module):
    """Experts of all sizes, numbered size after size.

    Args:
        config: the mixture.
        init: of every layer.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        config: the mixture.

    >>> layer = DiverseMoE(32, (64, 16, 16), top_k=2)
    >>> layer.experts[1](torch.randn(5, 32)).shape, len(layer.experts)
    (torch.Size([5, 32]), 3)
    """

    def __init__(self, config: DiverseConfig, init: str, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self._counts = tuple(group.num_experts for group in config.groups)
        for place, group in enumerate(config.groups):
            self.add_module(str(place), make_experts(group, init, device, dtype))

    @property
    def groups(self) -> tuple[FactorizedExperts, ...]:
        """The experts of each size."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        """N, as a list of experts has it."""
        return self.config.num_experts

    def __getitem__(self, place: int) -> Callable[[Tensor], Tensor]:
        """One expert, to be called with rows (..., in).

        Raises:
            IndexError: no such expert.
        """
        number, count = as_index(place), len(self)
        if not -count <= number < count:
            raise IndexError(f"expert must be in [0, {count}); got {place}.")
        number %= count
        for group in self.groups:
            if number < len(group):
                return group[number]
            number -= len(group)
        raise AssertionError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs, weighted by the router.

        Args:
            hidden_states: (..., in), in the layers' dtype.
            top_k_index: (..., k) numbers of the experts that the router chose.
            top_k_weights: (..., k) their weights, in any floating-point dtype.

        Returns:
            (..., out), in the dtype of the input.

        Raises:
            ShapeError: indices or weights that do not fit the input.
        """
        batch_shape, k = check_choices(hidden_states, top_k_index, top_k_weights)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        made: Tensor = send_by_size(
            self._run,
            rows,
            top_k_index.reshape(-1, k),
            top_k_weights.reshape(-1, k),
            self._counts,
            BACKEND,
            self._dispatch(rows),
        )
        return made.reshape(*batch_shape, made.shape[-1])

    def _run(self, place: int, rows: Tensor, given: OneExpert) -> Tensor:
        return self.groups[place].sized(rows, given)

    def _dispatch(self, rows: Tensor) -> Dispatch:
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        traced = is_traced(rows)
        # exported models stay with operations that every runtime knows, and transformations with
        # those that they know how to map
        grouped = not traced or (compiled and type(rows) is Tensor)
        return self.config.dispatch(len(rows), not traced and not rows.is_meta, grouped)
