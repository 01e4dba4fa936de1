"""Editing experts in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from tensormoe._validation import flag
from tensormoe.editing._merge import check_shares, mean_slices
from tensormoe.editing._permute import check_order, is_of_level, no_gate
from tensormoe.editing._slices import (
    check_indices,
    check_scales,
    check_source,
    fitted,
    linear_axes,
    picked,
    scaled,
)
from tensormoe.errors import SpecError
from tensormoe.factorizations import expert_axes
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._base import Mixture
from tensormoe_torch._editable import Editable, gate_arrays, gate_of, mixtures_of
from tensormoe_torch._sharded import gathered, opened, stored


@torch.no_grad()
def scale_experts(layer: Editable, factors: Mapping[int, float], level: int = 0) -> None:
    """Multiply experts, weights and biases, by a factor each; coefficients stay as they are.

    This and the functions below are :mod:`tensormoe.editing` in place: parameters change and stay
    the same objects, so that optimizers go on with them. A backward pass through an earlier call of
    the layer is then an error of PyTorch's. If they are sharded, as by ``fully_shard``, every
    process makes the same call.

    Args:
        layer: a layer, a block (both of its layers, ``block.first`` for one), or a
            :class:`PreNormed` of them.
        factors: a finite factor by the expert's index in its level. Zero leaves zeros, whatever
            there was.
        level: of the hierarchy. An expert of one level has a part in all combinations with
            experts of the others, and all of them are scaled.

    Raises:
        TypeError: not such a layer, or not a mapping.
        ShapeError: a level or an index out of range.
        SpecError: a factor that is not a finite number, a layer whose factors are computed, or one
            whose experts have a part in common, as deltas have a base.

    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2)
    >>> before = layer.expert(1)[0]
    >>> scale_experts(layer, {1: 0.5, 2: 2.0})
    >>> bool((layer.expert(1)[0] - 0.5 * before).abs().max() < 1e-6)
    True
    """
    mixtures = mixtures_of(layer)
    scales = check_scales(mixtures[0].spec.experts, factors, level)
    axes = [linear_axes(each.spec, level) for each in mixtures]
    _write(mixtures, axes, lambda array, axis: scaled(array, axis, scales, BACKEND))


def silence_experts(layer: Editable, indices: int | Iterable[int], level: int = 0) -> None:
    """Set experts to zero, as :func:`tensormoe.editing.silence_experts` in place.

    Args:
        layer: as for :func:`scale_experts`.
        indices: of experts in their level, or one.
        level: of the hierarchy.

    Raises:
        TypeError, ShapeError, SpecError: as :func:`scale_experts`.
    """
    silent = check_indices(mixtures_of(layer)[0].spec.experts, indices, level)
    scale_experts(layer, dict.fromkeys(silent, 0.0), level)


@torch.no_grad()
def replace_expert(
    layer: Editable,
    index: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    source: int | None = None,
    level: int = 0,
) -> float:
    """Replace an expert, as :func:`tensormoe.editing.replace_expert` in place.

    Args:
        layer: as for :func:`scale_experts`; a given matrix needs a single layer.
        index: of the expert to replace.
        weight: (in, out), or (other levels' experts…, in, out); the closest matrix that the layer
            can hold takes the expert's place.
        bias: (out,), or (other levels' experts…, out). Without it, biases are left out of the
            fit: in a factorized layer they change along with the weights.
        source: copy this expert, exactly, instead.
        level: of the hierarchy.

    Returns:
        The norm of the difference between the expert and what was given over the norm of the
        latter, weight and bias taken together. Zero for a copy.

    Raises:
        TypeError: as :func:`scale_experts`.
        MissingDependencyError: a matrix, and no NumPy, which solves for it.
        ShapeError: an index, a level, a shape or a dtype that does not fit, or entries that are
            not finite.
        BackendError: not tensors.
        SpecError: both or neither of ``weight`` and ``source``, a bias for a layer without biases,
            a block and a weight, or a layer whose factors are computed.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=64)
    >>> replace_expert(layer, 2, source=0)
    0.0
    >>> replace_expert(layer, 1, torch.eye(8, 4), torch.zeros(4)) < 1e-5
    True
    """
    mixtures = mixtures_of(layer)
    (index,) = check_indices(mixtures[0].spec.experts, [index], level)
    check_source(weight, bias, source)
    axes = [expert_axes(each.spec.network, level) for each in mixtures]
    if source is not None:
        (origin,) = check_indices(mixtures[0].spec.experts, [source], level)
        _write(mixtures, axes, lambda array, axis: {index: picked(array, axis, origin)})
        return 0.0
    if len(mixtures) > 1:
        raise SpecError(
            "a block has two layers, and a weight belongs to one; got a block. Edit block.first or "
            "block.second."
        )
    spec, factors = mixtures[0].spec, stored(mixtures[0].factors, mixtures[0].spec.shapes)
    assert weight is not None
    given = gathered(weight), None if bias is None else gathered(bias)
    with opened([*factors.values()], [spec.shapes[name] for name in factors]) as whole:
        arrays = dict(zip(factors, whole, strict=True))
        slices, error = fitted(spec, arrays, index, given, level, BACKEND)
        for name, found in slices.items():
            picked(arrays[name], axes[0][name], index).copy_(found)
    return error


@torch.no_grad()
def merge_experts(
    layer: Editable,
    indices: Iterable[int],
    weights: Sequence[float] | None = None,
    level: int = 0,
) -> float:
    """Replace several experts by their mean, as :func:`tensormoe.editing.merge_experts` in place.

    Args:
        layer: as for :func:`scale_experts`.
        indices: of the experts in their level, two at least, each once.
        weights: one per expert, not negative; equal ones unless given.
        level: of the hierarchy.

    Returns:
        The norm of the difference between the merged experts and the mean over that of the mean,
        the larger of both layers of a block. Zero where the mean is exact: all factorizations but
        ``SharedBasis`` and ``BaseDelta``.

    Raises:
        TypeError: as :func:`scale_experts`.
        MissingDependencyError: experts of several arrays, and no NumPy, which fits them.
        ShapeError: a level or an index out of range.
        SpecError: fewer than two experts, one that is named twice, weights that cannot be, or a
            layer whose factors are computed.

    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2)
    >>> merge_experts(layer, [0, 2])
    0.0
    >>> bool((layer.expert(0)[0] == layer.expert(2)[0]).all())
    True
    """
    mixtures = mixtures_of(layer)
    shares = check_shares(mixtures[0].spec.experts, indices, weights, level)
    held = [stored(each.factors, each.spec.shapes) for each in mixtures]
    with opened([factor for each in held for factor in each.values()]) as arrays:
        whole = iter(arrays)
        named = [dict(zip(each, islice(whole, len(each)), strict=True)) for each in held]
        # all of them first, so that an error leaves nothing half done
        found = [
            mean_slices(each.spec, values, shares, level, BACKEND)
            for each, values in zip(mixtures, named, strict=True)
        ]
        for each, values, (slices, _) in zip(mixtures, named, found, strict=True):
            axes = expert_axes(each.spec.network, level)
            for name, new in slices.items():
                for index in shares:
                    picked(values[name], axes[name], index).copy_(new)
    return max(error for _, error in found)


@torch.no_grad()
def permute_experts(
    layer: Editable, order: Iterable[int], level: int = 0, *, gate: bool = True
) -> None:
    """Put experts in another order, as :func:`tensormoe.editing.permute_experts` in place.

    What an optimizer keeps about single parameters, such as Adam's moments, stays where it is: make
    a new one.

    Args:
        layer: as for :func:`scale_experts`.
        order: the present numbers of the experts in their new order, each once.
        level: of the hierarchy.
        gate: whether projections, biases and buffers of the layer's gate move along, so that the
            layer stays the same function. False for a layer without one, such as a block's first.

    Raises:
        TypeError: as :func:`scale_experts`.
        ShapeError: a level or an index out of range.
        SpecError: an order that does not name every expert once, a gate that the layer does not
            have, or a layer whose factors, or whose gate's parameters, are computed.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> layer, x = MuMoE(8, 4, experts=3, rank=2), torch.ones(8)
    >>> before = layer(x)
    >>> permute_experts(layer, [2, 0, 1])
    >>> bool((layer(x) - before).abs().max() < 1e-6)
    True
    """
    flag(gate, "gate")
    mixtures, own = mixtures_of(layer), gate_of(layer)
    places = check_order(mixtures[0].spec.experts, order, level)
    if gate and own is None:
        raise no_gate()
    axes: list[tuple[Tensor, int]] = []
    for each in mixtures:
        named = expert_axes(each.spec.network, level)
        axes += [(held, named[name]) for name, held in stored(each.factors, named).items()]
    if own is not None and gate:
        names = [name for name in own.config.parameter_shapes() if is_of_level(name, level)]
        stored(own, [name.partition(".")[2] for name in names])
        moved = gate_arrays(own)
        axes += [
            (held, held.ndim - 1)
            for name, held in moved.items()
            if is_of_level(f"gate.{name}", level)
        ]
    with opened([array for array, _ in axes]) as arrays:
        for array, (_, axis) in zip(arrays, axes, strict=True):
            array.copy_(array.index_select(axis, torch.tensor(places, device=array.device)))


def _write(
    mixtures: list[Mixture],
    axes: Sequence[Mapping[str, int]],
    change: Callable[[Tensor, int], Mapping[int, Tensor]],
) -> None:
    """Write new slices into the factors that have an axis of experts, in place."""
    # all of them first, so that an error leaves nothing half done
    held = [stored(*pair) for pair in zip((each.factors for each in mixtures), axes, strict=True)]
    with opened([factor for each in held for factor in each.values()]) as arrays:
        places = [axis for each in axes for axis in each.values()]
        for array, axis in zip(arrays, places, strict=True):
            for index, found in change(array, axis).items():
                picked(array, axis, index).copy_(found)
