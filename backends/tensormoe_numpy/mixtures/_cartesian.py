"""The Cartesian product of experts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import CartesianConfig, cartesian_config
from tensormoe.routing import Router
from tensormoe.selection import Budget
from tensormoe_numpy._random import checked_dtype, draw
from tensormoe_numpy.mixtures._base import MixtureLayer


class CartesianMoE(MixtureLayer[CartesianConfig]):
    """A Cartesian product of experts: N sub-experts, then N more on their outputs; forward alone.

    ``m = A(x)``, ``y = m + B(norm(x + m))``, with two sparse mixtures A and B of N sub-experts each
    (CartesianMoE, Su et al. 2025): k of N in each, and N² compositions, of which those with a
    common sub-expert share what it knows. The output is added to the residual stream, as that of
    an MLP. Experts are dense, or all matrices of a role are one tensor network.

    Train it in another framework, and open the checkpoint here.

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
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``; inputs must have it.
        seed: of the initial values.

    Raises:
        SpecError: sizes, names or options that cannot be, or outputs of another size.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> layer = CartesianMoE(32, 64, experts=8, top_k=2, seed=0)
    >>> layer(np.ones((5, 32), "float32")).shape
    (5, 32)
    """

    _kind = "CartesianMoE"
    _config_kind = CartesianConfig

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
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
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
        self._hold(config, draw(config, checked_dtype(dtype), seed, init, self.backend))
