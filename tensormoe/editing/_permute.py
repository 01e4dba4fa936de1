"""Experts in another order."""

from __future__ import annotations

from collections.abc import Iterable

from tensormoe._config import BlockConfig
from tensormoe._validation import brief, flag
from tensormoe.backend import Array, Backend, check_array, default_integer, device_of
from tensormoe.editing._layers import Arrays, Config, checked
from tensormoe.editing._slices import check_indices
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import expert_axes


def permute_experts(
    config: Config, arrays: Arrays, order: Iterable[int], level: int = 0, *, gate: bool = True
) -> dict[str, Array]:
    """Put the experts of a level in another order, with their columns of the gate.

    The layer stays the same function, to rounding, as sums run in another order. A gate that keeps
    k of several equal logits keeps those that come first. The inverse permutation takes it back.

    Args:
        config: of a layer, or of a block, both of whose layers are edited.
        arrays: parameters by canonical name; with the gate's arrays and its buffers, if they move.
        order: the present numbers of the experts in their new order, each once: expert n becomes
            what ``order[n]`` was.
        level: of the hierarchy.
        gate: whether projections, biases and buffers of the gate move along. Without them, experts
            get the coefficients of others. False for a layer without a gate: the coefficients that
            it is given are to be permuted as well.

    Returns:
        All arrays by name, new ones where something changed.

    Raises:
        BackendError: arrays of an unknown library, or of several.
        ShapeError: arrays that are not the layer's, or without those of the gate; or a level or an
            index out of range.
        SpecError: not a configuration, an order that does not name every expert once, or a gate
            that the layer does not have.

    >>> import numpy as np
    >>> from tensormoe_numpy import MuMoE
    >>> layer, x = MuMoE(8, 4, experts=3, rank=2, seed=0), np.ones((5, 8), "float32")
    >>> new = permute_experts(layer.config, layer.arrays, [2, 0, 1])
    >>> turned = MuMoE.restore(layer.config, new)
    >>> bool(abs(turned(x) - layer(x)).max() < 1e-6)
    True
    >>> bool((turned.expert(0)[0] == layer.expert(2)[0]).all())
    True
    """
    flag(gate, "gate")
    specs, backend = checked(config, arrays)
    places = check_order(specs[0][1].experts, order, level)
    axes = {
        prefix + name: axis
        for prefix, spec in specs
        for name, axis in expert_axes(spec.network, level).items()
    }
    if gate:
        axes |= _gate_axes(config, arrays, level, backend)
    first = arrays[next(iter(axes))]
    xp = backend.namespace
    index = xp.asarray(places, dtype=default_integer(xp), device=device_of(first))
    changed = {name: backend.take(arrays[name], index, axis) for name, axis in axes.items()}
    return {**arrays, **changed}


def check_order(experts: tuple[int, ...], order: Iterable[int], level: int) -> list[int]:
    """A permutation of the experts of a level, checked.

    Raises:
        ShapeError: a level or an index out of range.
        SpecError: an order that does not name every expert once.
    """
    found = check_indices(experts, order, level)
    if len(found) != experts[level] or len({*found}) != len(found):
        raise SpecError(
            f"order must name each of the {experts[level]} experts at level {level} once; got "
            f"{brief(found)}."
        )
    return found


def no_gate() -> SpecError:
    """The error for a gate that shall move along, and is not there."""
    return SpecError(
        "the layer has no gate that could be permuted with its experts; got gate=True. Pass "
        "gate=False, and permute the coefficients that it is given alike."
    )


def is_of_level(name: str, level: int) -> bool:
    """Whether an array of a gate belongs to a level; its last axis is that of the experts.

    >>> is_of_level("gate.running_mean_1", 1), is_of_level("gate.projection_0", 1)
    (True, False)
    """
    kind, _, short = name.partition(".")
    return kind == "gate" and short.rpartition("_")[2] == str(level)


def _gate_axes(config: Config, arrays: Arrays, level: int, backend: Backend) -> dict[str, int]:
    """The axis of experts in every array of the gate, by name."""
    own = config.first if isinstance(config, BlockConfig) else config
    if own.gate is None:
        raise no_gate()
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    named = {name: shape for name, shape in shapes.items() if is_of_level(name, level)}
    block = "block" if isinstance(config, BlockConfig) else "layer"
    for name, shape in named.items():
        if name not in arrays:
            raise ShapeError(
                f"arrays must hold {name!r} of shape {shape}, as the gate is permuted with the "
                f"experts; got none. Pass all parameters and buffers of the {block}, or gate=False "
                "to permute the experts alone."
            )
        check_array(arrays[name], backend, name)
        if tuple(arrays[name].shape) != shape:
            raise ShapeError(f"{name} must have shape {shape}; got {tuple(arrays[name].shape)}.")
    return {name: len(shape) - 1 for name, shape in named.items()}
