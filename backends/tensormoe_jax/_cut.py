"""Layers that are cut over a mesh axis: each device runs its part, and one sum joins the results.

The part of a device is the same layer with a smaller leg (:func:`tensormoe.functional.cut_axes`).
``jax.shard_map`` runs it, over the mesh axis of the cut alone. Operands that every device has whole
are marked as varying where they come in, so that each of their gradients is summed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from tensormoe.checkpoint import check_config
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import INPUT, OUTPUT, expert_leg
from tensormoe.functional import BlockConfig, LayerConfig, cut_axes
from tensormoe.gates import OneExpert, TopK
from tensormoe_jax._exchange import exchanged
from tensormoe_jax._mesh import checked_mesh, kinds_of, listed, resharded
from tensormoe_jax._specs import HIDDEN, Legs, MeshCut, cut_of, has_leg, leg_of, spec_of

__all__ = ["Placed", "Rows", "over_devices", "own_slices", "placed"]

Parameters = Mapping[str, Array]
Config = LayerConfig | BlockConfig


@dataclass(frozen=True)
class Rows:
    """Inputs of a layer.

    Args:
        x: (rows, in), or ids (rows,).
        given: coefficients, one entry per level.
    """

    x: Array
    given: list[Array | TopK | OneExpert]


Local = Callable[[Parameters, Rows, "Array | None"], Array]
"""One device's part: from its arrays, rows and dropped entries to its term or slice."""


@dataclass(frozen=True)
class Placed:
    """A layer or block, cut over an axis of the mesh that is set.

    Args:
        config: the whole one.
        part: what one device has.
        cut: the leg and the axis.
        manual: whether the call is inside a ``shard_map`` over the axis already.
        explicit: the other mesh axes that types of arrays name.
    """

    config: Config
    part: Config
    cut: MeshCut
    manual: bool
    explicit: frozenset[str]

    @property
    def axis(self) -> str:
        """The mesh axis."""
        return self.cut.axis

    @property
    def held(self) -> Config:
        """The configuration whose shapes arrays have here."""
        return self.part if self.manual else self.config

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The parts of its layers."""
        part = self.part
        return (part.first, part.second) if isinstance(part, BlockConfig) else (part,)

    @cached_property
    def leg_in(self) -> str:
        """The leg of the first layer."""
        return OUTPUT if self.cut.leg == HIDDEN else self.cut.leg

    @property
    def is_sliced(self) -> bool:
        """Whether each device's result is a slice, rather than a term of a sum."""
        return self.cut.leg == OUTPUT

    def features(self, x: Any, size: int) -> int:
        """Features that an input must have: inside of a ``shard_map``, those of a slice will do."""
        sliced = self.layers[0].spec.in_features
        shape = getattr(x, "shape", ())
        return sliced if self.manual and shape and shape[-1] == sliced else size


def placed(config: Config, parameters: Parameters, legs: Legs | MeshCut | None) -> Placed | None:
    """The cut of a layer: as asked for, or as the types of its arrays say; None for a whole one.

    Raises:
        SpecError: legs, a mesh or an axis that do not fit.
    """
    check_config(config)
    cut = _typed(config, parameters) if legs is None else leg_of(legs)
    if cut is None:
        return None
    mesh = checked_mesh(cut)
    kinds = kinds_of(mesh)
    part = cut_of(config, cut, mesh.shape[cut.axis])
    explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit} - {cut.axis}
    return Placed(config, part, cut, kinds[cut.axis] == AxisType.Manual, frozenset(explicit))


def over_devices(
    cut: Placed, local: Local, parameters: Parameters, rows: Rows, kept: Array | None = None
) -> Array:
    """The result (rows, out) of all devices' parts: their sum, or their slices.

    Args:
        cut: the layer or block, and the mesh axis.
        local: runs one device's part.
        parameters: factors by canonical name.
        rows: inputs and coefficients.
        kept: (rows, hidden) what hidden features are multiplied by.
    """
    if cut.manual:
        _check_same(cut, rows)
        axes = frozenset({cut.axis}) | _varies(rows.x)
        kept = None if kept is None else _own_columns(kept, cut)
        return _joined(cut, local(*_varying((parameters, rows, kept), axes)))
    rows, specs, result = _rows_specs(cut, rows)
    named = cut_axes(cut.part)
    placements = {name: spec_of(named[name], cut.cut) for name in parameters}
    masked = PartitionSpec(specs.x[0], cut.axis)  # type: ignore[no-untyped-call]
    operands = (dict(parameters), rows, kept)
    wanted = (placements, specs, None if kept is None else masked)
    mapped = cut.explicit | {cut.axis}
    # along axes that no rows are cut over, all devices do the same
    varying = frozenset(listed(specs.x[0])) | {cut.axis}

    def body(*given: Any) -> Array:
        return _joined(cut, local(*_varying(given, varying)))

    run = jax.shard_map(body, in_specs=wanted, out_specs=result, axis_names=set(mapped))
    made: Array = run(*jax.tree.map(resharded, operands, wanted))
    return made


def own_slices(cut: Placed, config: LayerConfig, parameters: Parameters) -> dict[str, Array]:
    """Factors of a part; those of a gated block's first layer with a slice of both halves."""
    arrays = dict(parameters)
    if isinstance(cut.part, BlockConfig) and cut.part.gated and config is cut.layers[0]:
        for name, axis in cut_axes(config).items():
            if axis is not None and name in arrays:
                arrays[name] = exchanged(arrays[name], axis.axis, cut.axis)
    return arrays


jax.tree_util.register_dataclass(Rows, data_fields=["x", "given"], meta_fields=[])


def _joined(cut: Placed, result: Array) -> Array:
    if cut.is_sliced:
        return result
    total: Array = jax.lax.psum(result, cut.axis)  # type: ignore[no-untyped-call]
    return total


def _typed(config: Config, parameters: Parameters) -> MeshCut | None:
    """The cut that the types of arrays name, where axes of a mesh are explicit; None if several."""
    if jax.sharding.get_abstract_mesh().empty or not isinstance(parameters, Mapping):
        return None
    if isinstance(config, BlockConfig):
        layers = {"first.": config.first, "second.": config.second}
    else:
        layers = {"": config}
    found = set()
    for prefix, layer in layers.items():
        for factor in layer.spec.network.all_factors:
            array = parameters.get(f"{prefix}factors.{factor.name}")
            if not isinstance(array, Array):
                return None
            for leg, names in zip(factor.legs, jax.typeof(array).sharding.spec, strict=False):
                if names is not None:
                    inner = (prefix, leg) in (("first.", OUTPUT), ("second.", INPUT))
                    found.add(MeshCut(HIDDEN if inner else leg, names))
    cut = found.pop() if len(found) == 1 else None
    # whatever else types may say is for JAX to run, or to refuse
    return cut if cut and isinstance(cut.axis, str) and has_leg(config, cut) else None


def _rows_specs(cut: Placed, rows: Rows) -> tuple[Rows, Rows, PartitionSpec]:
    """Inputs, how they lie on the mesh, and how the result does."""
    first = None
    if cut.explicit:
        # rows stay where they are, along all axes but the one that the layer is cut over
        spec = jax.typeof(rows.x).sharding.spec
        names = listed(spec[0] if spec else None)
        first = tuple(name for name in names if name in cut.explicit) or None

    def of(axis: str | None) -> PartitionSpec:
        return PartitionSpec(first, axis)  # type: ignore[no-untyped-call]

    of_ids = PartitionSpec(first)  # type: ignore[no-untyped-call]
    specs: list[Any] = []
    given: list[Any] = []
    for level, each in enumerate(rows.given):
        if isinstance(each, TopK):
            specs.append(TopK(of(None), of(None)))
        elif isinstance(each, OneExpert):
            # counts are those of all rows
            each = each if first is None else OneExpert(each.indices)
            counts = None if each.counts is None else PartitionSpec()  # type: ignore[no-untyped-call]
            specs.append(OneExpert(of_ids, counts))
        else:
            is_cut = cut.leg_in == expert_leg(level)
            specs.append(of(cut.axis if is_cut else None))
            each = _made_whole(each) if is_cut else each
        given.append(each)
    layer = cut.layers[0]
    x = of_ids if layer.indexed_input else of(cut.axis if cut.leg_in == INPUT else None)
    out = of(cut.axis if cut.is_sliced else None)
    return Rows(rows.x, given), Rows(x, specs), out  # type: ignore[arg-type]


def _made_whole(coefficients: Array) -> Array:
    """Coefficients that are whole on every device, so that the gate that makes them is too."""
    if AxisType.Auto not in kinds_of(jax.sharding.get_abstract_mesh()).values():
        return coefficients
    # the compiler would else cut the gate as well, whose every iteration then communicates
    rows = PartitionSpec(PartitionSpec.UNCONSTRAINED, None)  # type: ignore[no-untyped-call]
    whole: Array = jax.lax.with_sharding_constraint(coefficients, rows)  # type: ignore[no-untyped-call]
    return whole


def _varies(array: Array) -> frozenset[str]:
    """The manual mesh axes along which an array is not the same on all devices."""
    kind: Any = jax.typeof(array)
    # JAX renamed the attribute after 0.8
    newer = getattr(kind, "manual_axis_type", None)
    found: frozenset[str] = kind.vma if newer is None else newer.varying
    return found


def _varying(tree: Any, axes: frozenset[str]) -> Any:
    """Arrays that are marked as different on the devices of mesh axes."""

    def mark(array: Array) -> Array:
        missing = tuple(sorted(axes - _varies(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree)


def _own_columns(kept: Array, cut: Placed) -> Array:
    size = cut.layers[1].spec.in_features
    start = jax.lax.axis_index(cut.axis) * size
    return jax.lax.dynamic_slice_in_dim(kept, start, size, 1)


def _check_same(cut: Placed, rows: Rows) -> None:
    """Refuse operands that are not the same on all devices, inside a user's ``shard_map``."""
    position = jax.lax.axis_index(cut.axis)
    if jax.lax.axis_size(cut.axis) == 1:
        return
    if cut.axis not in _varies(position):
        raise SpecError(
            f"shard_map must check what varies over the axis {cut.axis!r}; got check_vma=False, "
            "under which gradients of a layer that is cut are wrong. Leave it at its default."
        )
    sliced = cut.layers[0].spec.in_features
    named = [("x", rows.x, cut.leg_in == INPUT and rows.x.shape[-1:] == (sliced,))]
    for level, each in enumerate(rows.given):
        leaves = jax.tree.leaves(each)
        named += [(f"coefficients of level {level}", leaf, False) for leaf in leaves]
    for name, array, is_slice in named:
        if cut.axis in _varies(array) and not is_slice:
            raise ShapeError(
                f"{name} must be the same on all devices of the mesh axis {cut.axis!r}, over which "
                f"leg {cut.cut.leg!r} is cut; got one that varies. Gather it by "
                "jax.lax.all_gather(…, to='invarying'), or cut over another axis."
            )
