"""The mesh that is set, and arrays on it."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tensormoe.errors import SpecError
from tensormoe_jax._specs import MeshCut

__all__ = ["checked_mesh", "kinds_of", "listed", "on_mesh", "resharded"]


def checked_mesh(cut: MeshCut) -> AbstractMesh:
    """The mesh that is set, with the axis that a layer is cut over.

    Raises:
        SpecError: no mesh is set, or it has no such axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise SpecError(
            f"a mesh must be set for legs; got {{{cut.leg!r}: {cut.axis!r}}} without one. Put the "
            "call under `with jax.set_mesh(mesh):`."
        )
    if cut.axis not in mesh.axis_names:
        names = ", ".join(map(repr, mesh.axis_names))
        raise SpecError(
            f"the mesh must have the axis that leg {cut.leg!r} is cut over; got {cut.axis!r}, and "
            f"a mesh with {names}. Name one of its axes."
        )
    return mesh


def kinds_of(mesh: AbstractMesh) -> dict[str, AxisType]:
    """The type of every axis of a mesh, by name."""
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def on_mesh(array: Any, spec: PartitionSpec) -> Any:
    """An array, a traced one or the shape of one, placed on the mesh that is set."""
    if isinstance(array, jax.ShapeDtypeStruct):
        where = NamedSharding(jax.sharding.get_mesh(), spec)
        return array.update(sharding=where)  # type: ignore[no-untyped-call]
    if not isinstance(array, jax.core.Tracer):
        return jax.device_put(array, spec)
    kinds = kinds_of(jax.sharding.get_abstract_mesh()).values()
    if AxisType.Auto in kinds:
        array = jax.lax.with_sharding_constraint(array, spec)  # type: ignore[no-untyped-call]
    return resharded(array, spec)


def resharded(array: Array, spec: PartitionSpec) -> Array:
    """An array as it lies on the explicit axes of the mesh; the compiler moves it over others."""
    kinds = kinds_of(jax.sharding.get_abstract_mesh())
    if AxisType.Explicit not in kinds.values():
        return array

    def typed(names: Any) -> tuple[str, ...] | None:
        return tuple(each for each in listed(names) if kinds[each] == AxisType.Explicit) or None

    where = PartitionSpec(*map(typed, spec))  # type: ignore[no-untyped-call]
    moved: Array = jax.sharding.reshard(array, where)  # type: ignore[no-untyped-call]
    return moved


def listed(names: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a ``PartitionSpec``."""
    return names if isinstance(names, tuple) else () if names is None else (names,)
