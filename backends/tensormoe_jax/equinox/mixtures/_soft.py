"""The soft mixture."""

from __future__ import annotations

from typing import Any, ClassVar

from equinox.nn import State
from jax import Array

from tensormoe._layers import SoftMethods
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import MixtureConfig, SoftConfig, soft_config
from tensormoe.routing import SoftRoutes
from tensormoe.selection import Budget
from tensormoe_jax._soft import route_soft, run_soft, select_soft
from tensormoe_jax.equinox.mixtures._base import MixtureModule


class SoftMoE(SoftMethods[Array], MixtureModule[SoftConfig]):
    """A soft mixture of experts (Puigcerver et al. 2024): experts run averages of tokens.

    With logits ``L = X Φ`` of the tokens X of a set, every expert runs p slots, the averages
    ``softmax_tokens(L)ᵀ X``, and an output is the average ``softmax_slots(L) Y`` of all slots'
    outputs Y. Nothing is dropped, all experts have equal loads, and everything is differentiable.

    It mixes tokens: inputs are sets (..., tokens, in), and an output depends on all tokens of its
    set, on padding too unless a ``mask`` leaves it out. A model that predicts the next token must
    not use it.

    Args:
        in_features: size of a token.
        hidden_features: size between the layers of an expert; None for ``kind="linear"``.
        out_features: size of an output; ``in_features`` by default.
        experts: N.
        slots: p, the averages of tokens that each expert runs, per set.
        kind: "mlp" (``D act(U x)``), "swiglu" (``D(act(G x) · U x)``) or "linear".
        act_layer: name of the activation; "gelu" for "mlp" and "silu" for "swiglu" by default.
        bias: whether experts have biases.
        factorization: "dense", or a value or name for both layers of the experts, or a pair.
        rank: bond sizes of both, with a name. Without one, a named factorization gets the rank
            whose factors have the parameters of one expert's linear layer.
        budget: parameters of all that is built instead of a rank, experts and router: a number, or
            a ``Budget(parameters=…)``, whose ``gate=False`` leaves the router out.
        normalize: whether tokens and the columns of Φ have length one in the logits, times a scale
            that is learned and starts at 1.
        noise: standard deviation of the normal noise that is added to logits in training.
        causal: must be False: a soft mixture cannot be causal, and ``True`` says what to use.
        init: ``"variance"`` or ``"paper"``, of every layer.
        dtype: of the parameters; inputs must have it. Logits and weights are float32 at least.
        router_dtype: of the router's parameters: ``dtype`` for None, or float32 beside factors of
            16 bits.
        key: of ``jax.random``.

    Raises:
        SpecError: sizes, names or options that cannot be, or ``causal``.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> import jax, jax.numpy as jnp
    >>> layer = SoftMoE(32, 64, experts=8, key=jax.random.key(0))
    >>> layer(jnp.ones((5, 7, 32))).shape, layer.select(jnp.ones((5, 7, 32)), 2).shape
    ((5, 7, 32), (5, 7, 32))
    """

    _kind: ClassVar[str] = "SoftMoE"
    _config_kind: ClassVar[type[MixtureConfig]] = SoftConfig

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        experts: int,
        slots: int = 1,
        kind: str = "mlp",
        act_layer: str | None = None,
        bias: bool = False,
        factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "dense",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | None = None,
        normalize: bool = True,
        noise: float = 0.0,
        causal: bool = False,
        init: str = "variance",
        dtype: Any = None,
        router_dtype: Any = None,
        key: Array,
    ) -> None:
        config = soft_config(
            in_features,
            hidden_features,
            out_features,
            experts=experts,
            slots=slots,
            kind=kind,
            act_layer=act_layer,
            bias=bias,
            factorization=factorization,
            rank=rank,
            budget=budget,
            normalize=normalize,
            noise=noise,
            causal=causal,
        )
        self._start(config, init, dtype, router_dtype, key)

    def route(
        self,
        x: Array,
        state: State | None = None,
        *,
        mask: Array | None = None,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """The routing record of sets of tokens, and the state if one was given.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.
            state: handed through, as a soft mixture keeps no buffers.
            key: what noise is drawn by, in training.
            inference: takes the place of the attribute.

        Raises:
            BackendError, ShapeError: input or mask do not fit.
            SpecError: noise is to be drawn, and there is no key.
        """
        training = not (self.inference if inference is None else inference)
        routes = route_soft(self.config, self.arrays, x, mask, training=training, key=key)
        return routes if state is None else (routes, state)

    def __call__(
        self,
        x: Array,
        routes: SoftRoutes | None = None,
        state: State | None = None,
        *,
        mask: Array | None = None,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """Run the mixture: (..., tokens, in) → (..., tokens, out), and the state if one was given.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.
            state: as for :meth:`route`.
            key: as for :meth:`route`.
            inference: takes the place of the attribute.

        Raises:
            BackendError, ShapeError: input, mask or record do not fit.
        """
        if routes is None:
            routes = self.route(x, mask=mask, key=key, inference=inference)
        y = run_soft(self.config, self.arrays, x, routes, mask)
        return y if state is None else (y, state)

    def select(
        self,
        x: Array,
        k: int,
        routes: SoftRoutes | None = None,
        *,
        mask: Array | None = None,
        random: Array | None = None,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Array:
        """Run the experts alone that a set of tokens uses most (Chung et al. 2025).

        Per set, the k experts with the largest sum of combine weights are run; combine weights stay
        as they are. With all experts it is the full call.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            k: experts to run, from 1 to N.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.
            random: for a control: a key of ``jax.random`` that draws k experts per set
                instead.
            key: as for :meth:`route`.
            inference: takes the place of the attribute.

        Returns:
            (..., tokens, out).

        Raises:
            BackendError, ShapeError: input, mask or record do not fit.
            GateError: k is out of range.
        """
        if routes is None:
            routes = self.route(x, mask=mask, key=key, inference=inference)
        return select_soft(self.config, self.arrays, x, k, routes, mask, random)
