"""Editing single experts in place, and taking it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import isfinite
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._validation import brief
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import expert_axes, expert_carriers, has_common_part
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._base import Mixture
from tensormoe_torch._least_squares import fit_expert
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch._sharded import gathered, opened, stored

__all__ = ["replace_expert", "restored", "scale_experts", "silence_experts"]

Editable = Mixture | MuMoEMLP | PreNormed
"""What has experts by number; both layers of a block are edited together."""


@torch.no_grad()
def scale_experts(layer: Editable, factors: Mapping[int, float], level: int = 0) -> None:
    """Multiply experts, weights and biases, by a factor each; coefficients stay as they are.

    Parameters change in place and stay the same objects, so that optimizers go on with them. A
    backward pass through an earlier call of the layer is then an error of PyTorch's. If they are
    sharded, as by ``fully_shard``, every process makes the same call.

    Args:
        layer: a layer, a block (both of its layers, ``block.first`` for one), or a
            :class:`PreNormed` of them.
        factors: a finite factor by the expert's index in its level.
        level: of the hierarchy. An expert of one level has a part in all combinations with
            experts of the others, and all of them are scaled.

    Raises:
        TypeError: no such layer, or no mapping.
        ShapeError: a level or an index out of range.
        SpecError: a factor that is no finite number, a layer whose factors are computed, or one
            whose experts have a part in common, as a base has deltas.

    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2)
    >>> before = layer.expert(1)[0]
    >>> scale_experts(layer, {1: 0.5, 2: 2.0})
    >>> bool((layer.expert(1)[0] - 0.5 * before).abs().max() < 1e-6)
    True
    """
    mixtures = _mixtures(layer)
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"factors must map experts' indices to numbers; got {type(factors).__qualname__}."
        )
    places = _indices(mixtures[0], factors, level)
    for place, factor in zip(places, factors.values(), strict=True):
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not number or not isfinite(factor):
            raise SpecError(f"a factor must be a finite number; got {factor!r} for expert {place}.")
    with _opened(mixtures, _carriers(mixtures, level)) as carriers:
        for array, axis in carriers:
            for place, factor in zip(places, factors.values(), strict=True):
                array.select(axis, place).mul_(float(factor))


@torch.no_grad()
def silence_experts(layer: Editable, indices: int | Iterable[int], level: int = 0) -> None:
    """Set experts to zero, weights and biases; coefficients stay as they are.

    This is the intervention of Oldfield et al. 2024, section 4: an input that is routed to a
    silent expert loses that expert's share, and no other expert takes it over.

    Args:
        layer: as for :func:`scale_experts`.
        indices: of experts in their level, or one.
        level: of the hierarchy.

    Raises:
        TypeError, ShapeError, SpecError: as :func:`scale_experts`.
    """
    mixtures = _mixtures(layer)
    several = isinstance(indices, Iterable) and getattr(indices, "ndim", 1) > 0
    listed: Iterable[Any] = indices if several else [indices]  # type: ignore[assignment]
    places = _indices(mixtures[0], listed, level)
    with _opened(mixtures, _carriers(mixtures, level)) as carriers:
        for array, axis in carriers:
            for place in places:
                array.select(axis, place).zero_()


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
    """Put another expert in an expert's place: a copy of one of the layer's own, or a given matrix.

    A factorized layer can only hold matrices within what its other factors span, so a given matrix
    is replaced by the closest of those (least squares over all entries, in float64 on the CPU).
    Where an expert has several arrays of its own, as with a shared basis or a base and deltas, they
    are fitted by turns: for deltas to the truncated singular value decomposition of what the base
    lacks. Only this expert changes.

    Args:
        layer: as for :func:`scale_experts`; a given matrix needs a single layer.
        index: of the expert to replace.
        weight: (in, out), the matrix that it shall have. With several levels, one for every
            combination with experts of the other levels: (other levels' experts…, in, out).
        bias: (out,), or (other levels' experts…, out). Without it, biases are left out of the
            fit: in a factorized layer they change along with the weights.
        source: copy this expert, exactly, instead.
        level: of the hierarchy.

    Returns:
        How far the expert now is from what was given: the norm of the difference over the norm,
        weight and bias taken together. Zero for a copy.

    Raises:
        TypeError: as :func:`scale_experts`.
        ShapeError: an index, a level, a shape or a dtype that does not fit, or entries that are
            not finite.
        BackendError: no tensors.
        SpecError: both or neither of ``weight`` and ``source``, a bias that has no place, a block
            and a weight, or a layer whose factors are computed.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=64)
    >>> replace_expert(layer, 2, source=0)
    0.0
    >>> replace_expert(layer, 1, torch.eye(8, 4), torch.zeros(4)) < 1e-5
    True
    """
    mixtures = _mixtures(layer)
    (place,) = _indices(mixtures[0], [index], level)
    if (weight is None) == (source is None) or (weight is None and bias is not None):
        raise SpecError(
            "replace_expert takes either weight, with or without bias, or source; got "
            f"weight {'absent' if weight is None else 'given'}, "
            f"bias {'absent' if bias is None else 'given'}, source {source!r}."
        )
    if source is not None:
        (origin,) = _indices(mixtures[0], [source], level)
        each = [expert_axes(mixture.spec.network, level) for mixture in mixtures]
        with _opened(mixtures, each) as parts:
            for array, axis in parts:
                array.select(axis, place).copy_(array.select(axis, origin))
        return 0.0
    if len(mixtures) > 1:
        raise SpecError(
            "a block has two layers, and a weight belongs to one; got a block. Edit block.first or "
            "block.second."
        )
    mixture = mixtures[0]
    assert weight is not None
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    _check_given(mixture, weight, bias, level)
    axes = expert_axes(mixture.spec.network, level)
    factors = stored(mixture.factors, mixture.spec.shapes)
    with opened([*factors.values()]) as arrays:
        slices: dict[str, Tensor] = {
            name: array.select(axes[name], place) if name in axes else array
            for name, array in zip(factors, arrays, strict=True)
        }
        found, error = fit_expert(mixture.spec.network, level, slices, weight, bias)
        if not isfinite(error):
            raise ShapeError(
                "the layer's factors and the fitted ones must be finite; got some that are not. "
                "Train the layer in a wider dtype, or give a smaller weight."
            )
        for name, array in found.items():
            slices[name].copy_(array)
    return error


def restored(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which experts can be edited, and after which they are as before, bit for bit.

    On leaving, also by an exception, every factor of every μMoE layer inside ``module`` gets the
    values that it had on entering, whatever happened to it. Gates and other parameters are not
    restored. It holds one copy of the factors, of sharded ones one of this process's part.

    Args:
        module: a layer, or a model with layers anywhere inside.

    Raises:
        TypeError: no module, or one without a μMoE layer.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2)
    >>> before = layer(torch.ones(8))
    >>> with restored(layer):
    ...     silence_experts(layer, [0, 1, 2])
    ...     print(layer(torch.ones(8)).detach())
    tensor([0., 0., 0., 0.])
    >>> bool((layer(torch.ones(8)) == before).all())
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__qualname__}.")
    layers = [each for each in module.modules() if isinstance(each, Mixture)]
    if not layers:
        raise TypeError(f"module must be or hold a μMoE layer; got {type(module).__qualname__}.")
    return _restored(layers, [stored(each.factors, each.spec.shapes) for each in layers])


@contextmanager
def _restored(layers: list[Mixture], factors: list[dict[str, nn.Parameter]]) -> Iterator[None]:
    kept = [[each.detach().clone() for each in held.values()] for held in factors]
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, held, values in zip(layers, factors, kept, strict=True):
                stored(layer.factors, held)  # shards take the place of what the last call gathered
                for parameter, value in zip(held.values(), values, strict=True):
                    parameter.copy_(value)


def _mixtures(layer: Editable) -> list[Mixture]:
    """The layers to edit."""
    block = layer.block if isinstance(layer, PreNormed) else layer
    if isinstance(block, MuMoEMLP):
        return [block.first, block.second]
    if isinstance(block, Mixture):
        return [block]
    raise TypeError(
        "layer must be a MuMoE, MuMoEMLP, MuMoEEmbedding or PreNormed; got "
        f"{type(layer).__qualname__}. Pass the layer inside whose experts you mean."
    )


@contextmanager
def _opened(
    mixtures: list[Mixture], axes: list[Mapping[str, int]]
) -> Iterator[list[tuple[Tensor, int]]]:
    """Factors of layers to be edited in place, with the axis of the experts in each."""
    # all of them first, so that an error leaves nothing half done
    held = [stored(*pair) for pair in zip((each.factors for each in mixtures), axes, strict=True)]
    places = [axis for each in axes for axis in each.values()]
    with opened([factor for each in held for factor in each.values()]) as arrays:
        yield list(zip(arrays, places, strict=True))


def _carriers(mixtures: list[Mixture], level: int) -> list[Mapping[str, int]]:
    """By layer, the factors in which a level's experts are linear, with the axis of the experts."""
    found: list[Mapping[str, int]] = []
    for mixture in mixtures:
        network = mixture.spec.network
        if has_common_part(network, level):
            raise SpecError(
                f"experts of {mixture.spec.factorization.name} have a part in common, so that none "
                f"can be scaled or silenced alone; got a {mixture._kind} of them. Scale the "
                "experts' coefficients instead, or give what the expert shall be to replace_expert."
            )
        axes = expert_axes(network, level)
        found.append({name: axes[name] for name in expert_carriers(network, level)})
    return found


def _indices(mixture: Mixture, indices: Iterable[int], level: int) -> list[int]:
    """Indices of experts in a level, checked."""
    experts = mixture.spec.experts
    if not _lies_in(level, len(experts)):
        raise ShapeError(
            f"level must lie in [0, {len(experts)}), the layer's levels; got {brief(level)}."
        )
    found = []
    for place in indices:
        # one by one: there may be no end to them
        if not _lies_in(place, experts[level]):
            raise ShapeError(
                f"expert index must lie in [0, {experts[level]}) at level {level}; got "
                f"{brief(place)}."
            )
        found.append(as_index(place))
    return found


def _lies_in(value: Any, count: int) -> bool:
    try:
        return not isinstance(value, bool) and 0 <= as_index(value) < count
    except (TypeError, RuntimeError):
        # not an integer, or a tensor whose value is not known
        return False


def _check_given(mixture: Mixture, weight: Tensor, bias: Tensor | None, level: int) -> None:
    """A given expert must have the layer's sizes and finite entries."""
    spec = mixture.spec
    others = spec.experts[:level] + spec.experts[level + 1 :]
    if bias is not None and not spec.bias:
        raise SpecError("the layer's experts have no biases; got a bias. Leave it out.")
    given = [("weight", weight, (*others, spec.in_features, spec.out_features))]
    if bias is not None:
        given.append(("bias", bias, (*others, spec.out_features)))
    for name, array, shape in given:
        functional.check_array(array, BACKEND, name)
        if tuple(array.shape) != shape:
            raise ShapeError(f"{name} must have shape {shape}; got {tuple(array.shape)}.")
        if not array.dtype.is_floating_point:
            raise ShapeError(f"{name} must be real floating point; got {array.dtype}. Cast it.")
        bad = (~torch.isfinite(array)).nonzero()
        if len(bad):
            where = tuple(bad[0].tolist())
            raise ShapeError(f"{name} must be finite; got {float(array[where])} at {where}.")
