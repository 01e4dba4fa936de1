"""The soft mixture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tensormoe._layers import SoftMethods
from tensormoe.backend import Array
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import SoftConfig, counting_tokens, soft_config
from tensormoe.routing import SoftRoutes
from tensormoe.selection import Budget
from tensormoe_numpy._random import checked_dtype, checked_generator, draw
from tensormoe_numpy.mixtures._base import MixtureLayer


class SoftMoE(SoftMethods[Array], MixtureLayer[SoftConfig]):
    """A soft mixture of experts: experts run averages of tokens; forward alone.

    With logits ``L = X Φ`` of the tokens X of a set, every expert runs p slots, the averages
    ``softmax_tokens(L)ᵀ X``, and an output is the average ``softmax_slots(L) Y`` of all slots'
    outputs Y (Puigcerver et al. 2024). Nothing is dropped, and all experts have equal loads.

    It mixes tokens: inputs are sets (..., tokens, in), and an output depends on all tokens of its
    set, on padding too unless a ``mask`` leaves it out. A model that predicts the next token must
    not use it.

    Train it in another framework, and open the checkpoint here.

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
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``; inputs must have it.
        seed: of the initial values.

    Raises:
        SpecError: sizes, names or options that cannot be, or ``causal``.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> layer = SoftMoE(32, 64, experts=8, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 7, 32)).astype("float32")
    >>> layer(x).shape, layer.select(x, 2).shape
    ((5, 7, 32), (5, 7, 32))
    """

    _kind = "SoftMoE"
    _config_kind = SoftConfig

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
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
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
        self._hold(config, draw(config, checked_dtype(dtype), seed, init, self.backend))

    def route(self, x: Array, mask: Array | None = None) -> SoftRoutes:
        """The routing record of sets of tokens, as outside training: dispatch and combine weights.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.

        Raises:
            BackendError, ShapeError: input or mask do not fit.
            GateError: logits are NaN.
        """
        batch_shape, rows = self._rows(x)
        rows, counts = counting_tokens(rows, mask, batch_shape, self.backend)
        routes, _ = self.config.route(self._parts, rows, mask=counts)
        return routes.reshaped(batch_shape, self.backend)

    def __call__(
        self, x: Array, routes: SoftRoutes | None = None, *, mask: Array | None = None
    ) -> Array:
        """Run the mixture: (..., tokens, in) → (..., tokens, out).

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.

        Raises:
            BackendError, ShapeError: input, mask or record do not fit.
            GateError: logits are NaN.
        """
        batch_shape, rows, routes = self._routed(x, routes, mask)
        y = self.config.run(self._parts, rows, routes)
        return y.reshape(*batch_shape, self.config.out_features)

    def select(
        self,
        x: Array,
        k: int,
        routes: SoftRoutes | None = None,
        *,
        mask: Array | None = None,
        random: int | np.random.Generator | None = None,
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
            random: for a control: a seed or a generator that draws k experts per set instead.

        Returns:
            (..., tokens, out).

        Raises:
            BackendError, ShapeError: input, mask or record do not fit.
            GateError: k is out of range.
        """
        batch_shape, rows, routes = self._routed(x, routes, mask)
        scores = None
        if random is not None:
            shape = rows.shape[0], self.config.num_experts
            scores = self.backend.from_host(checked_generator(random).random(shape))
        y = self.config.select(self._parts, rows, routes, k, scores)
        return y.reshape(*batch_shape, self.config.out_features)

    def _routed(
        self, x: Array, routes: SoftRoutes | None, mask: Array | None
    ) -> tuple[tuple[int, ...], Array, SoftRoutes]:
        """The leading shape, tokens (sets, tokens, in) and their record."""
        batch_shape, rows = self._rows(x)
        rows, counts = counting_tokens(rows, mask, batch_shape, self.backend)
        if routes is None:
            return batch_shape, rows, self.config.route(self._parts, rows, mask=counts)[0]
        self.config.check_routes(routes, batch_shape)
        return batch_shape, rows, routes.reshaped(rows.shape[:-1], self.backend)
