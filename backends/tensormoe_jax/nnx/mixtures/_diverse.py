"""The mixture of experts of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import DiverseConfig, diverse_config
from tensormoe.routing import Router
from tensormoe.selection import Budget
from tensormoe_jax.nnx._rngs import Source
from tensormoe_jax.nnx.mixtures._base import MixtureModule

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
        dtype: of the parameters; inputs must have it. Logits and scores are float32 at least.
        router_dtype: of the router's parameters: ``dtype`` for None, or float32 beside factors of
            16 bits.
        rngs: streams, a seed or a key: parameters are drawn by the stream ``params``, a router's
            noise by ``noise``.

    Raises:
        SpecError: sizes, names or options that cannot be, an odd number of experts to pair, or a
            ``top_k`` above N.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = DiverseMoE(32, 64, experts=8, top_k=2, rngs=0)
    >>> run = nnx.jit(lambda layer, x: layer(x))
    >>> run(layer, jnp.ones((5, 32))).shape
    (5, 32)
    """

    _kind = "DiverseMoE"
    _config_kind = DiverseConfig

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
        dtype: Any = None,
        router_dtype: Any = None,
        rngs: Source,
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
        self._start(config, init, dtype, router_dtype, rngs)
