"""The sparse mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import SparseConfig, sparse_config
from tensormoe.routing import Router
from tensormoe.selection import Budget
from tensormoe_numpy._random import checked_dtype, draw
from tensormoe_numpy.mixtures._base import MixtureLayer


class SparseMoE(MixtureLayer[SparseConfig]):
    """A sparse mixture of experts: a router sends each token to k of N experts; forward alone.

    ``y = Σ_k w_k(x) E_{n_k}(x)``, plus an expert that all tokens share if there is one
    (DeepSeekMoE). Train it in another framework, and open the checkpoint here.

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
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``; inputs must have it.
        seed: of the initial values.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``top_k`` above N.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> layer = SparseMoE(32, 64, experts=8, top_k=2, seed=0)
    >>> layer(np.ones((5, 32), "float32")).shape
    (5, 32)
    """

    _kind = "SparseMoE"
    _config_kind = SparseConfig

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
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
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
        self._hold(config, draw(config, checked_dtype(dtype), seed, init, self.backend))
