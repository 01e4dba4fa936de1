"""Very many small experts, chosen by product routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any, ClassVar

from tensormoe._config import ACTIVATIONS, LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._resolve import Options
from tensormoe._validation import choice, positive_int, positive_ints
from tensormoe.backend import Array, Backend
from tensormoe.errors import RankError, ShapeError, SpecError
from tensormoe.factorizations import Dense, FactorizationLike
from tensormoe.gates import Across, OneExpert
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.mixtures._keys import Keys
from tensormoe.mixtures._neurons import DOWN, UP, run_networks, run_tables
from tensormoe.mixtures._parts import Parts, layers_of
from tensormoe.mixtures._product_cost import product_cost
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import ProductRoutes, Router, choose_product


@dataclass(frozen=True)
class ProductConfig(MixtureConfig):
    """A product-routed mixture without its arrays.

    Args:
        keys: how tokens choose experts.
        sizes: of a token, hidden units per expert, and of an output.
        top_k: experts per token and head.
        act_layer: name of the activation.
        factorized: the experts if their matrices are tensor networks over the levels; None for
            tables with a row per expert.

    Raises:
        SpecError: sizes or names that cannot be, more experts per head than there are, or
            factorized experts of other sizes.
    """

    keys: Keys
    sizes: tuple[int, int, int]
    top_k: int
    act_layer: str
    factorized: ExpertsConfig | None

    block: ClassVar[str] = "ProductMoE"

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", positive_int(self.top_k, "top_k"))
        sizes = positive_ints(self.sizes, "sizes", "layer")
        if len(sizes) != 3 or sizes[0] != self.keys.in_features:
            raise SpecError(
                "sizes must be those of a token, an expert's hidden layer and an output, the first "
                f"that of the keys, {self.keys.in_features}; got {sizes}."
            )
        object.__setattr__(self, "sizes", sizes)
        choice(self.act_layer, ACTIVATIONS, "act_layer", SpecError)
        if self.top_k > self.keys.num_experts:
            raise SpecError(
                f"top_k must be at most the {self.keys.num_experts} experts; got {self.top_k}. "
                "Lower it."
            )
        if self.factorized is None:
            return
        wanted = ("mlp", *self.sizes, self.keys.experts, self.act_layer, False)
        down = self.factorized.down
        found = (
            self.factorized.kind,
            self.factorized.in_features,
            self.factorized.hidden_features,
            self.factorized.out_features,
            down.experts,
            self.factorized.act_layer,
            down.bias,
        )
        if found != wanted:
            raise SpecError(f"factorized experts must be {wanted}; got {found}.")

    @property
    def in_features(self) -> int:
        return self.sizes[0]

    @property
    def hidden_features(self) -> int:
        """Hidden units per expert."""
        return self.sizes[1]

    @property
    def out_features(self) -> int:
        return self.sizes[2]

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        return {} if self.factorized is None else layers_of("experts", self.factorized)

    @cached_property
    def tables(self) -> Mapping[str, OwnArray]:
        """The tables by role, ``up_proj`` and ``down_proj``; empty for factorized experts."""
        if self.factorized is not None:
            return {}
        inner, hidden, outer = self.sizes
        # outputs of heads add up, and those of a head's experts are averaged
        down = 1.0 / sqrt(self.keys.heads * hidden)
        return {
            UP: OwnArray((self.keys.num_experts, hidden * inner), "uniform", 1.0 / sqrt(inner)),
            DOWN: OwnArray((self.keys.num_experts, hidden * outer), "uniform", down),
        }

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        tables = {f"experts.{role}.weight": table for role, table in self.tables.items()}
        return tables | self.keys.own

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        return self.keys.noise_shape(*tokens)

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[ProductRoutes, dict[str, Array]]:
        keys, backend = self.keys, parts.backend
        found = keys.with_noise(training, noise, backend)
        split = None if found is None else keys.split(found)
        logits = keys.logits(parts, x)
        return choose_product(keys.router, logits, self.top_k, noise=split, backend=backend), {}

    def run(self, parts: Parts, x: Array, routes: ProductRoutes) -> Array:
        backend, act = parts.backend, parts.acts(self.act_layer)
        index, weights = merged_choices(routes, backend)
        if self.factorized is None:

            def look_up(role: str, rows: Array) -> Array:
                return backend.take(parts.arrays[f"experts.{role}.weight"], rows, 0)

            return run_tables(look_up, None, act, self.hidden_features, x, index, weights, backend)

        def project(role: str, rows: Array, given: tuple[OneExpert, ...]) -> Array:
            return parts.call(f"experts.projections.{role}", rows, given)

        return run_networks(project, act, self.keys.experts, x, index, weights, backend)

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        lead = (*batch_shape, self.keys.heads)
        shapes = dict.fromkeys(("top_k_index", "top_k_weights"), (*lead, self.top_k))
        for name, shape in shapes.items():
            found = getattr(getattr(routes, name, None), "shape", None)
            if found is None or tuple(found) != shape:
                raise _stranger(name, shape, None if found is None else tuple(found))
        given = getattr(routes, "logits", ())
        found = tuple(tuple(each.shape) for each in given) if isinstance(given, tuple) else None
        wanted = tuple((*lead, size) for size in self.keys.experts)
        if found != wanted:
            raise _stranger("logits", wanted, found)

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        return product_cost(
            self.keys,
            self.factorized,
            self.sizes,
            self.top_k,
            batch,
            itemsize=itemsize,
            library=library,
            training=training,
        )

    def arguments(self) -> str:
        inner, hidden, outer = self.sizes
        pair: object = "dense"
        if self.factorized is not None and self.factorized.up is not None:
            pair = self.factorized.up.factorization, self.factorized.down.factorization
        return (
            f"{inner}, {hidden}, {outer}, experts={self.keys.experts}, top_k={self.top_k}, "
            f"act_layer={self.act_layer!r}, factorization={pair!r}, {self.keys.arguments()}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "keys": self.keys.to_dict(),
            "sizes": list(self.sizes),
            "top_k": self.top_k,
            "act_layer": self.act_layer,
            "factorized": None if self.factorized is None else self.factorized.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProductConfig:
        fields = {"keys", "sizes", "top_k", "act_layer", "factorized"}
        found = dict(checked_fields(values, fields, "product-routed mixture"))
        experts = found["factorized"]
        found["keys"] = Keys.from_dict(found["keys"])
        found["factorized"] = None if experts is None else ExpertsConfig.from_dict(experts)
        return cls(**found)


def merged_choices(routes: ProductRoutes, backend: Backend) -> tuple[Array, Array]:
    """Numbers and weights (tokens, heads · k) of the experts of all heads."""
    tokens, heads, k = routes.top_k_index.shape
    index, weights = (
        backend.reshape(each, (tokens, heads * k))
        for each in (routes.top_k_index, routes.top_k_weights)
    )
    return index, weights


def _stranger(name: str, wanted: object, found: object) -> ShapeError:
    return ShapeError(
        f"routes must be the record of these tokens and this layer, with {name} of shape {wanted}; "
        f"got {found}. Pass what route(x) returned."
    )


def product_config(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None,
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
) -> ProductConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        GateError: a router that cannot be.
    """
    sizes = positive_ints(experts, "experts", "level")
    keys = Keys(
        in_features, sizes, heads, key_features, share_keys, query_norm, Router.parse(router)
    )
    hidden = 1 if hidden_features is None else positive_int(hidden_features, "hidden_features")
    outer = keys.in_features if out_features is None else out_features
    outer = positive_int(outer, "out_features")
    pair = factorization if isinstance(factorization, tuple) else (factorization,) * 2
    if len(pair) != 2:
        raise SpecError(
            f"factorization must be one, or one per layer; got {len(pair)}: {factorization!r}."
        )
    dense = [kind in ("dense", Dense) or isinstance(kind, Dense) for kind in pair]
    if any(dense) and not all(dense):
        raise SpecError(
            f"factorization must be dense for both layers or for none; got {factorization!r}."
        )
    factorized = None
    if not any(dense):
        layers = ((pair[0], keys.in_features, hidden), (pair[1], hidden, outer))
        up, down = (
            Options(sizes, kind, rank, None, False, None).layer(rows, columns).spec
            for kind, rows, columns in layers
        )
        factorized = ExpertsConfig("mlp", up, down, act_layer)
    elif rank is not None:
        raise RankError(
            f"rank must be None for dense experts, which have none; got {rank!r}. Name a "
            "factorization."
        )
    config = ProductConfig(keys, (keys.in_features, hidden, outer), top_k, act_layer, factorized)
    config.plan_ahead()
    return config
