"""Layers and blocks without their arrays: specs and gate as values, with plans and costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import NoneType
from typing import Any

from tensormoe._names import block_names
from tensormoe._spec import LayerSpec
from tensormoe._validation import choice, flag, instance, positive_int
from tensormoe.errors import SpecError
from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network
from tensormoe.gates import Gate
from tensormoe.planning import (
    Cost,
    Library,
    Plan,
    Regimes,
    Routing,
    block_cost,
    plan_layer,
    plan_regimes,
)
from tensormoe.planning._each import each_regimes
from tensormoe.planning._library import DEFAULT
from tensormoe.planning._sent import Stages, entered, left

__all__ = ["ACTIVATIONS", "BlockConfig", "LayerConfig"]

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

    @cached_property
    def routed_regimes(self) -> tuple[Regimes, Regimes]:
        """The programs for rows of one expert each: in any order, and sorted by expert."""
        any_order = Routing(None, self.indexed_input, one_expert=True)
        by_expert = Routing(None, self.indexed_input, one_expert=True, by_expert=True)
        network = self.spec.network
        return plan_regimes(network, any_order), plan_regimes(network, by_expert)

    @cached_property
    def sent_stages(self) -> tuple[tuple[tuple[Stages, Stages], ...], ...]:
        """The same programs for rows that tokens were sent as, in stages.

        For each way to order rows and each regime, what enters experts and what leaves them.
        """
        return tuple(
            tuple((entered(program), left(program)) for program in regimes.programs)
            for regimes in self.routed_regimes
        )

    def sorts(self, rows: int) -> bool:
        """Whether so many rows of one expert each run faster when they are sorted by expert."""
        program = self.routed_regimes[1].program(rows)
        return any(step.kind == "grouped" for step in program.steps)

    @cached_property
    def each_regimes(self) -> Regimes:
        """The programs for rows in the order of experts, by rows per expert."""
        return each_regimes(self.spec.network)

    @cached_property
    def every_regimes(self) -> Regimes:
        """The programs for rows that every expert runs."""
        return each_regimes(self.spec.network, same_rows=True)

    def plan_ahead(self) -> None:
        """Plan now, so that a forward call only looks up programs.

        Layers do so when they are made. A configuration by itself does not: one that was read from
        a file is compared with the arrays of the file first.
        """
        _ = self.regimes

    def plan(
        self,
        batch: int,
        *,
        memory_limit: int | None = None,
        itemsize: int = 4,
        library: Library = DEFAULT,
    ) -> Plan:
        """Plan of the layer for ``batch`` inputs: a look-up once it has been planned.

        Args:
            batch: number of inputs, all leading axes multiplied.
            memory_limit: bytes that a call may take beyond input and parameters, its gate
                included; ``Plan.chunk`` is how many inputs may run at a time then.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.

        Raises:
            PlanError: the batch is not a size, or not even one input keeps to the limit; the
                message names the smallest feasible one.
        """
        if memory_limit is None:
            return self.spec.plan(batch, indexed_input=self.indexed_input)
        return plan_layer(
            self.spec.network,
            batch,
            Routing(None, self.indexed_input),
            memory_limit=memory_limit,
            gate=self.gate,
            itemsize=itemsize,
            title=repr(self.spec.factorization),
            library=library,
        )

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        """Cost of one call for ``batch`` inputs, the gate included.

        Args:
            batch: number of inputs, all leading axes multiplied.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.
            training: forward and backward with all gradients, instead of forward alone.

        >>> from tensormoe import CP
        >>> config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate())
        >>> config.cost(10).parameters == config.num_parameters
        True
        """
        return self.plan(batch).cost(
            self.gate,
            training=training,
            itemsize=itemsize,
            library=library,
        )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every trainable array by canonical name, as checkpoints use them.

        ``factors.<name>`` for factors and bias; ``gate.projection_<level>`` (in, N_e) and, if the
        gate has one, ``gate.bias_<level>`` (N_e,).
        """
        shapes = {f"factors.{name}": shape for name, shape in self.spec.shapes.items()}
        whole = self._gated
        for level, count in enumerate(() if self.gate is None else whole.experts):
            shapes[f"gate.projection_{level}"] = (whole.in_features, count)
            if self.gate is not None and self.gate.bias:
                shapes[f"gate.bias_{level}"] = (count,)
        return shapes

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array that is kept but not trained.

        Those are batch norm's statistics, and the biases of a gate with ``balance``.
        """
        batch = self.gate is not None and self.gate.normalization == "batch"
        balanced = self.gate is not None and self.gate.balance > 0
        names = [*(("running_mean", "running_variance") if batch else ())]
        names += ["choice_bias"] if balanced else []
        return {
            f"gate.{name}_{level}": (count,)
            for level, count in enumerate(self._gated.experts)
            for name in names
        }

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
        rows = 0 if gate is None else self._gated.in_features + gate.bias
        return rows * sum(self._gated.experts)

    @property
    def _gated(self) -> Network:
        """The network whose inputs and experts the gate knows: the whole one, also of a part."""
        return self.spec.network.whole

    def shard(self, leg: Leg, devices: int) -> LayerConfig:
        """One device's part of the layer, as :meth:`LayerSpec.shard`; every device has the gate.

        Raises:
            SpecError: as :meth:`LayerSpec.shard`.
        """
        return replace(self, spec=self.spec.shard(leg, devices))

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
        _check_names(values, {"spec", "gate", "indexed_input"}, "layer")
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
        return block_names(self.first.parameter_shapes(), self.second.parameter_shapes())

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array that is kept but not trained."""
        return self.first.buffer_shapes()

    def plan_ahead(self) -> None:
        """Plan both layers now, as :meth:`LayerConfig.plan_ahead`."""
        self.first.plan_ahead()
        self.second.plan_ahead()

    def plan(self, batch: int) -> tuple[Plan, Plan]:
        """Plans of the two layers for ``batch`` inputs."""
        return self.first.plan(batch), self.second.plan(batch)

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        """Cost of one call for ``batch`` inputs: both layers, gate and activation.

        Args:
            batch: number of inputs, all leading axes multiplied.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.
            training: forward and backward with all gradients, instead of forward alone.
        """
        return block_cost(
            *self.plan(batch),
            self.first.gate,
            gated=self.gated,
            drop=self.drop,
            training=training,
            itemsize=itemsize,
            library=library,
        )

    def shard(self, devices: int) -> BlockConfig:
        """One device's part of the block, cut along its hidden leg.

        The first layer is cut along its output and the second along its input, so that hidden
        features stay on their device. Of a gated block, a device's slice of the first layer's
        outputs is its slice of both halves.

        Args:
            devices: P, the number of slices; it must divide the hidden features.

        Raises:
            SpecError: it does not.
        """
        if self.hidden_features % positive_int(devices, "devices"):
            raise SpecError(
                f"hidden_features must be a multiple of the {devices} devices; got "
                f"{self.hidden_features}. Take another size, or another number of devices."
            )
        first, second = self.first.shard(OUTPUT, devices), self.second.shard(INPUT, devices)
        return replace(self, first=first, second=second)

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
        _check_names(values, expected, "block", optional={"gated"})
        first, second = (LayerConfig.from_dict(values[name]) for name in ("first", "second"))
        act, drop = values["act_layer"], values["drop"]
        if not isinstance(act, str) or not isinstance(drop, (int, float)) or not 0 <= drop < 1:
            raise SpecError(
                f"act_layer must be a name and drop in [0, 1); got {act!r} and {drop!r}."
            )
        return cls(first, second, act, float(drop), values.get("gated", False))


def _check_names(
    values: object, expected: set[str], kind: str, optional: frozenset[str] | set[str] = frozenset()
) -> None:
    if not isinstance(values, Mapping) or {*values} | optional != expected:
        found = sorted(values) if isinstance(values, Mapping) else values
        raise SpecError(f"a {kind}'s config must have exactly {sorted(expected)}; got {found!r}.")
