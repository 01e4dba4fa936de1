"""Very many small experts."""

from __future__ import annotations

from typing import Any, ClassVar

from jax import Array

from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import MixtureConfig, ProductConfig, product_config
from tensormoe.routing import Router
from tensormoe_jax.equinox.mixtures._base import MixtureModule


class ProductMoE(MixtureModule[ProductConfig]):
    """Very many experts of one neuron each, found by product keys (PEER, He 2024).

    ``y = Σ_heads Σ_k w_k(x) act(u_kᵀ x) v_k``: each head has a query per level, scores the
    sub-keys of the level, and takes the k experts (i, j) of the largest sums of scores. A million
    experts in two levels cost two thousand scores. Their vectors are rows of tables, or entries of
    a tensor network over the levels, whose size grows with N₁ + N₂ instead of N₁ · N₂.

    Gradients of the tables are dense in JAX: they have N rows, whatever the batch. Factorize the
    experts if there are very many.

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
        init: ``"variance"`` or ``"paper"``, of factorized experts.
        dtype: of the parameters; inputs must have it. Logits and scores are float32 at least.
        router_dtype: of the router's parameters: ``dtype`` for None, or float32 beside factors of
            16 bits.
        key: of ``jax.random``.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``top_k`` above all experts.
        RankError: a rank that does not fit the factorization.
        GateError: a router that cannot be.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> key = jax.random.key(0)
    >>> layer = ProductMoE(32, experts=(20, 30), top_k=4, heads=2, key_features=8, key=key)
    >>> eqx.filter_jit(layer)(jnp.ones((5, 32))).shape
    (5, 32)
    """

    _kind: ClassVar[str] = "ProductMoE"
    _config_kind: ClassVar[type[MixtureConfig]] = ProductConfig

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
        init: str = "variance",
        dtype: Any = None,
        router_dtype: Any = None,
        key: Array,
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
        self._start(config, init, dtype, router_dtype, key)
