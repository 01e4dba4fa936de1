"""What a layer is made of besides arrays: its spec and its gate, resolved from arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

from tensormoe._spec import LayerSpec
from tensormoe._validation import choice, flag, instance, positive_int, positive_ints
from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations import (
    Factorization,
    FactorizationLike,
    rank_pattern,
    resolve_factorization,
)
from tensormoe.gates import Gate
from tensormoe.planning import Regimes, Routing, plan_regimes
from tensormoe.selection import Budget, select_block, select_rank

__all__ = ["ACTIVATIONS", "BlockConfig", "LayerConfig", "resolve_block", "resolve_config"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
"""Names of the activations that every framework has; ``gelu`` is the exact one."""


@dataclass(frozen=True)
class LayerConfig:
    """A layer without its arrays.

    Args:
        spec: sizes and factorization.
        gate: how inputs become coefficients; None for a layer that is always given them.
        indexed_input: whether inputs are integer ids (an embedding).
    """

    spec: LayerSpec
    gate: Gate | None
    indexed_input: bool = False

    def __post_init__(self) -> None:
        instance(self.spec, LayerSpec, "spec", "a LayerSpec", SpecError)
        instance(self.gate, (Gate, NoneType), "gate", "a Gate or None", SpecError)
        flag(self.indexed_input, "indexed_input")

    @cached_property
    def regimes(self) -> Regimes:
        """The programs for every batch size; planned on first use."""
        return plan_regimes(self.spec.network, Routing(None, self.indexed_input))

    def plan_ahead(self) -> None:
        """Plan now, so that a forward call only looks up programs.

        Layers do so when they are made. A configuration by itself does not: one that was read from
        a file is compared with the arrays of the file first.
        """
        _ = self.regimes

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every trainable array by canonical name, as checkpoints use them.

        ``factors.<name>`` for factors and bias; ``gate.projection_<level>`` (in, N_e) and, if the
        gate has one, ``gate.bias_<level>`` (N_e,).
        """
        shapes = {f"factors.{name}": shape for name, shape in self.spec.shapes.items()}
        return shapes | self._gate_shapes(self.gate is not None, "projection", "bias")

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array that is kept but not trained: batch norm's statistics."""
        batch = self.gate is not None and self.gate.normalization == "batch"
        return {
            f"gate.running_{name}_{level}": (count,)
            for level, count in enumerate(self.spec.experts)
            for name in ("mean", "variance")
            if batch
        }

    def _gate_shapes(self, wanted: bool, projection: str, bias: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for level, count in enumerate(self.spec.experts if wanted else ()):
            shapes[f"gate.{projection}_{level}"] = (self.spec.in_features, count)
            if self.gate is not None and self.gate.bias:
                shapes[f"gate.{bias}_{level}"] = (count,)
        return shapes

    @property
    def block(self) -> str:
        """Name of the class of its layers, the same in every framework and in checkpoints."""
        return "MuMoEEmbedding" if self.indexed_input else "MuMoE"

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.spec.num_parameters + self.gate_parameters

    @property
    def gate_parameters(self) -> int:
        """Trainable entries of the gate alone."""
        gate = self.gate
        rows = 0 if gate is None else self.spec.in_features + gate.bias
        return rows * sum(self.spec.experts)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain values, as checkpoints store it."""
        return {
            "spec": self.spec.to_dict(),
            "gate": None if self.gate is None else self.gate.to_dict(),
            "indexed_input": self.indexed_input,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerConfig:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        expected = {"spec", "gate", "indexed_input"}
        if not isinstance(values, Mapping) or set(values) != expected:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise SpecError(
                f"a layer's config must have exactly {sorted(expected)}; got {found!r}."
            )
        gate, indexed = values["gate"], values["indexed_input"]
        return cls(
            LayerSpec.from_dict(values["spec"]),
            None if gate is None else Gate.from_dict(gate),
            indexed,
        )


@dataclass(frozen=True)
class BlockConfig:
    """A two-layer block without its arrays.

    Args:
        first: the first layer; its gate serves both.
        second: the second layer, without a gate.
        act_layer: name of the activation between; None for a function or module that the block
            itself holds, which no checkpoint can name.
        drop: share of entries dropped in training.
        gated: whether the activation of one half of the first layer's outputs is multiplied by the
            other half, as in SwiGLU (Shazeer 2020): ``second(act(g) * u)`` with ``g, u`` the first
            and the last ``hidden_features`` outputs of the first layer.

    Raises:
        SpecError: layers that do not fit, or an unknown activation.
    """

    first: LayerConfig
    second: LayerConfig
    act_layer: str | None
    drop: float = 0.0
    gated: bool = False

    def __post_init__(self) -> None:
        if self.act_layer is not None:
            choice(self.act_layer, ACTIVATIONS, "act_layer", SpecError)
        flag(self.gated, "gated")
        first, second = self.first.spec, self.second.spec
        wanted = 2 * self.hidden_features if self.gated else self.hidden_features
        if first.out_features != wanted or first.experts != second.experts or self.second.gate:
            raise SpecError(
                f"the layers of a {'gated ' if self.gated else ''}block must fit: one hidden size"
                f"{', twice as outputs of the first,' if self.gated else ','} the same experts, "
                f"one gate; got {first}, {second} and {self.second.gate}."
            )

    @property
    def hidden_features(self) -> int:
        """Size of what the second layer is given."""
        return self.second.spec.in_features

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included, an activation's own not."""
        return self.first.num_parameters + self.second.num_parameters

    @property
    def block(self) -> str:
        """Name of the class of its blocks, the same in every framework and in checkpoints."""
        return "MuMoEMLP"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by canonical name: ``first.factors.…``, ``second.factors.…``, ``gate.…``."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, config in (("first", self.first), ("second", self.second)):
            for name, shape in config.parameter_shapes().items():
                shapes[name if name.startswith("gate.") else f"{layer}.{name}"] = shape
        return shapes

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array that is kept but not trained."""
        return self.first.buffer_shapes()

    def plan_ahead(self) -> None:
        """Plan both layers now, as :meth:`LayerConfig.plan_ahead`."""
        self.first.plan_ahead()
        self.second.plan_ahead()

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain values, as checkpoints store it.

        Raises:
            SpecError: the activation has no name that every framework knows.
        """
        if self.act_layer is None:
            raise SpecError(
                f"act_layer must be one of {', '.join(map(repr, ACTIVATIONS))} to be saved; this "
                "block holds an activation of its own. Save its arrays (in PyTorch, state_dict()) "
                "and build the block anew to load them."
            )
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "act_layer": self.act_layer,
            "drop": self.drop,
            "gated": self.gated,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockConfig:
        """The inverse of :meth:`to_dict`; strict about names.

        A block without the field ``gated`` is none: files older than the field have no such blocks.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        expected = {"first", "second", "act_layer", "drop", "gated"}
        if not isinstance(values, Mapping) or {*values, "gated"} != expected:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise SpecError(
                f"a block's config must have exactly {sorted(expected)}; got {found!r}."
            )
        first, second = (LayerConfig.from_dict(values[name]) for name in ("first", "second"))
        act, drop = values["act_layer"], values["drop"]
        if not isinstance(act, str) or not isinstance(drop, (int, float)) or not 0 <= drop < 1:
            raise SpecError(
                f"act_layer must be a name and drop in [0, 1); got {act!r} and {drop!r}."
            )
        return cls(first, second, act, float(drop), values.get("gated", False))


def resolve_config(
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    factorization: FactorizationLike,
    *,
    rank: int | tuple[int, ...] | None,
    budget: Budget | int | str | None,
    bias: bool,
    gate: Gate | str | None,
    indexed_input: bool = False,
) -> LayerConfig:
    """A layer's configuration from the arguments that every framework's layer takes.

    ``rank`` and ``budget`` exclude one another. A budget covers the gate; without either, the
    factors get the parameters of the linear layer of their size (for factorizations with a rank to
    choose), and the gate comes on top.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit, or both a rank and a budget.
        BudgetError: an impossible budget; the message names the smallest feasible one.
    """
    if budget is not None and (rank is not None or isinstance(factorization, Factorization)):
        raise _twice(factorization, rank, budget)
    if not isinstance(factorization, Factorization) and rank is None:
        sizes = positive_ints(experts, "experts", "level")
        if budget is not None or rank_pattern(factorization, len(sizes)):
            rank = select_rank(
                factorization,
                in_features,
                out_features,
                sizes,
                budget=budget,
                bias=bias,
                gate=gate,
                indexed_input=indexed_input,
            )
    spec = LayerSpec(
        in_features, out_features, experts, resolve_factorization(factorization, rank), bias
    )
    parsed = None if gate is None else Gate.parse(gate)
    if parsed is not None and parsed.k is not None:
        for level, count in enumerate(spec.experts):
            if parsed.k > count:
                raise SpecError(
                    f"k of a top-k gate must be at most the experts of each level; got {parsed.k} "
                    f"for level {level} of {count}. Lower k."
                )
    config = LayerConfig(spec, parsed, indexed_input)
    config.plan_ahead()
    return config


def _twice(factorization: object, rank: object, budget: object) -> RankError:
    given = f"rank={rank!r}" if rank is not None else repr(factorization)
    return RankError(
        f"rank and budget exclude one another; got {given} and budget={budget!r}. Drop one."
    )


def resolve_block(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None,
    act_layer: str | None,
    drop: float,
    *,
    gated: bool = False,
    experts: int | tuple[int, ...],
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike],
    rank: int | tuple[int, ...] | None,
    budget: Budget | int | str | None,
    bias: bool,
    gate: Gate | str | None,
) -> BlockConfig:
    """A block's configuration from the arguments that every framework's block takes.

    Hidden and output size are the input's unless given; the first layer of a ``gated`` block has
    twice the hidden size as outputs. ``rank`` holds for each of the two layers, and ``budget``
    covers both together with their gate.

    Raises:
        SpecError, RankError, BudgetError: as :func:`resolve_config`.
    """
    if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0.0 <= drop < 1.0:
        raise SpecError(f"drop must be in [0, 1); got {drop!r}. Give the share to drop.")
    hidden = in_features if hidden_features is None else hidden_features
    out = in_features if out_features is None else out_features
    pair = factorization if isinstance(factorization, tuple) else (factorization,) * 2
    if len(pair) != 2:
        raise SpecError(
            f"factorization must be one, or one a layer; got {len(pair)}: {factorization!r}."
        )
    wide = 2 * positive_int(hidden, "hidden_features") if flag(gated, "gated") else hidden
    kinds: tuple[FactorizationLike, ...] = pair
    if budget is not None:
        one, two = pair
        if rank is not None or isinstance(one, Factorization) or isinstance(two, Factorization):
            raise _twice(factorization, rank, budget)
        sizes = (in_features, hidden, out)
        options: dict[str, Any] = {"bias": bias, "gate": gate, "gated": gated}
        chosen = select_block((one, two), *sizes, experts, budget=budget, **options)
        kinds = tuple(each.factorization for each in chosen)
    first, second = (
        resolve_config(rows, columns, experts, kind, rank=rank, budget=None, bias=bias, gate=own)
        for rows, columns, kind, own in zip(
            (in_features, hidden), (wide, out), kinds, (gate, None), strict=True
        )
    )
    return BlockConfig(first, second, act_layer, float(drop), gated)
