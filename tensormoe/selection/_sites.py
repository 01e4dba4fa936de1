"""Descriptions of the layers of a model that factors can take the place of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensormoe._validation import brief, choice, flag, positive_int
from tensormoe.errors import SpecError

KINDS = ("linear", "mlp", "experts")
"""Kinds of layers: one linear layer, an MLP, a stack of experts behind a router."""


@dataclass(frozen=True)
class Projection:
    """One matrix of a layer, or the same matrix of all experts of a stack.

    Args:
        role: its name within the layer; empty for a linear layer.
        in_features: size of an input.
        out_features: size of an output.
        bias: whether it has a bias.
    """

    role: str
    in_features: int
    out_features: int
    bias: bool = False

    def __post_init__(self) -> None:
        _text(self.role, "role of a projection")
        put = object.__setattr__
        for name in ("in_features", "out_features"):
            put(self, name, positive_int(getattr(self, name), f"{name} of a projection"))
        flag(self.bias, "bias of a projection")

    @property
    def entries(self) -> int:
        """Weights and biases of one expert."""
        return (self.in_features + self.bias) * self.out_features


@dataclass(frozen=True)
class LayerSite:
    """A layer of a model that factors can take the place of: names and sizes, no arrays.

    Args:
        name: of the module in the model.
        kind: one of :data:`KINDS`.
        projections: its matrices, each of which gets a rank of its own.
        experts: N of a stack of experts; None for linear layers and MLPs, which become mixtures of
            as many experts as is asked for.
        itemsize: bytes per entry.

    Raises:
        SpecError: an unknown kind, no projections or two of one role, a number of experts where
            none belongs, or sizes that cannot be.

    >>> LayerSite.of_linear("head", 768, 10).parameters
    7690
    >>> mlp = LayerSite.of_mlp("layers.0.mlp", 4096, 14336, gated=True, bias=False)
    >>> [(each.role, each.in_features, each.out_features) for each in mlp.projections]
    [('first', 4096, 28672), ('second', 14336, 4096)]
    >>> LayerSite.of_experts("layers.0.experts", 8, 4096, 14336).parameters
    1409286144
    """

    name: str
    kind: str
    projections: tuple[Projection, ...]
    experts: int | None = None
    itemsize: int = 4

    def __post_init__(self) -> None:
        _text(self.name, "name of a layer")
        choice(self.kind, KINDS, "kind of a layer", SpecError)
        put = object.__setattr__
        listed = isinstance(self.projections, tuple | list)
        if not listed or not all(isinstance(each, Projection) for each in self.projections):
            raise SpecError(
                f"projections of {self.name!r} must be a tuple of Projection values; got "
                f"{brief(self.projections)}."
            )
        put(self, "projections", tuple(self.projections))
        roles = [each.role for each in self.projections]
        if not roles or len(set(roles)) < len(roles):
            raise SpecError(
                f"projections of {self.name!r} must be at least one, and of different roles; got "
                f"{roles!r}."
            )
        put(self, "itemsize", positive_int(self.itemsize, f"itemsize of {self.name!r}"))
        if (self.experts is None) == (self.kind == "experts"):
            raise SpecError(
                f"experts must be given for stacks of experts and for nothing else; got "
                f"{self.experts!r} for {self.name!r}, of kind {self.kind!r}."
            )
        if self.experts is not None:
            put(self, "experts", positive_int(self.experts, f"experts of {self.name!r}"))

    @classmethod
    def of_linear(
        cls, name: str, in_features: int, out_features: int, bias: bool = True, itemsize: int = 4
    ) -> LayerSite:
        """A linear layer."""
        made = Projection("", in_features, out_features, bias)
        return cls(name, "linear", (made,), itemsize=itemsize)

    @classmethod
    def of_mlp(
        cls,
        name: str,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        gated: bool = False,
        bias: bool = True,
        itemsize: int = 4,
    ) -> LayerSite:
        """An MLP of two linear layers; three if it is gated, two of which are one projection."""
        hidden = positive_int(hidden_features, "hidden_features")
        out = in_features if out_features is None else out_features
        first = Projection("first", in_features, 2 * hidden if gated else hidden, bias)
        made = (first, Projection("second", hidden, out, bias))
        return cls(name, "mlp", made, itemsize=itemsize)

    @classmethod
    def of_experts(
        cls,
        name: str,
        experts: int,
        in_features: int,
        hidden_features: int,
        *,
        gated: bool = True,
        bias: bool = False,
        itemsize: int = 4,
    ) -> LayerSite:
        """A stack of experts with an up, a down and, if they are gated, a gate projection."""
        names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        ahead = (Projection(role, in_features, hidden_features, bias) for role in names)
        down = Projection("down_proj", hidden_features, in_features, bias)
        return cls(name, "experts", (*ahead, down), experts, itemsize)

    @property
    def parameters(self) -> int:
        """Weights and biases of all projections and experts."""
        return (self.experts or 1) * sum(each.entries for each in self.projections)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the projections in the model: those that sensitivities are given by."""
        return tuple(
            f"{self.name}.{each.role}" if each.role else self.name for each in self.projections
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON knows them."""
        projections = [
            {
                "role": each.role,
                "in_features": each.in_features,
                "out_features": each.out_features,
                "bias": each.bias,
            }
            for each in self.projections
        ]
        return {
            "name": self.name,
            "kind": self.kind,
            "projections": projections,
            "experts": self.experts,
            "itemsize": self.itemsize,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSite:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        keys = ("name", "kind", "projections", "experts", "itemsize")
        given = checked_keys(values, keys, "a layer")
        if not isinstance(given["projections"], list | tuple):
            raise SpecError(
                f"projections of a layer must be a list; got {brief(given['projections'])}."
            )
        names = ("role", "in_features", "out_features", "bias")
        made = tuple(
            Projection(**checked_keys(each, names, "a projection")) for each in given["projections"]
        )
        return cls(given["name"], given["kind"], made, given["experts"], given["itemsize"])


def checked_keys(values: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """A mapping that has exactly these names.

    Raises:
        SpecError: it is none, or has others.
    """
    if not isinstance(values, Mapping) or set(values) != set(names):
        found = list(values) if isinstance(values, Mapping) else values
        raise SpecError(f"{what} must have exactly {', '.join(names)}; got {brief(found)}.")
    return dict(values)


def _text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise SpecError(f"{name} must be a string; got {brief(value)}.")
