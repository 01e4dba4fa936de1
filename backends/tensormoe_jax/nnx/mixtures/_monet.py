"""Experts that are composed of halves."""

from __future__ import annotations

from typing import Any

from tensormoe.mixtures import MonetConfig, monet_config
from tensormoe.routing import Router
from tensormoe_jax.nnx._rngs import Source
from tensormoe_jax.nnx.mixtures._base import MixtureModule


class MonetMoE(MixtureModule[MonetConfig]):
    """N₁ · N₂ experts composed of N₁ and N₂ halves (Monet, Park et al. 2025).

    Expert (i, j) has weight ``Σ_heads g¹_i(x) g²_j(x)``, so that the sums over i and over j come
    apart and all experts cost what the halves do. ``"horizontal"``: ``E_ij(x) = V_j act(U_i x)``,
    a lower layer i and an upper layer j. ``"vertical"``: the hidden units and the outputs of an
    expert are cut into left halves, which are i's, and right ones, which are j's.

    Args:
        in_features: size of a token.
        hidden_features: hidden units per expert.
        out_features: size of an output; ``in_features`` by default.
        experts: halves of each kind: 512 for 262,144 experts, or a pair.
        top_k: halves of each kind per head; all of a kind of fewer.
        heads: choices per token.
        kind: "horizontal" or "vertical".
        act_layer: name of the activation.
        bias: whether experts have biases.
        key_features: size of queries and sub-keys; None for logits that are projected from the
            token, as in the paper.
        share_keys: whether all heads have the same sub-keys.
        query_norm: whether each query is normalized to mean zero and variance one.
        router: a :class:`tensormoe.routing.Router` or the name of its scores, for each level.
        init: ``"variance"`` or ``"paper"``, of every layer.
        dtype: of the parameters; inputs must have it. Logits and scores are float32 at least.
        router_dtype: of the router's parameters: ``dtype`` for None, or float32 beside factors of
            16 bits.
        rngs: streams, a seed or a key: parameters are drawn by the stream ``params``, a router's
            noise by ``noise``.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``top_k`` above both kinds.
        GateError: a router that cannot be.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = MonetMoE(32, 4, experts=16, top_k=4, heads=2, rngs=0)
    >>> run = nnx.jit(lambda layer, x: layer(x))
    >>> run(layer, jnp.ones((5, 32))).shape
    (5, 32)
    """

    _kind = "MonetMoE"
    _config_kind = MonetConfig

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        experts: int | tuple[int, int],
        top_k: int,
        heads: int = 1,
        kind: str = "horizontal",
        act_layer: str = "gelu",
        bias: bool = True,
        key_features: int | None = None,
        share_keys: bool = True,
        query_norm: bool = True,
        router: Router | str = "softmax",
        init: str = "variance",
        dtype: Any = None,
        router_dtype: Any = None,
        rngs: Source,
    ) -> None:
        config = monet_config(
            in_features,
            hidden_features,
            out_features,
            experts=experts,
            top_k=top_k,
            heads=heads,
            kind=kind,
            act_layer=act_layer,
            bias=bias,
            key_features=key_features,
            share_keys=share_keys,
            query_norm=query_norm,
            router=router,
        )
        self._start(config, init, dtype, router_dtype, rngs)
