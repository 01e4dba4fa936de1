"""Layers of a model, cut over a mesh axis."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import PartitionSpec

from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax import _specs
from tensormoe_jax._mesh import checked_mesh, on_mesh
from tensormoe_jax._specs import Legs, MeshCut, cut_of, has_leg, leg_of, no_layer
from tensormoe_jax.equinox._base import Mixture
from tensormoe_jax.equinox._mlp import Pair

__all__ = ["parallelize", "partition_specs"]

T = TypeVar("T")


def parallelize(model: T, legs: Legs) -> T:
    """A model whose layers are cut along one leg over an axis of the mesh that is set.

    It applies to every block for ``{"hidden": "model"}``, and otherwise to every layer that has the
    leg, blocks left out. The arrays of the model are placed on the mesh, as :func:`partition_specs`
    says, and a call runs each device's part with one sum over the axis. Inside of
    ``equinox.filter_jit``, placing is a constraint for the compiler.

    A layer stays what it is: its ``config``, its checkpoints and its ``repr`` are the whole one's.
    Calls need the mesh.

    Args:
        model: a layer, or any pytree with layers of tensormoe inside.
        legs: one leg and the mesh axis: ``{"r": "model"}``, with a leg of ``spec.network``, or
            ``{"hidden": "model"}``.

    Raises:
        SpecError: no mesh, no such axis; no layer with the leg, or one whose leg is not a multiple
            of the axis.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> from tensormoe_jax.equinox import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2, key=jax.random.key(0))
    >>> with jax.set_mesh(jax.make_mesh((1,), ("model",))):
    ...     cut = parallelize(layer, {"r": "model"})
    ...     y = eqx.filter_jit(cut)(jnp.ones((5, 8)))
    >>> cut.legs, tuple(cut.factors["input"].sharding.spec)
    ({'r': 'model'}, (None, 'model'))
    """
    cut = leg_of(legs)
    devices = checked_mesh(cut).shape[cut.axis]
    for config in _chosen(model, cut):
        cut_of(config, cut, devices)
    specs = partition_specs(model, legs)
    placed = jax.tree.map(
        lambda leaf, spec: on_mesh(leaf, spec) if spec is not None else leaf,
        model,
        specs,
        is_leaf=lambda leaf: leaf is None,
    )
    made: T = jax.tree.map(lambda node: _marked(node, cut), placed, is_leaf=_is_layer)
    return made


def partition_specs(model: T, legs: Legs) -> T:
    """Placement of every array of a model, in its structure.

    Arrays of layers with the leg are placed as :func:`tensormoe_jax.partition_specs` says, all
    others are whole on every device.

    Args:
        model: any pytree, with layers of tensormoe anywhere inside.
        legs: as for :func:`parallelize`.

    Returns:
        The model with a ``jax.sharding.PartitionSpec`` in the place of every array, and None in
        that of everything else.

    Raises:
        SpecError: no layer with the leg.

    >>> import jax
    >>> from tensormoe_jax.equinox import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2, key=jax.random.key(0))
    >>> tuple(partition_specs(layer, {"r": "model"}).factors["input"])
    (None, 'model')
    """
    cut = leg_of(legs)
    _chosen(model, cut)

    def of_node(node: Any) -> Any:
        if _is_layer(node) and has_leg(node.config, cut):
            found = _specs.partition_specs(node.config, legs)
            whole = jax.tree.map(_whole, node)
            prefixes = ("first.", "second.") if isinstance(node, Pair) else ("",)
            named = tuple(
                {name: found[f"{prefix}factors.{name}"] for name in factors}
                for prefix, factors in zip(prefixes, _factors(node), strict=True)
            )
            return eqx.tree_at(_factors, whole, named)
        return jax.tree.map(_whole, node)

    made: T = jax.tree.map(of_node, model, is_leaf=_is_layer)
    return made


def _chosen(model: Any, cut: MeshCut) -> list[LayerConfig | BlockConfig]:
    """Configurations of the layers that are cut."""
    nodes = jax.tree.leaves(model, is_leaf=_is_layer)
    configs = [node.config for node in nodes if _is_layer(node)]
    found = [config for config in configs if has_leg(config, cut)]
    if not found:
        raise no_layer(cut, configs)
    return found


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mixture | Pair)


def _factors(layer: Mixture | Pair) -> tuple[Any, ...]:
    """Factors of each layer; gates are whole."""
    return (
        (layer.first.factors, layer.second.factors) if isinstance(layer, Pair) else (layer.factors,)
    )


def _whole(leaf: Any) -> PartitionSpec | None:
    return PartitionSpec() if eqx.is_array(leaf) else None  # type: ignore[no-untyped-call]


def _marked(node: Any, cut: MeshCut) -> Any:
    if not _is_layer(node) or not has_leg(node.config, cut):
        return node
    made = copy.copy(node)
    # no field that is differentiated, and no other door to a module that exists
    object.__setattr__(made, "cut", cut)
    return made
