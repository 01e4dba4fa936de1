"""One device's part of a layer that is cut along a leg: which entries it has, and how it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._names import block_names
from tensormoe.backend import Array, Backend
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import INPUT, OUTPUT, Cut
from tensormoe.functional._checks import Coefficients
from tensormoe.gates import OneExpert, TopK
from tensormoe.routing import spread


@dataclass(frozen=True)
class CutAxis:
    """The axis of an array that is cut into equal slices, one per device.

    Args:
        axis: that is cut.
        pieces: equal parts of the axis that are cut each; a device has its slice of all of them,
            one behind the other. 2 for what makes the halves of a gated block, 1 elsewhere.
    """

    axis: int
    pieces: int = 1

    def cut(self, array: Array, devices: int, position: int, backend: Backend) -> Array:
        """The slice of a device.

        Args:
            array: the whole one.
            devices: P, the number of slices.
            position: of the device among them.
            backend: adapter of the array's library.
        """
        size = array.shape[self.axis] // self.pieces
        step = size // devices
        starts = [piece * size + position * step for piece in range(self.pieces)]
        before = (slice(None),) * self.axis
        parts = [array[(*before, slice(start, start + step))] for start in starts]
        xp = backend.namespace
        return parts[0] if self.pieces == 1 else xp.concat(parts, axis=self.axis)


def cut_axes(config: LayerConfig | BlockConfig) -> dict[str, CutAxis | None]:
    """The axis of every parameter that is cut, by canonical name; None for whole ones.

    Args:
        config: one device's part, as ``shard`` makes it.

    Raises:
        SpecError: a whole layer.

    >>> from tensormoe import CP, LayerSpec
    >>> part = LayerConfig(LayerSpec(8, 6, 3, CP(4)), None).shard("o", 2)
    >>> {name: each for name, each in cut_axes(part).items() if each}
    {'factors.output': CutAxis(axis=0, pieces=1)}
    """
    if isinstance(config, BlockConfig):
        first, second = cut_axes(config.first), cut_axes(config.second)
        if config.gated:
            first = {name: each and replace(each, pieces=2) for name, each in first.items()}
        return block_names(first, second)
    leg = _cut(config).leg
    found: dict[str, CutAxis | None] = dict.fromkeys(config.parameter_shapes())
    for factor in config.spec.network.all_factors:
        if leg in factor.legs:
            found[f"factors.{factor.name}"] = CutAxis(factor.legs.index(leg))
    return found


def part_operands(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Coefficients,
    position: int | Array,
    backend: Backend,
) -> tuple[dict[str, Array], Array, list[Array | TopK | OneExpert]]:
    """Operands with which a device's part of a layer runs as :func:`apply_experts` does.

    The results of all devices are slices of the layer's outputs, or add up to them.

    Args:
        config: the part, as ``LayerConfig.shard`` makes it.
        parameters: the device's slices, by canonical name.
        x: (batch, in): whole, or the device's slice where the input leg is cut; or ids (batch,).
        coefficients: one entry per level: those of all experts, or dense ones of the device's.
        position: of the device among those of the cut; may be traced.
        backend: adapter of the arrays' library.

    Raises:
        ShapeError: rows of one expert each, where experts are cut.
        SpecError: a whole layer.
    """
    cut, spec, xp = _cut(config), config.spec, backend.namespace
    given, arrays = list(coefficients), dict(parameters)
    if cut.leg in spec.network.expert_legs:
        level = spec.network.expert_legs.index(cut.leg)
        given[level] = _of_experts(given[level], cut, spec.experts[level], position, backend)
        # one program runs coefficients of one form
        given = [
            spread(each, count, backend) if isinstance(each, TopK) else each
            for each, count in zip(given, spec.experts, strict=True)
        ]
    if cut.leg != INPUT:
        return arrays, x, given
    # the bias is not summed over inputs: each device adds its share
    for factor in spec.network.biases:
        name = f"factors.{factor.name}"
        arrays[name] = arrays[name] / cut.devices
    size = spec.in_features
    if not config.indexed_input:
        return arrays, _slice(x, size, cut.devices, position, backend), given
    # ids of other devices' rows count as none here: their first coefficients are zero
    here = x - position * size
    inside = (here >= 0) & (here < size)
    given[0] = _masked(given[0], inside, backend)
    return arrays, xp.where(inside, here, xp.zeros_like(here)), given


def _cut(config: LayerConfig) -> Cut:
    cut = config.spec.network.cut
    if cut is None:
        raise SpecError(
            "config must be one device's part of a layer; got a whole one. Make it by shard."
        )
    return cut


def _slice(array: Array, size: int, devices: int, position: int | Array, backend: Backend) -> Array:
    """A device's slice of the last axis, of an array that is whole or the slice already."""
    if array.shape[-1] == size or devices == 1:
        return array
    if isinstance(position, int):
        return array[..., position * size : (position + 1) * size]
    indices = backend.namespace.arange(size) + position * size
    return backend.take(array, indices, array.ndim - 1)


def _of_experts(
    given: Array | TopK | OneExpert,
    cut: Cut,
    count: int,
    position: int | Array,
    backend: Backend,
) -> Array:
    if isinstance(given, OneExpert):
        raise ShapeError(
            f"rows of one expert each need all experts; got them cut along {cut.leg!r}. Cut "
            "another leg, or give coefficients."
        )
    whole = spread(given, count * cut.devices, backend) if isinstance(given, TopK) else given
    return _slice(whole, count, cut.devices, position, backend)


def _masked(
    given: Array | TopK | OneExpert, inside: Array, backend: Backend
) -> Array | TopK | OneExpert:
    if isinstance(given, OneExpert):
        raise ShapeError(
            f"ids of one expert each need the whole table; got it cut along {INPUT!r}. Cut "
            f"another leg, such as {OUTPUT!r}, or give coefficients."
        )
    xp = backend.namespace
    values = given.values if isinstance(given, TopK) else given
    values = values * xp.astype(inside, values.dtype)[:, None]
    return TopK(given.indices, values) if isinstance(given, TopK) else values
