"""New slices for the experts of one layer, and where they go; what that takes is checked here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from operator import index as as_index
from typing import TYPE_CHECKING, Any

from tensormoe._extras import missing
from tensormoe._spec import LayerSpec
from tensormoe._validation import brief, is_number
from tensormoe.backend import Array, Backend, check_array
from tensormoe.decomposition._solve import wide
from tensormoe.editing._fit import fit_expert
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import expert_axes, expert_carriers, has_common_part
from tensormoe.functional._dtypes import cast, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray


def picked(array: Array, axis: int, index: int) -> Array:
    """The slice of one expert."""
    return array[(*(slice(None),) * axis, index, ...)]


def scaled(
    array: Array, axis: int, scales: Mapping[int, float], backend: Backend
) -> dict[int, Array]:
    """Slices times a factor each, multiplied in float32 at least; zeros for a factor of zero."""
    found = {}
    for index, scale in scales.items():
        old = picked(array, axis, index)
        if scale == 0.0:
            found[index] = backend.namespace.zeros_like(old)
        else:
            found[index] = cast(widened(old, backend) * scale, old.dtype, backend)
    return found


def fitted(
    spec: LayerSpec,
    arrays: Mapping[str, Array],
    index: int,
    given: tuple[Array, Array | None],
    level: int,
    backend: Backend,
) -> tuple[dict[str, Array], float]:
    """Slices by name that bring an expert closest to a weight and a bias, and its error.

    Args:
        spec: of the layer.
        arrays: all factors and biases by name.
        index: of the expert.
        given: the weight, and the bias or None; see :func:`tensormoe.editing.replace_expert`.
        level: of the expert.
        backend: the adapter of the arrays' library.

    Raises:
        MissingDependencyError, BackendError, ShapeError, SpecError: as
            :func:`tensormoe.editing.replace_expert`.
    """
    if absent := missing("fitting an expert", ("numpy",), "numpy"):
        raise absent
    _check_expert(spec, *given, level, backend)
    weight = _finite(given[0], "weight", level, backend)
    bias = None if given[1] is None else _finite(given[1], "bias", level, backend)
    return solved(spec, arrays, index, (weight, bias), level, backend)


def solved(
    spec: LayerSpec,
    arrays: Mapping[str, Array],
    index: int,
    target: tuple[NDArray[Any], NDArray[Any] | None],
    level: int,
    backend: Backend,
) -> tuple[dict[str, Array], float]:
    """Slices by name that bring an expert closest to a target, and its error.

    Args:
        spec: of the layer.
        arrays: all factors and biases by name.
        index: of the expert.
        target: (experts…, in, out) and (experts…, out) or None, with one expert of the level, on
            the host in float64.
        level: of the expert.
        backend: the adapter of the arrays' library.

    Raises:
        ShapeError: present or new slices that are not finite.
    """
    axes = expert_axes(spec.network, level)
    slices = alone(spec, arrays, index, level)
    found, error = fit_expert(spec.network, level, slices, *target, backend)
    return {name: picked(array, axes[name], 0) for name, array in found.items()}, error


def alone(spec: LayerSpec, arrays: Mapping[str, Array], index: int, level: int) -> dict[str, Array]:
    """The arrays of a layer that has one expert of a level alone."""
    axes = expert_axes(spec.network, level)
    return {
        name: array[(*(slice(None),) * axes[name], slice(index, index + 1), ...)]
        if name in axes
        else array
        for name, array in arrays.items()
    }


def with_slices(array: Array, axis: int, slices: Mapping[int, Array], backend: Backend) -> Array:
    """A new array, in which some slices are others."""
    xp, parts, start = backend.namespace, [], 0
    before = (slice(None),) * axis
    for index in sorted(slices):
        parts += [
            array[(*before, slice(start, index), ...)],
            xp.expand_dims(slices[index], axis=axis),
        ]
        start = index + 1
    parts.append(array[(*before, slice(start, None), ...)])
    return xp.concat(parts, axis=axis) if slices else array


def linear_axes(spec: LayerSpec, level: int) -> dict[str, int]:
    """The axis of a level's experts in the arrays that scale them, by name.

    Raises:
        SpecError: experts that have a part in common.
    """
    network = spec.network
    if has_common_part(network, level):
        raise SpecError(
            f"experts of {spec.factorization.name} have a part in common, so that none can be "
            f"scaled or silenced alone; got a layer {spec.in_features} -> {spec.out_features} of "
            "them. Scale the experts' coefficients instead, or give what the expert shall be to "
            "replace_expert."
        )
    axes = expert_axes(network, level)
    return {name: axes[name] for name in expert_carriers(network, level)}


def check_scales(
    experts: tuple[int, ...], factors: Mapping[int, float], level: int
) -> dict[int, float]:
    """Factors by index, checked.

    Raises:
        TypeError: not a mapping.
        ShapeError: a level or an index out of range.
        SpecError: a factor that is not a finite number.
    """
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"factors must map experts' indices to numbers; got {type(factors).__qualname__}."
        )
    indices = check_indices(experts, factors, level)
    for index, factor in zip(indices, factors.values(), strict=True):
        if not is_number(factor) or not isfinite(factor):
            raise SpecError(f"a factor must be a finite number; got {factor!r} for expert {index}.")
    return {k: float(factor) for k, factor in zip(indices, factors.values(), strict=True)}


def check_indices(
    experts: tuple[int, ...], indices: int | Iterable[int], level: int = 0
) -> list[int]:
    """Indices of experts in a level, or one, checked.

    Raises:
        ShapeError: a level or an index out of range.
    """
    if not _is_below(level, len(experts)):
        raise ShapeError(
            f"level must lie in [0, {len(experts)}), the layer's levels; got {brief(level)}."
        )
    several = isinstance(indices, Iterable) and getattr(indices, "ndim", 1) > 0
    listed: Iterable[Any] = indices if several else [indices]  # type: ignore[assignment]
    found = []
    for index in listed:
        # one by one: there may be no end to them
        if not _is_below(index, experts[level]):
            raise ShapeError(
                f"expert index must lie in [0, {experts[level]}) at level {level}; got "
                f"{brief(index)}."
            )
        found.append(as_index(index))
    return found


def check_source(weight: Array | None, bias: Array | None, source: int | None) -> None:
    """Refuse both or neither of a weight and the index of another expert.

    Raises:
        SpecError: that, or a bias without a weight.
    """
    if (weight is None) == (source is None) or (weight is None and bias is not None):
        raise SpecError(
            "replace_expert takes either weight, with or without bias, or source; got "
            f"weight {'absent' if weight is None else 'given'}, "
            f"bias {'absent' if bias is None else 'given'}, source {source!r}."
        )


def _is_below(value: Any, count: int) -> bool:
    try:
        return not isinstance(value, bool) and 0 <= as_index(value) < count
    except (TypeError, RuntimeError):
        # not an integer, or an array whose value is not known
        return False


def _check_expert(
    spec: LayerSpec, weight: Array, bias: Array | None, level: int, backend: Backend
) -> None:
    """Refuse an expert without the layer's sizes."""
    others = spec.experts[:level] + spec.experts[level + 1 :]
    if bias is not None and not spec.bias:
        raise SpecError("the layer's experts have no biases; got a bias. Leave it out.")
    wanted = [("weight", weight, (*others, spec.in_features, spec.out_features))]
    if bias is not None:
        wanted.append(("bias", bias, (*others, spec.out_features)))
    for name, array, shape in wanted:
        check_array(array, backend, name)
        if tuple(array.shape) != shape:
            raise ShapeError(f"{name} must have shape {shape}; got {tuple(array.shape)}.")
        if not backend.namespace.isdtype(array.dtype, "real floating"):
            raise ShapeError(f"{name} must be real floating point; got {array.dtype}. Cast it.")


def _finite(array: Array, name: str, level: int, backend: Backend) -> Any:
    """The values on the host in float64, with an axis for the one expert of a level."""
    import numpy as np

    values = wide(array, backend)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ShapeError(f"{name} must be finite; got {float(values[where])} at {where}.")
    return np.expand_dims(values, level)
