"""The soft mixture as a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._layers import SoftMethods
from tensormoe.editing import scale_routes
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import Parts, SoftConfig, counting_tokens, soft_config
from tensormoe.routing import SoftRoutes
from tensormoe.selection import Budget
from tensormoe_torch._activations import ACTIVATIONS
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import no_autocast
from tensormoe_torch._checks import check_input
from tensormoe_torch._sharded import Copied
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures._base import MixtureModule, make_experts, reset_own


class SoftRouter(Copied):
    """Logits, and dispatch and combine weights: (..., tokens, in) to the routing record.

    Its parameters are ``projection`` (in, N, p), Φ, and, if logits are normalized, ``scale`` (1,).
    Logits and weights are float32 at least. A forward hook on this module sees the record of every
    call.

    Args:
        config: the mixture.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        config: the mixture.
        scaling: factors of an expert's slots in the outputs, by its number; contexts set it for a
            while.
    """

    # of the class, so that routers that were pickled before have it
    scaling: tuple[Mapping[int, float], ...] = ()

    def __init__(self, config: SoftConfig, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self._own = {name.partition(".")[2]: array for name, array in config.own.items()}
        for name, array in self._own.items():
            empty = torch.empty(array.shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: Φ normal with standard deviation 1/√in (LeCun), the scale 1."""
        reset_own(self, self._own)

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        config = self.config
        return (
            f"{config.in_features}, {config.num_experts}, slots={config.slots}, "
            f"normalize={config.normalize}, noise={config.noise}"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SoftRoutes:
        """The routing record of sets of tokens; in training, with noise of PyTorch's generator.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.

        Raises:
            BackendError, ShapeError: input or mask do not fit.
        """
        config = self.config
        x, projection = self._whole(x), self._whole(self.get_parameter("projection"))
        batch_shape = check_input(x, config.in_features, projection, narrower=True)
        rows = x.reshape(config.merged_shape(batch_shape))
        rows, counts = counting_tokens(rows, mask, batch_shape, BACKEND)
        held = {f"router.{name}": self._whole(getattr(self, name)) for name in self._own}
        shape = config.noise_shape(*rows.shape[:-1]) if self.training else None
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        noise = None
        if shape is not None:
            noise = self._agreed(torch.randn(shape, device=x.device, dtype=wide))
        with no_autocast(x.device.type):
            routes, _ = config.route(
                Parts(_no_layers, held, ACTIVATIONS.__getitem__, BACKEND),
                rows,
                training=self.training,
                noise=noise,
                mask=counts,
            )
        for factors in self.scaling:
            routes = scale_routes(routes, factors)
        return routes.reshaped(batch_shape, BACKEND) if len(batch_shape) != 2 else routes


class SoftMoE(SoftMethods[Tensor], MixtureModule[SoftConfig]):
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
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and weights are
            float32 at least.

    Attributes:
        router: the :class:`SoftRouter`; called with tokens, it gives their routing record.
        experts: the experts; their layers are in ``experts.projections``.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, or ``causal``.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> import torch
    >>> layer = SoftMoE(32, 64, experts=8)
    >>> x = torch.randn(5, 7, 32)
    >>> layer(x).shape, layer.select(x, 2).shape
    (torch.Size([5, 7, 32]), torch.Size([5, 7, 32]))
    >>> counts = torch.arange(7) < torch.tensor([[7], [3], [5], [1], [7]])
    >>> layer(x, mask=counts)[1, 3:].abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    _kind = "SoftMoE"
    _config_kind = SoftConfig

    router: SoftRouter
    experts: FactorizedExperts

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        self.experts = make_experts(self.config.experts, init, device, dtype)
        self.router = SoftRouter(self.config, device, dtype)

    def route(self, x: Tensor, mask: Tensor | None = None) -> SoftRoutes:
        """The routing record of sets of tokens: dispatch and combine weights.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.

        Raises:
            BackendError, ShapeError: input or mask do not fit.
        """
        routes: SoftRoutes = self.router(x, mask)
        return routes

    def forward(
        self, x: Tensor, routes: SoftRoutes | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Run the mixture: (..., tokens, in) → (..., tokens, out).

        Args:
            x: (..., tokens, in), in the mixture's dtype; under autocast, in any dtype that it
                narrows.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.

        Raises:
            BackendError, ShapeError: input, mask or record do not fit.
        """
        batch_shape, rows, routes = self._routed(x, routes, mask)
        y: Tensor = self.config.run(self._parts(), rows, routes)
        return y.reshape(*batch_shape, self.config.out_features)

    def select(
        self,
        x: Tensor,
        k: int,
        routes: SoftRoutes | None = None,
        *,
        mask: Tensor | None = None,
        random: torch.Generator | None = None,
    ) -> Tensor:
        """Run the experts alone that a set of tokens uses most (Chung et al. 2025).

        Per set, the k experts with the largest sum of combine weights are run; combine weights stay
        as they are. With all experts it is the full call.

        Args:
            x: (..., tokens, in), in the mixture's dtype.
            k: experts to run, from 1 to N.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            mask: booleans (..., tokens), which tokens count; all by default. The others have no
                part in any output, may be anything, and get zeros. A set without any is all zeros.
            random: for a control: a generator that draws k experts per set instead.

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
            drawn = torch.rand(shape, generator=random, device=random.device)
            scores = drawn.to(x.device)
        y: Tensor = self.config.select(self._parts(), rows, routes, k, scores, routed=self.experts)
        return y.reshape(*batch_shape, self.config.out_features)

    def _routed(
        self, x: Tensor, routes: SoftRoutes | None, mask: Tensor | None
    ) -> tuple[tuple[int, ...], Tensor, SoftRoutes]:
        """The leading shape, tokens (sets, tokens, in) and their record."""
        batch_shape, rows = self._rows(x)
        rows, counts = counting_tokens(rows, mask, batch_shape, BACKEND)
        if routes is None:
            return batch_shape, rows, self.router(rows, counts)
        self.config.check_routes(routes, batch_shape)
        return batch_shape, rows, routes.reshaped(tuple(rows.shape[:-1]), BACKEND)

    def _parts(self) -> Parts:
        experts = self.experts

        def call(name: str, x: Tensor, given: Any) -> Tensor:
            return experts.project(name.rpartition(".")[2], x, given)

        return Parts(call, {}, ACTIVATIONS.__getitem__, BACKEND)


def _no_layers(name: str, x: Tensor, given: object) -> Tensor:
    raise LookupError(f"a router runs no layer; got {name!r}.")
