"""Several experts merged into their mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from tensormoe._config import LayerConfig
from tensormoe._extras import missing
from tensormoe._spec import LayerSpec
from tensormoe._validation import brief, is_number
from tensormoe.backend import Array, Backend, get_backend
from tensormoe.decomposition._solve import wide
from tensormoe.editing._layers import Arrays, Config, checked
from tensormoe.editing._slices import alone, check_indices, picked, solved, with_slices
from tensormoe.errors import SpecError
from tensormoe.factorizations import Network, expert_axes, expert_leg
from tensormoe.functional import materialize
from tensormoe.functional._dtypes import cast, widened


def merge_experts(
    config: Config,
    arrays: Arrays,
    indices: Iterable[int],
    weights: Sequence[float] | None = None,
    level: int = 0,
) -> tuple[dict[str, Array], float]:
    """Replace several experts by their weighted mean, weights and biases.

    Where an expert has one array of its own, as in CP, tensor ring, tensor train, Tucker, Hadamard,
    dense experts and ``SharedDelta``, its slices are averaged and the mean is exact. With low rank,
    a shared basis or a base and deltas, it has several, and gets those that come closest to the
    mean, found as :func:`replace_expert` finds them.

    Coefficients stay as they are: merged experts are equal, and an input gets their mean as often
    as all their coefficients together say. No expert is dropped, since no logit has the sum of
    several coefficients for its own: a smaller gate would be another gate.

    Args:
        config: of a layer, or of a block, both of whose layers are edited.
        arrays: by canonical name: factors and biases. A gate's may be among them.
        indices: of the experts in their level, two at least, each once.
        weights: one per expert, not negative; equal ones unless given. Mean coefficients, as
            :func:`subgroup_coefficients` makes them, weigh experts by their use.
        level: of the hierarchy. Experts of one level are merged in all their combinations with
            experts of the others.

    Returns:
        All arrays by name, new ones where something changed, in their dtypes; and the norm of the
        difference between the merged experts and the mean over that of the mean (the norm of the
        difference itself if the mean is zero), the larger of both layers of a block. Zero where the
        mean is exact.

    Raises:
        BackendError: arrays of an unknown library, or of several.
        MissingDependencyError: experts of several arrays, and no NumPy, which fits them.
        ShapeError: arrays that are not the layer's, or a level or an index out of range.
        SpecError: not a configuration, fewer than two experts, one that is named twice, or weights
            that cannot be.

    >>> from tensormoe_numpy import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2, seed=0)
    >>> new, error = merge_experts(layer.config, layer.parameters, [0, 2], [3, 1])
    >>> merged = MuMoE.restore(layer.config, new)
    >>> mean = 0.75 * layer.expert(0)[0] + 0.25 * layer.expert(2)[0]
    >>> error, bool(abs(merged.expert(2)[0] - mean).max() < 1e-6)
    (0.0, True)
    """
    specs, backend = checked(config, arrays)
    shares = check_shares(specs[0][1].experts, indices, weights, level)
    changed, errors = {}, []
    for prefix, spec in specs:
        named = {name: arrays[prefix + name] for name in spec.shapes}
        slices, error = mean_slices(spec, named, shares, level, backend)
        axes = expert_axes(spec.network, level)
        for name, new in slices.items():
            every = dict.fromkeys(shares, new)
            changed[prefix + name] = with_slices(named[name], axes[name], every, backend)
        errors.append(error)
    return {**arrays, **changed}, max(errors)


def mean_slices(
    spec: LayerSpec,
    arrays: Mapping[str, Array],
    shares: Mapping[int, float],
    level: int,
    backend: Backend,
) -> tuple[dict[str, Array], float]:
    """Slices by name that make an expert the mean of several, and its error.

    Args:
        spec: of the layer.
        arrays: all factors and biases by name.
        shares: by the expert's index; they sum to one.
        level: of the experts.
        backend: the adapter of the arrays' library.
    """
    axes = expert_axes(spec.network, level)
    if not _is_linear(spec.network, level):
        return _fitted_mean(spec, arrays, shares, level, backend)
    found = {}
    for name, axis in axes.items():
        old = [picked(arrays[name], axis, index) for index in shares]
        found[name] = cast(_mean(old, shares, backend), old[0].dtype, backend)
    return found, 0.0


def check_shares(
    experts: tuple[int, ...],
    indices: Iterable[int],
    weights: Sequence[float] | None,
    level: int,
) -> dict[int, float]:
    """Shares of the mean by the expert's index, checked.

    Raises:
        ShapeError: a level or an index out of range.
        SpecError: fewer than two experts, one that is named twice, or weights that cannot be.
    """
    members = check_indices(experts, indices, level)
    twice = next((each for each in members if members.count(each) > 1), None)
    if len(members) < 2 or twice is not None:
        said = f"expert {twice} twice" if twice is not None else f"{len(members)}"
        raise SpecError(f"indices must name two experts at least, each once; got {said}.")
    given = [1.0] * len(members) if weights is None else _listed(weights)
    if len(given) != len(members):
        raise SpecError(
            f"weights must be one per expert, {len(members)}; got {len(given)}. Leave them out for "
            "equal ones."
        )
    for index, weight in zip(members, given, strict=True):
        if not is_number(weight) or not 0 <= weight < float("inf"):
            raise SpecError(
                f"a weight must be a finite number that is not negative; got {weight!r} for expert "
                f"{index}."
            )
    total = float(sum(given))
    if not total or not isfinite(total):
        raise SpecError(f"weights must have a sum that is finite and not zero; got {total}.")
    return {index: weight / total for index, weight in zip(members, given, strict=True)}


def _listed(weights: Sequence[float]) -> list[float]:
    if isinstance(weights, list | tuple):
        return [*weights]
    try:
        found = weights.tolist()  # type: ignore[attr-defined]
    except (AttributeError, TypeError, RuntimeError):
        found = None
    if not isinstance(found, list):
        raise SpecError(f"weights must be a sequence of numbers; got {brief(weights)}.")
    return found


def _is_linear(network: Network, level: int) -> bool:
    """Whether experts are linear in all their arrays together, but for what they share."""
    leg = expert_leg(level)
    return all(sum(leg in each.legs for each in term.factors) <= 1 for term in network.terms)


def _mean(arrays: Sequence[Array], shares: Mapping[int, float], backend: Backend) -> Array:
    """The weighted mean in float32 at least."""
    total = None
    for array, share in zip(arrays, shares.values(), strict=True):
        part = widened(array, backend) * share
        total = part if total is None else total + part
    assert total is not None
    return total


def _fitted_mean(
    spec: LayerSpec,
    arrays: Mapping[str, Array],
    shares: Mapping[int, float],
    level: int,
    backend: Backend,
) -> tuple[dict[str, Array], float]:
    """Slices of the expert that comes closest to the mean, which is built on the host."""
    if absent := missing("merging experts of several arrays", ("numpy",), "numpy"):
        raise absent
    import numpy as np

    experts = (*spec.experts[:level], 1, *spec.experts[level + 1 :])
    config, host = LayerConfig(replace(spec, experts=experts), None), get_backend("numpy")
    whole = {name: wide(array, backend) for name, array in arrays.items()}
    weight: Any = 0.0
    bias: Any = 0.0
    # entries that are not finite are refused below
    with np.errstate(all="ignore"):
        for index, share in shares.items():
            one = alone(spec, whole, index, level)
            parts = materialize(config, {f"factors.{name}": a for name, a in one.items()}, host)
            weight = weight + share * parts[0]
            bias = None if parts[1] is None else bias + share * parts[1]
    # the search goes on from the expert that counts most
    start = max(shares, key=lambda index: shares[index])
    return solved(spec, arrays, start, (weight, bias), level, backend)
