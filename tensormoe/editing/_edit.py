"""Edits as functions of a configuration and arrays by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tensormoe.backend import Array
from tensormoe.editing._layers import Arrays, Config, checked, edited
from tensormoe.editing._slices import (
    check_indices,
    check_scales,
    check_source,
    fitted,
    linear_axes,
    picked,
    scaled,
    with_slices,
)
from tensormoe.errors import SpecError
from tensormoe.factorizations import expert_axes


def scale_experts(
    config: Config, arrays: Arrays, factors: Mapping[int, float], level: int = 0
) -> dict[str, Array]:
    """Multiply experts, weights and biases, by a factor each; coefficients stay as they are.

    Args:
        config: of a layer, or of a block, both of whose layers are edited.
        arrays: by canonical name: factors and biases. A gate's may be among them.
        factors: a finite factor by the expert's index in its level. Zero leaves zeros, whatever
            there was.
        level: of the hierarchy. An expert of one level has a part in all combinations with
            experts of the others, and all of them are scaled.

    Returns:
        All arrays by name, new ones where something changed, in their dtypes.

    Raises:
        TypeError: ``factors`` is not a mapping.
        BackendError: arrays of an unknown library, or of several.
        ShapeError: arrays that are not the layer's, or a level or an index out of range.
        SpecError: not a configuration, a factor that is not a finite number, or experts that have
            a part in common, as deltas have a base.

    >>> import numpy as np
    >>> from tensormoe_numpy import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2, seed=0)
    >>> new = scale_experts(layer.config, layer.parameters, {0: 0.5, 2: -1.0})
    >>> new["factors.expert_0"] / layer.parameters["factors.expert_0"]
    array([[ 0.5,  0.5],
           [ 1. ,  1. ],
           [-1. , -1. ]], dtype=float32)
    """
    specs, backend = checked(config, arrays)
    scales = check_scales(specs[0][1].experts, factors, level)
    return edited(
        specs,
        arrays,
        lambda spec: linear_axes(spec, level),
        lambda array, axis: with_slices(array, axis, scaled(array, axis, scales, backend), backend),
    )


def silence_experts(
    config: Config, arrays: Arrays, indices: int | Iterable[int], level: int = 0
) -> dict[str, Array]:
    """Set experts to zero, weights and biases; coefficients stay as they are.

    This is the intervention of Oldfield et al. 2024, section 4: an input that is routed to a
    silent expert loses that expert's share, and no other expert takes it over.

    Args:
        config: as for :func:`scale_experts`.
        arrays: as for :func:`scale_experts`.
        indices: of experts in their level, or one.
        level: of the hierarchy.

    Returns:
        As :func:`scale_experts`.

    Raises:
        BackendError, ShapeError, SpecError: as :func:`scale_experts`.
    """
    specs, _ = checked(config, arrays)
    silent = check_indices(specs[0][1].experts, indices, level)
    return scale_experts(config, arrays, dict.fromkeys(silent, 0.0), level)


def replace_expert(
    config: Config,
    arrays: Arrays,
    index: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    source: int | None = None,
    level: int = 0,
) -> tuple[dict[str, Array], float]:
    """Replace an expert by a copy of another one of the layer, or by a given matrix.

    A factorized layer can only hold matrices within what its other factors span, so a given matrix
    is replaced by the closest of those (least squares over all entries, on the host in float64).
    Where an expert has several arrays of its own, as with a shared basis or a base and deltas, they
    are fitted by turns: for deltas to the truncated singular value decomposition of what the base
    lacks. Only this expert changes.

    Args:
        config: as for :func:`scale_experts`; a given matrix needs a single layer.
        arrays: as for :func:`scale_experts`.
        index: of the expert to replace.
        weight: (in, out), the matrix that it shall have. With several levels, one for every
            combination with experts of the other levels: (other levels' experts…, in, out).
        bias: (out,), or (other levels' experts…, out). Without it, biases are left out of the
            fit: in a factorized layer they change along with the weights.
        source: copy this expert, exactly, instead.
        level: of the hierarchy.

    Returns:
        All arrays by name, new ones where something changed; and the norm of the difference between
        the expert and what was given over the norm of the latter, weight and bias taken together
        (the norm of the difference itself if zeros were given). Zero for a copy.

    Raises:
        MissingDependencyError: a matrix, and no NumPy, which solves for it.
        BackendError: arrays of an unknown library, or of several.
        ShapeError: arrays that are not the layer's, an index, a level, a shape or a dtype that does
            not fit, or entries that are not finite.
        SpecError: not a configuration, both or neither of ``weight`` and ``source``, a bias for a
            layer without biases, or a block and a weight.

    >>> import numpy as np
    >>> from tensormoe_numpy import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=64, seed=0)
    >>> target = np.eye(8, 4, dtype="float32")
    >>> new, error = replace_expert(layer.config, layer.parameters, 1, target)
    >>> error < 1e-5
    True
    """
    specs, backend = checked(config, arrays)
    (index,) = check_indices(specs[0][1].experts, [index], level)
    check_source(weight, bias, source)
    if weight is None:
        (origin,) = check_indices(specs[0][1].experts, [source], level)  # type: ignore[list-item]
        found = edited(
            specs,
            arrays,
            lambda spec: expert_axes(spec.network, level),
            lambda array, axis: with_slices(
                array, axis, {index: picked(array, axis, origin)}, backend
            ),
        )
        return found, 0.0
    if len(specs) > 1:
        raise SpecError(
            "a block has two layers, and a weight belongs to one; got the configuration of a "
            "block. Edit its first or its second layer, with config.first or config.second."
        )
    spec = specs[0][1]
    named = {name: arrays[f"factors.{name}"] for name in spec.shapes}
    slices, error = fitted(spec, named, index, (weight, bias), level, backend)
    axes = expert_axes(spec.network, level)
    changed = {
        f"factors.{name}": with_slices(named[name], axes[name], {index: new}, backend)
        for name, new in slices.items()
    }
    return {**arrays, **changed}, error
