"""Sparse mixture of experts: a router sends each token to k of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._validation import flag, positive_int
from tensormoe.backend import Array
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional._dtypes import widened
from tensormoe.gates import Across
from tensormoe.mixtures._cost import experts_cost, mixing_cost, router_cost
from tensormoe.mixtures._experts import ExpertsConfig, experts_config
from tensormoe.mixtures._groups import checked_groups, grouped_index
from tensormoe.mixtures._parts import (
    Parts,
    check_routes,
    layers_of,
    run_routed,
    run_shared,
    with_shared,
)
from tensormoe.mixtures._routing import route_tokens, router_arrays
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import Router, Routes
from tensormoe.routing._routes import scores_of
from tensormoe.selection import Budget

PER_CHOICE = ("projection", "bias", "choice_bias")
"""Arrays of a router whose last axis is that of its outputs."""


@dataclass(frozen=True)
class SparseConfig(MixtureConfig):
    """A sparse mixture without its arrays.

    Args:
        experts: the experts that are chosen from.
        top_k: experts per token.
        router: rule by which they are chosen.
        shared: the expert that every token runs besides, or None (DeepSeekMoE).
        mix_shared: whether a softmax of two logits weights the sum of the chosen experts and the
            shared expert (CartesianMoE).
        groups: where experts were merged, the expert behind each of the router's outputs; None
            where each output has its own.

    Raises:
        SpecError: more experts per token than there are, a shared expert of other sizes, none to
            mix, or groups that are not of these experts.
    """

    experts: ExpertsConfig
    top_k: int
    router: Router
    shared: ExpertsConfig | None
    mix_shared: bool = False
    groups: tuple[int, ...] | None = None

    block: ClassVar[str] = "SparseMoE"

    def __post_init__(self) -> None:
        if self.groups is not None:
            checked = checked_groups(self.groups, self.experts.num_experts)
            object.__setattr__(self, "groups", checked)
        k, count = positive_int(self.top_k, "top_k"), self.num_choices
        object.__setattr__(self, "top_k", k)
        if k > count:
            raise SpecError(f"top_k must be at most the {count} experts; got {k}. Lower it.")
        flag(self.mix_shared, "mix_shared")
        if self.shared is None:
            if self.mix_shared:
                raise SpecError(
                    "mix_shared must be False without a shared expert; got True. Give it a size, "
                    "shared_features=…."
                )
            return
        sizes = self.in_features, self.out_features
        found = self.shared.in_features, self.shared.out_features
        if sizes != found or self.shared.num_experts != 1:
            raise SpecError(
                f"shared must be one expert {sizes[0]} → {sizes[1]}, as wide as is wanted; got "
                f"{self.shared.num_experts} of {found[0]} → {found[1]}."
            )

    @property
    def num_choices(self) -> int:
        """Outputs of the router: N, or more where several of them share an expert."""
        return self.experts.num_experts if self.groups is None else len(self.groups)

    @property
    def in_features(self) -> int:
        return self.experts.in_features

    @property
    def out_features(self) -> int:
        return self.experts.out_features

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        found = layers_of("experts", self.experts)
        return found if self.shared is None else found | layers_of("shared", self.shared)

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        arrays = router_arrays(self.router, self.in_features, self.num_choices)
        if self.mix_shared:
            span = 1.0 / sqrt(self.in_features)
            arrays["router.mixing"] = OwnArray((self.in_features, 2), "uniform", span)
            arrays["router.mixing_bias"] = OwnArray((2,))
        return arrays

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        balanced = self.router.balance > 0
        return {"router.choice_bias": (self.num_choices,)} if balanced else {}

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        return (*tokens, self.num_choices) if self.router.noise else None

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Routes, dict[str, Array]]:
        routes, changed = route_tokens(
            self.router, self.top_k, parts, "router", x, training, noise, across
        )
        if self.mix_shared:
            backend = parts.backend
            projection, bias = (
                widened(parts.arrays[name], backend)
                for name in ("router.mixing", "router.mixing_bias")
            )
            logits = backend.matmul(widened(x, backend), projection) + bias
            routes = replace(routes, mixing=scores_of(Router(), logits, backend))
        return routes, changed

    def run(self, parts: Parts, x: Array, routes: Routes) -> Array:
        index, weights = routes.top_k_index, routes.top_k_weights
        if self.groups is not None:
            index = grouped_index(index, self.groups, parts.backend)
        y = run_routed(self.experts, parts, "experts", x, index, weights)
        if self.shared is None:
            return y
        return with_shared(
            y, run_shared(self.shared, parts, "shared", x), routes.mixing, parts.backend
        )

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        check_routes(routes, batch_shape, self.num_choices, self.top_k, mixed=self.mix_shared)

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        options: Any = {"itemsize": itemsize, "library": library, "training": training}
        cost = router_cost(
            self.in_features, self.num_choices, self.top_k, batch, bias=self.router.bias, **options
        )
        cost = cost.then(experts_cost(self.experts, batch, self.top_k, **options))
        if self.shared is not None:
            cost = cost.then(experts_cost(self.shared, batch, 1, **options))
        if self.mix_shared:
            sizes = self.in_features, self.out_features
            cost = cost.then(mixing_cost(*sizes, batch, itemsize=itemsize, training=training))
        return cost

    def arguments(self) -> str:
        shared = None if self.shared is None else self.shared.hidden_features
        return (
            f"{self.experts.arguments()}, top_k={self.top_k}, router={self.router!r}, "
            f"shared_features={shared}, mix_shared={self.mix_shared}"
            f"{'' if self.groups is None else f', groups={self.groups}'}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "experts": self.experts.to_dict(),
            "top_k": self.top_k,
            "router": self.router.to_dict(),
            "shared": None if self.shared is None else self.shared.to_dict(),
            "mix_shared": self.mix_shared,
            "groups": None if self.groups is None else list(self.groups),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        fields = {"experts", "top_k", "router", "shared", "mix_shared", "groups"}
        found = checked_fields(values, fields, "sparse mixture")
        shared = found["shared"]
        return cls(
            ExpertsConfig.from_dict(found["experts"]),
            found["top_k"],
            Router.from_dict(found["router"]),
            None if shared is None else ExpertsConfig.from_dict(shared),
            found["mix_shared"],
            found["groups"],
        )


def sparse_config(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None,
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
) -> SparseConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> config = sparse_config(
    ...     32, 64, None, experts=8, top_k=2, factorization="cp", budget=10_000
    ... )
    >>> config.experts.up.factorization, config.num_parameters
    (CP(rank=38), 9968)
    """
    options: Any = {"kind": kind, "act_layer": act_layer, "bias": bias}
    rule = Router.parse(router)
    shared, others = None, 0
    if shared_features is not None:
        width = positive_int(shared_features, "shared_features")
        if kind == "linear":
            raise SpecError(
                f"shared_features must be None for linear experts; got {shared_features}. Add a "
                "linear layer beside the mixture."
            )
        shared = experts_config(in_features, width, out_features, 1, **options)
        others = sum(layer.num_parameters for layer in shared.layers.values())
    rows = positive_int(in_features, "in_features") + rule.bias
    found = None if groups is None else checked_groups(groups, positive_int(experts, "experts"))
    built = experts_config(
        in_features,
        hidden_features,
        out_features,
        experts,
        factorization=factorization,
        rank=rank,
        budget=budget,
        router=rows * (positive_int(experts, "experts") if found is None else len(found))
        + (2 * (in_features + 1) if mix_shared else 0),
        others=others,
        **options,
    )
    config = SparseConfig(built, top_k, rule, shared, mix_shared, found)
    config.plan_ahead()
    return config
