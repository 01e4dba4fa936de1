"""Sparse mixture of experts of different sizes: a token runs k of them, each at its own price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._validation import brief, non_negative_int, positive_int
from tensormoe.backend import Array, Groups
from tensormoe.errors import PlanError, SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import Across, OneExpert
from tensormoe.mixtures._by_size import Dispatch, send_by_size
from tensormoe.mixtures._cost import experts_cost, router_cost
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.mixtures._parts import Parts, check_routes, layers_of, run_all
from tensormoe.mixtures._routing import route_tokens, router_arrays
from tensormoe.mixtures._sizes import checked_sizes, sized_experts
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import Router, Routes
from tensormoe.selection import Budget

Pair = tuple[FactorizationLike, FactorizationLike]


@dataclass(frozen=True)
class DiverseConfig(MixtureConfig):
    """A mixture of experts of different sizes without its arrays.

    Args:
        groups: the experts of each hidden size. They are numbered group after group.
        top_k: experts per token.
        router: rule by which they are chosen.

    Raises:
        SpecError: more experts per token than there are, or groups that differ in more than the
            hidden size.
    """

    groups: tuple[ExpertsConfig, ...]
    top_k: int
    router: Router

    block: ClassVar[str] = "DiverseMoE"

    def __post_init__(self) -> None:
        if not self.groups:
            raise SpecError("groups must hold at least one size of experts; got none.")
        common = {
            (group.in_features, group.out_features, group.kind, group.act_layer, group.down.bias)
            for group in self.groups
        }
        if len(common) > 1 or any(group.up is None for group in self.groups):
            raise SpecError(
                "groups of experts must have two layers and differ in their hidden sizes alone; "
                f"got {brief(self.groups)}."
            )
        if len({group.hidden_features for group in self.groups}) < len(self.groups):
            raise SpecError(
                "groups must have different hidden sizes; got "
                f"{[group.hidden_features for group in self.groups]}. Make one of equal ones."
            )
        k, count = positive_int(self.top_k, "top_k"), self.num_experts
        object.__setattr__(self, "top_k", k)
        if k > count:
            raise SpecError(f"top_k must be at most the {count} experts; got {k}. Lower it.")

    @property
    def in_features(self) -> int:
        return self.groups[0].in_features

    @property
    def out_features(self) -> int:
        return self.groups[0].out_features

    @property
    def num_experts(self) -> int:
        """N, of all sizes."""
        return sum(group.num_experts for group in self.groups)

    @property
    def hidden_features(self) -> tuple[int, ...]:
        """Hidden size of every expert."""
        return tuple(
            size for group in self.groups for size in (group.down.in_features,) * group.num_experts
        )

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        return {
            name: layer
            for place, group in enumerate(self.groups)
            for name, layer in layers_of(f"experts.{place}", group).items()
        }

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        return router_arrays(self.router, self.in_features, self.num_experts)

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"router.choice_bias": (self.num_experts,)} if self.router.balance > 0 else {}

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        return (*tokens, self.num_experts) if self.router.noise else None

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Routes, dict[str, Array]]:
        return route_tokens(self.router, self.top_k, parts, "router", x, training, noise, across)

    def run(self, parts: Parts, x: Array, routes: Routes) -> Array:
        backend = parts.backend

        def one_size(place: int, rows: Array, given: OneExpert) -> Array:
            return run_all(self.groups[place], parts, f"experts.{place}", rows, given)

        index = routes.top_k_index
        return send_by_size(
            one_size,
            x,
            index,
            routes.top_k_weights,
            [group.num_experts for group in self.groups],
            backend,
            self.dispatch(index.shape[0], parts.reads, isinstance(backend, Groups)),
        )

    def dispatch(self, tokens: int, reads: bool, grouped: bool) -> Dispatch:
        """Way in which the choices of so many tokens are sent.

        Args:
            tokens: their number.
            reads: whether values of arrays can be read.
            grouped: whether products can be grouped by expert.
        """
        rows = tokens * self.top_k
        gains = reads or any(group.sorts(rows) for group in self.groups)
        return Dispatch(reads, grouped and gains)

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        check_routes(routes, batch_shape, self.num_experts, self.top_k)

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
        loads: Sequence[int] | None = None,
    ) -> Cost:
        """Cost of one call for ``batch`` tokens, the router included.

        Args:
            batch: number of tokens, all leading axes multiplied.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.
            training: forward and backward with all gradients, instead of forward alone.
            loads: choices that fall on each group. By default all experts have equal loads, to
                within a row, and so groups have loads in proportion to their numbers of experts.

        Raises:
            PlanError: the batch is not a size, or loads that are not those of so many tokens.
        """
        choices = non_negative_int(batch, "batch", PlanError) * self.top_k
        counts = self.even_loads(batch) if loads is None else tuple(loads)
        if len(counts) != len(self.groups) or min(counts) < 0 or sum(counts) != choices:
            raise PlanError(
                f"loads must be choices of each of the {len(self.groups)} sizes, {choices} in all; "
                f"got {brief(loads)}. Leave them out for equal loads of all experts."
            )
        options: Any = {"itemsize": itemsize, "library": library, "training": training}
        total = router_cost(
            self.in_features, self.num_experts, self.top_k, batch, bias=self.router.bias, **options
        )
        peak, held = total.peak_memory, total.saved_memory
        for group, rows in zip(self.groups, counts, strict=True):
            run = experts_cost(group, rows, 1, named=True, **options)
            peak = max(peak, held + run.peak_memory)
            # outputs of a size wait for those of the others
            held += run.saved_memory + itemsize * rows * self.out_features
            total = total.then(run)
        # side by side, and weighted
        behind = 2 * itemsize * batch * self.top_k * self.out_features
        return replace(total, peak_memory=max(peak, held + behind))

    def even_loads(self, batch: int) -> tuple[int, ...]:
        """Choices of ``batch`` tokens that fall on each group where all experts have equal loads.

        >>> diverse_config(8, (9, 9, 3), None, top_k=2).even_loads(6)
        (8, 4)
        """
        choices, count = batch * self.top_k, self.num_experts
        ends, seen = [0], 0
        for group in self.groups:
            seen += group.num_experts
            ends.append(choices * seen // count)
        return tuple(stop - start for start, stop in pairwise(ends))

    def arguments(self) -> str:
        first = self.groups[0]
        pairs = tuple(group.factorizations for group in self.groups)
        options = {
            "experts": self.num_experts,
            "top_k": self.top_k,
            "kind": first.kind,
            "act_layer": first.act_layer,
            "bias": first.down.bias,
            "factorization": pairs[0] if len({*pairs}) == 1 else pairs,
            "router": self.router,
        }
        sizes = self.in_features, self.hidden_features, self.out_features
        named = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{', '.join(map(repr, sizes))}, {named}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "groups": [group.to_dict() for group in self.groups],
            "top_k": self.top_k,
            "router": self.router.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiverseConfig:
        found = checked_fields(values, {"groups", "top_k", "router"}, "mixture of diverse experts")
        groups = found["groups"]
        if not isinstance(groups, list | tuple):
            raise SpecError(f"groups must be a list with one entry per size; got {brief(groups)}.")
        return cls(
            tuple(map(ExpertsConfig.from_dict, groups)),
            found["top_k"],
            Router.from_dict(found["router"]),
        )


def diverse_config(
    in_features: int,
    hidden_features: int | Sequence[int],
    out_features: int | None,
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
) -> DiverseConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a router that cannot be.

    >>> config = diverse_config(32, 64, None, experts=4, top_k=2)
    >>> config.hidden_features, [group.num_experts for group in config.groups]
    ((96, 80, 48, 32), [1, 1, 1, 1])
    """
    sizes = checked_sizes(hidden_features, experts, spread)
    rule = Router.parse(router)
    rows = positive_int(in_features, "in_features") + rule.bias
    groups = sized_experts(
        in_features,
        [(size, len([*same])) for size, same in groupby(sizes)],
        out_features,
        kind=kind,
        act_layer=act_layer,
        bias=bias,
        factorization=factorization,
        rank=rank,
        budget=budget,
        router=rows * len(sizes),
    )
    config = DiverseConfig(groups, top_k, rule)
    config.plan_ahead()
    return config
