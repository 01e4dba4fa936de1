"""Experts that are run one by one: linear layers, MLPs or gated MLPs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tensormoe._config import ACTIVATIONS, LayerConfig
from tensormoe._mixture import checked_fields
from tensormoe._resolve import Options
from tensormoe._spec import LayerSpec
from tensormoe._validation import choice, positive_int
from tensormoe.backend import Array
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization, FactorizationLike
from tensormoe.mixtures._budget import within_budget
from tensormoe.selection import Budget

KINDS: Mapping[str, str | None] = {"swiglu": "silu", "mlp": "gelu", "linear": None}
"""Kinds of experts, each with its default activation."""

Act = Callable[[Array], Array]
Halves = Callable[[Array], tuple[Array, Array]]
Project = Callable[[str, Array], Array]


@dataclass(frozen=True)
class ExpertsConfig:
    """N experts of one kind and size.

    ``"linear"``: ``W_nᵀ x``; ``"mlp"``: ``D_nᵀ act(U_nᵀ x)``; ``"swiglu"``: ``D_nᵀ (act(G_nᵀ x) ·
    U_nᵀ x)``, bias terms left out (Shazeer 2020). All matrices of a role are one tensor network.

    Args:
        kind: "swiglu", "mlp" or "linear".
        up: in → hidden of an MLP, in → 2 · hidden of a gated one; None for linear experts.
        down: hidden → out, or in → out of linear experts.
        act_layer: name of the activation; None for linear experts.

    Raises:
        SpecError: layers that do not fit one another, or an unknown kind or activation.
    """

    kind: str
    up: LayerSpec | None
    down: LayerSpec
    act_layer: str | None

    def __post_init__(self) -> None:
        choice(self.kind, KINDS, "kind", SpecError)
        if (self.kind == "linear") != (self.up is None) or (self.kind == "linear") != (
            self.act_layer is None
        ):
            raise SpecError(
                f"{self.kind} experts must have {'one layer' if self.up else 'two layers'}, and an "
                f"activation if there are two; got act_layer={self.act_layer!r}."
            )
        if self.act_layer is not None:
            choice(self.act_layer, ACTIVATIONS, "act_layer", SpecError)
        if self.up is None:
            return
        wanted = self.down.in_features * (2 if self.kind == "swiglu" else 1)
        if self.up.out_features != wanted or self.up.experts != self.down.experts:
            raise SpecError(
                f"the layers of {self.kind} experts must fit: {wanted} outputs of the first, the "
                f"same experts; got {self.up} and {self.down}."
            )

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return (self.up or self.down).in_features

    @property
    def hidden_features(self) -> int | None:
        """Size between the layers; None for linear experts."""
        return None if self.up is None else self.down.in_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.down.out_features

    @property
    def num_experts(self) -> int:
        """N."""
        return self.down.num_experts

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        """The layers by role: ``up_proj`` or ``gate_up_proj``, and ``down_proj``."""
        found = {} if self.up is None else {self._up: LayerConfig(self.up, None)}
        return found | {"down_proj": LayerConfig(self.down, None)}

    @property
    def num_parameters(self) -> int:
        """Trainable entries."""
        return sum(layer.num_parameters for layer in self.layers.values())

    @property
    def factorizations(self) -> tuple[Factorization, ...]:
        """The factorization of each layer."""
        return tuple(layer.spec.factorization for layer in self.layers.values())

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.kind == "swiglu" else "up_proj"

    def sorts(self, rows: int) -> bool:
        """Whether so many rows of one expert each run faster when they are sorted by expert."""
        return any(layer.sorts(rows) for layer in self.layers.values())

    def arguments(self) -> str:
        """Arguments of a constructor that give these experts, for ``repr``."""
        sizes = [self.in_features, self.hidden_features, self.out_features]
        found = self.factorizations
        options = {
            "experts": self.num_experts,
            "kind": self.kind,
            "act_layer": self.act_layer,
            "bias": self.down.bias,
            "factorization": found[0] if len(found) == 1 else found,
        }
        named = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{', '.join(map(repr, sizes))}, {named}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints store them."""
        return {
            "kind": self.kind,
            "up": None if self.up is None else self.up.to_dict(),
            "down": self.down.to_dict(),
            "act_layer": self.act_layer,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpertsConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        found = checked_fields(values, {"kind", "up", "down", "act_layer"}, "group of experts")
        up = None if found["up"] is None else LayerSpec.from_dict(found["up"])
        return cls(found["kind"], up, LayerSpec.from_dict(found["down"]), found["act_layer"])


def experts_config(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None,
    experts: int,
    *,
    kind: str = "swiglu",
    act_layer: str | None = None,
    bias: bool = False,
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "dense",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | None = None,
    router: int = 0,
    others: int = 0,
) -> ExpertsConfig:
    """Experts from the arguments that all mixtures share.

    Args:
        in_features: size of an input.
        hidden_features: size between the layers; None for linear experts.
        out_features: size of an output; ``in_features`` by default.
        experts: N.
        kind: "swiglu", "mlp" or "linear".
        act_layer: name of the activation; "silu" for "swiglu" and "gelu" for "mlp" by default.
        bias: whether experts have biases.
        factorization: of every layer, or a pair.
        rank: bond sizes of both, with a name. Without one, a named factorization gets the rank
            whose factors have the parameters of one expert's linear layer.
        budget: parameters of the whole mixture instead of a rank: a number, or a
            ``Budget(parameters=…)``, whose ``gate=False`` leaves the router out.
        router: parameters of the router, for a budget.
        others: parameters of what is built besides experts and router, for a budget.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
    """
    choice(kind, KINDS, "kind", SpecError)
    count = positive_int(experts, "experts")
    inner = positive_int(in_features, "in_features")
    outer = inner if out_features is None else positive_int(out_features, "out_features")
    pair = factorization if isinstance(factorization, tuple) else (factorization,) * 2
    if len(pair) != 2:
        raise SpecError(
            f"factorization must be one, or one per layer; got {len(pair)}: {factorization!r}."
        )
    if kind == "linear":
        for name, value in (("hidden_features", hidden_features), ("act_layer", act_layer)):
            if value is not None:
                raise SpecError(
                    f"{name} must be None for linear experts; got {value!r}. Leave it out, or use "
                    "kind='mlp'."
                )
        if isinstance(factorization, tuple):
            raise SpecError(
                f"factorization must be one for linear experts; got {factorization!r}. Pairs are "
                "for experts of two layers."
            )
        if budget is not None:
            sizes = inner, None, outer
            bought: Any = {"bias": bias, "router": router, "others": others}
            pair = within_budget(budget, pair, rank, sizes, count, **bought)
        return ExpertsConfig(kind, None, _spec(pair[1], rank, inner, outer, count, bias), None)
    if hidden_features is None:
        raise SpecError(
            f"hidden_features must be given for {kind} experts; got None. Use kind='linear' for "
            "experts without a hidden layer."
        )
    hidden = positive_int(hidden_features, "hidden_features")
    width = 2 * hidden if kind == "swiglu" else hidden
    # of a pair, the rank is of the layer that takes one
    first, second = (None if one == "dense" != other else rank for one, other in (pair, pair[::-1]))
    if budget is not None:
        bought = {"gated": kind == "swiglu", "bias": bias, "router": router, "others": others}
        pair = within_budget(budget, pair, rank, (inner, hidden, outer), count, **bought)
    return ExpertsConfig(
        kind,
        _spec(pair[0], first, inner, width, count, bias),
        _spec(pair[1], second, hidden, outer, count, bias),
        KINDS[kind] if act_layer is None else act_layer,
    )


def _spec(
    factorization: FactorizationLike,
    rank: int | tuple[int, ...] | None,
    rows: int,
    columns: int,
    experts: int,
    bias: bool,
) -> LayerSpec:
    options = Options(experts, factorization, rank, None, bias, None)
    return options.layer(rows, columns).spec


def hidden_units(roles: Collection[str], project: Project, act: Act, x: Array) -> Array:
    """Inputs of the last layer of experts, each row of its own: what all experts share.

    Args:
        roles: of the layers: ``down_proj`` alone; with ``up_proj``; with ``up_proj`` and
            ``gate_proj``; or with ``gate_up_proj``, which makes both halves at once.
        project: runs a layer, by its role, on rows.
        act: the activation; behind ``gate_up_proj`` the function of both halves (:func:`gated`).
        x: (rows, in).

    Returns:
        (rows, hidden); the input itself where there is one layer.
    """
    if "gate_proj" in roles:
        up = project("up_proj", x)
        return act(project("gate_proj", x)) * up
    if len(roles) == 1:
        return x
    return act(project("gate_up_proj" if "gate_up_proj" in roles else "up_proj", x))


def run_expert(roles: Collection[str], project: Project, act: Act, x: Array) -> Array:
    """Outputs (rows, out) of experts; arguments as of :func:`hidden_units`."""
    return project("down_proj", hidden_units(roles, project, act, x))


def gated(act: Act, halves: Halves | None = None) -> Act:
    """The function of both halves, (..., 2 · hidden) → (..., hidden), of a gated unit.

    Args:
        act: the activation of the first half.
        halves: cuts an array in two along its last axis; slices by default.
    """
    # a partial, as modules that keep it must be pickled
    return partial(_both_halves, act, halves or _halves)


def gate_of(act: Act) -> Act | None:
    """The activation of the first half, of a function that :func:`gated` made; None of others.

    >>> gate_of(gated(abs)) is abs, gate_of(abs)
    (True, None)
    """
    if isinstance(act, partial) and act.func is _both_halves:
        found: Act = act.args[0]
        return found
    return None


def _both_halves(act: Act, halves: Halves, both: Array) -> Array:
    gate, up = halves(both)
    return act(gate) * up


def _halves(both: Array) -> tuple[Array, Array]:
    half = both.shape[-1] // 2
    return both[..., :half], both[..., half:]
