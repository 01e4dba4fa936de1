"""Placement of arrays on a mesh: the leg of a layer that a mesh axis cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from tensormoe._validation import brief
from tensormoe.checkpoint import check_config
from tensormoe.errors import SpecError
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.functional import BlockConfig, CutAxis, LayerConfig, cut_axes
from tensormoe.mixtures import MixtureConfig

__all__ = [
    "HIDDEN",
    "Legs",
    "MeshCut",
    "cut_of",
    "has_leg",
    "leg_of",
    "no_layer",
    "partition_specs",
    "spec_of",
]

Legs = Mapping[str, str]
"""The leg that is cut, with the mesh axis that it is cut over: ``{"r": "model"}``."""

HIDDEN = "hidden"
"""The leg between the layers of a block, or of experts."""

Config = LayerConfig | BlockConfig | MixtureConfig


@dataclass(frozen=True)
class MeshCut:
    """A leg, cut over an axis of a mesh.

    Args:
        leg: as ``spec.network`` names it, or ``"hidden"``.
        axis: of the mesh.
    """

    leg: str
    axis: str


def partition_specs(config: Config, legs: Legs) -> dict[str, PartitionSpec]:
    """Placement of every array of a layer that is cut along a leg, by canonical name.

    Factors with the leg are cut along that axis; the others, the gate and its buffers are whole on
    every device.

    Args:
        config: a layer, a block, or a mixture of experts.
        legs: one leg and the mesh axis: ``{"r": "model"}``, with a leg of ``spec.network``; of a
            block, ``{"hidden": "model"}``. Of a mixture, the leg of all its layers that have it, or
            the hidden leg of its experts.

    Returns:
        What :class:`jax.sharding.NamedSharding` takes beside the mesh.

    Raises:
        SpecError: no such leg, one that cannot be cut, or several.

    >>> from tensormoe import CP, LayerSpec
    >>> from tensormoe.functional import LayerConfig
    >>> config = LayerConfig(LayerSpec(8, 6, 3, CP(4)), None)
    >>> tuple(partition_specs(config, {"r": "model"})["factors.output"])
    (None, 'model')
    """
    check_config(config)
    cut = leg_of(legs)
    names = [*config.parameter_shapes(), *config.buffer_shapes()]
    specs = {name: PartitionSpec() for name in names}  # type: ignore[no-untyped-call]
    if not isinstance(config, MixtureConfig):
        axes = cut_axes(cut_of(config, cut, 1))
    else:
        axes = _mixture_axes(config, cut)
    return specs | {name: spec_of(axis, cut) for name, axis in axes.items()}


def leg_of(legs: Any) -> MeshCut:
    """The one leg that is cut.

    Raises:
        SpecError: none, several, or names that are not text.
    """
    if isinstance(legs, MeshCut):
        return legs
    if not isinstance(legs, Mapping) or not all(
        isinstance(each, str) for pair in legs.items() for each in pair
    ):
        raise SpecError(
            f"legs must name a leg and a mesh axis; got {brief(legs)}. Pass {{'r': 'model'}}, for "
            "instance."
        )
    if len(legs) != 1:
        raise SpecError(
            f"legs must be one, since a layer is cut along one leg; got {len(legs)}: "
            f"{brief(dict(legs))}. Keep one of them."
        )
    return MeshCut(*next(iter(legs.items())))


def cut_of(
    config: LayerConfig | BlockConfig, cut: MeshCut, devices: int
) -> LayerConfig | BlockConfig:
    """One device's part of a layer or block.

    Raises:
        SpecError: no such leg, or one that does not divide.
    """
    if isinstance(config, LayerConfig):
        return config.shard(cut.leg, devices)
    if cut.leg != HIDDEN:
        raise SpecError(
            f"the leg of a block must be {HIDDEN!r}, which is between its layers; got {cut.leg!r}. "
            "Other legs are those of single layers."
        )
    return config.shard(devices)


def spec_of(axis: CutAxis | None, cut: MeshCut) -> PartitionSpec:
    """Placement of an array that is cut along one of its axes, if any."""
    before = () if axis is None else (*(None,) * axis.axis, cut.axis)
    return PartitionSpec(*before)  # type: ignore[no-untyped-call]


def _mixture_axes(config: MixtureConfig, cut: MeshCut) -> dict[str, CutAxis | None]:
    found: dict[str, CutAxis | None] = {}
    for name, layer in config.layers.items():
        leg = _hidden_leg(config, name) if cut.leg == HIDDEN else cut.leg
        if leg in layer.spec.network.shardable_legs:
            axes = cut_axes(layer.shard(leg, 1))
            found |= {f"{name}.{each}": axis for each, axis in axes.items()}
    if not found:
        legs = {leg for each in config.layers.values() for leg in each.spec.network.shardable_legs}
        raise SpecError(
            f"the leg of a mixture must be one of its layers', or {HIDDEN!r} if its experts have "
            f"two; got {cut.leg!r} for {', '.join(map(repr, sorted(legs)))}. Take another one."
        )
    return found


def _hidden_leg(config: MixtureConfig, name: str) -> str | None:
    """The hidden leg in a layer of experts, by the roles of their layers."""
    group, _, role = name.rpartition(".")
    pair = {each.rpartition(".")[2] for each in config.layers if each.startswith(f"{group}.")}
    if len(pair) < 2:
        return None
    return INPUT if role == "down_proj" else OUTPUT


def has_leg(config: LayerConfig | BlockConfig, cut: MeshCut) -> bool:
    """Whether a layer of a model is among those that have a leg."""
    if isinstance(config, BlockConfig):
        return cut.leg == HIDDEN
    return cut.leg in config.spec.network.shardable_legs


def no_layer(cut: MeshCut, configs: Sequence[LayerConfig | BlockConfig]) -> SpecError:
    """The error of a model none of whose layers has a leg."""
    known: dict[str, None] = {}
    for config in configs:
        legs = (HIDDEN,) if isinstance(config, BlockConfig) else config.spec.network.shardable_legs
        known |= dict.fromkeys(legs)
    found = f"layers with {', '.join(map(repr, known))}" if known else "no layer of tensormoe"
    return SpecError(
        f"legs must name a leg of a layer in the model; got {cut.leg!r}, and {found}. Name one of "
        "their legs."
    )
