"""What a layer is made of besides arrays: its spec and its gate, resolved from arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensormoe._spec import LayerSpec
from tensormoe._validation import positive_ints
from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations import Factorization, resolve_factorization
from tensormoe.gates import Gate
from tensormoe.planning import Budget, Regimes, Routing, plan_regimes, select_block, select_rank

__all__ = ["BlockConfig", "LayerConfig", "resolve_block", "resolve_config"]

Kind = str | Factorization


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
    regimes: Regimes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # planned here, so that a forward call only looks programs up
        regimes = plan_regimes(self.spec, Routing(None, self.indexed_input))
        object.__setattr__(self, "regimes", regimes)

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
        if not isinstance(indexed, bool):
            raise SpecError(f"indexed_input must be True or False; got {indexed!r}.")
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
        act_layer: name of the activation between.
        drop: share of entries dropped in training.
    """

    first: LayerConfig
    second: LayerConfig
    act_layer: str
    drop: float = 0.0

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

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain values, as checkpoints store it."""
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "act_layer": self.act_layer,
            "drop": self.drop,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockConfig:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        expected = {"first", "second", "act_layer", "drop"}
        if not isinstance(values, Mapping) or set(values) != expected:
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
        sizes = (first.spec.out_features, second.spec.in_features)
        if sizes[0] != sizes[1] or first.spec.experts != second.spec.experts or second.gate:
            raise SpecError(
                "the layers of a block must fit: one hidden size, the same experts, one gate; got "
                f"{first.spec}, {second.spec} and {second.gate}."
            )
        return cls(first, second, act, float(drop))


def resolve_config(
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    factorization: str | Factorization,
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
        if budget is not None or factorization not in ("hadamard", "dense"):
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
    return LayerConfig(spec, parsed, indexed_input)


def _twice(factorization: object, rank: object, budget: object) -> RankError:
    given = f"rank={rank!r}" if rank is not None else repr(factorization)
    return RankError(
        f"rank and budget exclude one another; got {given} and budget={budget!r}. Drop one."
    )


def resolve_block(
    in_features: int,
    hidden_features: int | None,
    out_features: int | None,
    act_layer: str,
    drop: float,
    *,
    experts: int | tuple[int, ...],
    factorization: Kind | tuple[Kind, Kind],
    rank: int | tuple[int, ...] | None,
    budget: Budget | int | str | None,
    bias: bool,
    gate: Gate | str | None,
) -> BlockConfig:
    """A block's configuration from the arguments that every framework's block takes.

    Hidden and output size are the input's unless given; ``rank`` holds for each of the two layers,
    and ``budget`` covers both together with their gate.

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
    kinds: tuple[Kind, ...] = pair
    if budget is not None:
        one, two = pair
        if rank is not None or isinstance(one, Factorization) or isinstance(two, Factorization):
            raise _twice(factorization, rank, budget)
        sizes = (in_features, hidden, out)
        chosen = select_block((one, two), *sizes, experts, budget=budget, bias=bias, gate=gate)
        kinds = tuple(each.factorization for each in chosen)
    first, second = (
        resolve_config(rows, columns, experts, kind, rank=rank, budget=None, bias=bias, gate=own)
        for rows, columns, kind, own in zip(
            (in_features, hidden), (hidden, out), kinds, (gate, None), strict=True
        )
    )
    return BlockConfig(first, second, act_layer, float(drop))
