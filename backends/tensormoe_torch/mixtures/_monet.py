"""Experts that are composed of halves, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._mixture import OwnArray
from tensormoe.mixtures import MonetConfig, Parts, monet_config
from tensormoe.routing import LevelRoutes, Router
from tensormoe_torch._activations import ACTIVATIONS
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._checks import Given
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.mixtures._base import MixtureModule, reset_all, reset_own
from tensormoe_torch.mixtures._router import MixtureRouter


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
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and scores are
            float32 at least.

    Attributes:
        router: called with tokens, it gives their routing record.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, or a ``top_k`` above both kinds.
        GateError: a router that cannot be.

    >>> import torch
    >>> layer = MonetMoE(32, 4, experts=16, top_k=4, heads=2)
    >>> layer.config.num_experts, layer(torch.randn(5, 7, 32)).shape
    (256, torch.Size([5, 7, 32]))
    """

    _kind = "MonetMoE"
    _config_kind = MonetConfig

    router: MixtureRouter

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        config = self.config
        for name in dict.fromkeys(each.partition(".")[0] for each in config.layers):
            start = f"{name}."
            layers = {
                role.removeprefix(start): MuMoE.of(layer, init, device, dtype)
                for role, layer in config.layers.items()
                if role.startswith(start)
            }
            own = {
                each.removeprefix(start): array
                for each, array in config.own.items()
                if each.startswith(start)
            }
            self.add_module(name, Halves(layers, own, device, dtype))
        self.router = MixtureRouter(config, device, dtype)

    def route(self, x: Tensor) -> LevelRoutes:
        """The routing record of tokens (..., in): halves, weights and logits of each level.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        routes: LevelRoutes = self.router(x)
        return routes

    def forward(self, x: Tensor, routes: LevelRoutes | None = None) -> Tensor:
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
            routes = routes.reshaped(rows.shape[:-1], BACKEND)
        held = {
            name: self.get_parameter(name)
            for name in self.config.own
            if not name.startswith("router.")
        }
        parts = Parts(self._call, held, ACTIVATIONS.__getitem__, BACKEND)
        y: Tensor = self.config.run(parts, rows, routes)
        return y.reshape(*batch_shape, self.config.out_features)

    def _call(self, name: str, x: Tensor, given: Given) -> Tensor:
        made: Tensor = self.get_submodule(name)(x, given)
        return made


class Halves(nn.Module):
    """All halves of experts of one kind: layers, and arrays besides.

    Args:
        layers: by role.
        own: initial values of other parameters by name.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        layers: dict[str, MuMoE],
        own: dict[str, OwnArray],
        device: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._own = own
        for role, layer in layers.items():
            self.add_module(role, layer)
        for name, array in own.items():
            empty = torch.empty(array.shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self._reset_own()

    @torch.no_grad()
    def _reset_own(self) -> None:
        reset_own(self, self._own)

    def reset_parameters(self) -> None:
        """Draw the layers anew, and set biases to zero."""
        self._reset_own()
        for child in self.children():
            reset_all(child)
