"""Experts that are composed of two halves, one per level, of which there are √N each (Monet).

It is a mixture and not a factorization: a factorization is one network that is linear in the
input, and here the activation stands between the halves of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from tensormoe._config import ACTIVATIONS, LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._spec import LayerSpec
from tensormoe._validation import choice, flag, positive_int, positive_ints
from tensormoe.backend import Array
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Dense
from tensormoe.gates import Across
from tensormoe.mixtures._halves import run_horizontal, run_vertical
from tensormoe.mixtures._keys import Keys
from tensormoe.mixtures._monet_cost import monet_cost
from tensormoe.mixtures._parts import Parts
from tensormoe.mixtures._parts import check_routes as check_level
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import LevelRoutes, Router, choose_levels

KINDS = ("horizontal", "vertical")
"""Ways to cut experts into halves."""


@dataclass(frozen=True)
class MonetConfig(MixtureConfig):
    """A mixture of composed experts without its arrays.

    Args:
        keys: how tokens choose halves; its two levels are the numbers of halves.
        sizes: of a token, hidden units per expert, and of an output.
        top_k: halves of each kind per token and head.
        kind: "horizontal" or "vertical".
        act_layer: name of the activation.
        bias: whether experts have biases.

    Raises:
        SpecError: sizes or names that cannot be.
    """

    keys: Keys
    sizes: tuple[int, int, int]
    top_k: int
    kind: str
    act_layer: str
    bias: bool

    block: ClassVar[str] = "MonetMoE"

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", positive_int(self.top_k, "top_k"))
        choice(self.kind, KINDS, "kind", SpecError)
        choice(self.act_layer, ACTIVATIONS, "act_layer", SpecError)
        flag(self.bias, "bias")
        if self.keys.levels != 2:
            raise SpecError(
                "experts must be two numbers, of each kind of halves; got "
                f"{self.keys.experts}. Give one number for both, or a pair."
            )
        if self.top_k > max(self.keys.experts):
            raise SpecError(
                f"top_k must be at most the halves of a kind, {self.keys.experts}; got "
                f"{self.top_k}. Lower it."
            )
        sizes = positive_ints(self.sizes, "sizes", "layer")
        if len(sizes) != 3 or sizes[0] != self.keys.in_features:
            raise SpecError(
                "sizes must be those of a token, an expert's hidden layer and an output, the first "
                f"that of the keys, {self.keys.in_features}; got {sizes}."
            )
        if self.kind == "vertical" and min(sizes[1:]) < 2:
            raise SpecError(
                "hidden_features and out_features must be at least 2 to be cut into left and "
                f"right; got {sizes[1]} and {sizes[2]}. Use kind='horizontal'."
            )
        object.__setattr__(self, "sizes", sizes)

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

    @property
    def num_experts(self) -> int:
        """Product of the numbers of halves."""
        return self.keys.num_experts

    @property
    def hidden_halves(self) -> tuple[int, int]:
        """Hidden units of the left and of the right half of a vertical expert."""
        right = self.hidden_features // 2
        return self.hidden_features - right, right

    @property
    def out_halves(self) -> tuple[int, int]:
        """Outputs of the left and of the right half of a vertical expert."""
        right = self.out_features // 2
        return self.out_features - right, right

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        inner, hidden, outer = self.sizes
        first, second = self.keys.experts
        if self.kind == "horizontal":
            sizes = {
                "bottom.up_proj": (inner, first * hidden),
                "top.down_proj": (second * hidden, outer),
            }
        else:
            (left, right), (out_left, out_right) = self.hidden_halves, self.out_halves
            sizes = {
                "left.up_proj": (inner, first * left),
                "left.down_proj": (first * left, out_left),
                "left.cross_proj": (first * right, out_left),
                "right.up_proj": (inner, second * right),
                "right.down_proj": (second * right, out_right),
                "right.cross_proj": (second * left, out_right),
            }
        return {
            name: LayerConfig(
                LayerSpec(rows, columns, 1, Dense(), self.bias and name.endswith("up_proj")), None
            )
            for name, (rows, columns) in sizes.items()
        }

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        arrays: dict[str, OwnArray] = {}
        if self.bias and self.kind == "horizontal":
            arrays["top.bias"] = OwnArray((self.keys.experts[1], self.out_features))
        elif self.bias:
            for name, count, width in zip(
                ("left", "right"), self.keys.experts, self.out_halves, strict=True
            ):
                arrays[f"{name}.bias"] = OwnArray((count, width))
        return arrays | self.keys.own

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
    ) -> tuple[LevelRoutes, dict[str, Array]]:
        keys, backend = self.keys, parts.backend
        found = keys.with_noise(training, noise, backend)
        split = None if found is None else keys.split(found)
        logits = keys.logits(parts, x)
        return choose_levels(keys.router, logits, self.top_k, noise=split, backend=backend), {}

    def run(self, parts: Parts, x: Array, routes: LevelRoutes) -> Array:
        act = parts.acts(self.act_layer)
        if self.kind == "horizontal":
            return run_horizontal(parts, act, x, routes)
        return run_vertical(parts, act, x, routes)

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        levels = getattr(routes, "levels", None)
        if not isinstance(levels, tuple) or len(levels) != 2:
            raise ShapeError(
                "routes must be the record of these tokens and this layer, with two levels; got "
                f"{type(routes).__name__}. Pass what route(x) returned."
            )
        for level, size in zip(levels, self.keys.experts, strict=True):
            lead = (*batch_shape, self.keys.heads)
            check_level(level, lead, size, min(self.top_k, size))

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        return monet_cost(
            self.keys,
            self.layers,
            {name: array for name, array in self.own.items() if name not in self.keys.own},
            self.top_k,
            batch,
            itemsize=itemsize,
            library=library,
            training=training,
        )

    def arguments(self) -> str:
        inner, hidden, outer = self.sizes
        return (
            f"{inner}, {hidden}, {outer}, experts={self.keys.experts}, top_k={self.top_k}, "
            f"kind={self.kind!r}, act_layer={self.act_layer!r}, bias={self.bias}, "
            f"{self.keys.arguments()}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "keys": self.keys.to_dict(),
            "sizes": list(self.sizes),
            "top_k": self.top_k,
            "kind": self.kind,
            "act_layer": self.act_layer,
            "bias": self.bias,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MonetConfig:
        fields = {"keys", "sizes", "top_k", "kind", "act_layer", "bias"}
        found = dict(checked_fields(values, fields, "mixture of composed experts"))
        found["keys"] = Keys.from_dict(found["keys"])
        return cls(**found)


def monet_config(
    in_features: int,
    hidden_features: int,
    out_features: int | None,
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
) -> MonetConfig:
    """The configuration that constructors make of their arguments, planned already.

    Raises:
        SpecError: sizes, names or options that cannot be.
        GateError: a router that cannot be.
    """
    sizes = positive_ints(experts, "experts", "level")
    sizes = sizes * 2 if len(sizes) == 1 else sizes
    keys = Keys(
        in_features, sizes, heads, key_features, share_keys, query_norm, Router.parse(router)
    )
    hidden = positive_int(hidden_features, "hidden_features")
    outer = keys.in_features if out_features is None else out_features
    outer = positive_int(outer, "out_features")
    widths = (keys.in_features, hidden, outer)
    config = MonetConfig(keys, widths, top_k, kind, act_layer, bias)
    config.plan_ahead()
    return config
