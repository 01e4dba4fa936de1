"""Editing single experts in place, and taking it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

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
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch._sharded import gathered, opened, stored

Editable = Mixture | MuMoEMLP | PreNormed
"""Modules that have experts by number; both layers of a block are edited together."""


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
    mixtures = _mixtures(layer)
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
    silent = check_indices(_mixtures(layer)[0].spec.experts, indices, level)
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
    mixtures = _mixtures(layer)
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
    with opened([*factors.values()]) as whole:
        arrays = dict(zip(factors, whole, strict=True))
        slices, error = fitted(spec, arrays, index, given, level, BACKEND)
        for name, found in slices.items():
            picked(arrays[name], axes[0][name], index).copy_(found)
    return error


def restored(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which experts can be edited, and after which they are as before, bit for bit.

    On leaving, also by an exception, every factor of every μMoE layer inside ``module`` gets the
    values that it had on entering, whatever happened to it. Gates and other parameters are not
    restored. It holds one copy of the factors, of sharded ones one of this process's part.

    Args:
        module: a layer, or a model with layers anywhere inside.

    Raises:
        TypeError: not a module, or one without a μMoE layer.

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
