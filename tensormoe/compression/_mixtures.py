"""Sparse mixtures of fewer experts, from a configuration and arrays by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensormoe._validation import brief, instance
from tensormoe.backend import Array, Backend, backend_of, default_integer, device_of
from tensormoe.checkpoint import match_arrays
from tensormoe.compression._grouping import ExpertGroups
from tensormoe.compression._merging import merge_stacks
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Dense
from tensormoe.mixtures import PER_CHOICE, SparseConfig, experts_config

Arrays = Mapping[str, Array]
_EXPERTS = "experts.projections."


def merge_mixture(
    config: SparseConfig, arrays: Arrays, groups: ExpertGroups, *, align: bool = True
) -> tuple[SparseConfig, dict[str, Array]]:
    """Merge the dense experts of a sparse mixture; its router stays, and chooses as before.

    Args:
        config: of the mixture.
        arrays: all of its arrays by canonical name, of any library.
        groups: who becomes one, by :func:`group_experts`.
        align: as for :func:`merge_stacks`.

    Returns:
        Configuration and arrays of the mixture of merged experts, for ``SparseMoE.restore``.

    Raises:
        SpecError: not the configuration of a sparse mixture of dense experts that were not merged
            before.
        CheckpointError: arrays that are not the mixture's.
        ShapeError: groups of another number of experts, or entries that are not finite.
        BackendError: arrays of an unknown library, or of several.
        MissingDependencyError: without SciPy, which matches the units.

    >>> import numpy as np
    >>> from tensormoe.compression import choice_frequencies, cosine_similarity, group_experts
    >>> from tensormoe_numpy import SparseMoE
    >>> layer = SparseMoE(8, 16, experts=6, top_k=2, seed=0)
    >>> routes = layer.route(np.random.default_rng(0).standard_normal((50, 8)).astype("float32"))
    >>> frequencies = choice_frequencies(routes.top_k_index, 6)
    >>> groups = group_experts(frequencies, cosine_similarity(routes.logits), keep=3)
    >>> small = SparseMoE.restore(*merge_mixture(layer.config, layer.arrays, groups))
    >>> small.config.experts.num_experts, small.config.groups == groups.groups
    (3, True)
    """
    _checked(config, arrays)
    stacks = _stacks(config, arrays, ".factors.weight")
    biases = _stacks(config, arrays, ".factors.bias")
    merged = merge_stacks(stacks, groups, biases=biases, align=align)
    new = {
        f"{_EXPERTS}{role}{end}": each
        for found, end in zip(merged, (".factors.weight", ".factors.bias"), strict=True)
        for role, each in found.items()
    }
    return _fewer(config, len(groups.dominant), groups.groups), {**arrays, **new}


def prune_mixture(
    config: SparseConfig, arrays: Arrays, kept: Sequence[int]
) -> tuple[SparseConfig, dict[str, Array]]:
    """Keep some of the dense experts of a sparse mixture, and the router's outputs for them.

    Args:
        config: of the mixture.
        arrays: all of its arrays by canonical name, of any library.
        kept: numbers of the experts that stay, in their new order, as :func:`most_frequent` gives
            them.

    Returns:
        Configuration and arrays of the pruned mixture, for ``SparseMoE.restore``.

    Raises:
        SpecError: as :func:`merge_mixture`; or fewer experts than tokens go to.
        CheckpointError: arrays that are not the mixture's.
        ShapeError: not numbers of experts, each once.
        BackendError: arrays of an unknown library, or of several.

    >>> from tensormoe_numpy import SparseMoE
    >>> layer = SparseMoE(8, 16, experts=6, top_k=2, seed=0)
    >>> small = SparseMoE.restore(*prune_mixture(layer.config, layer.arrays, (0, 2, 5)))
    >>> small.arrays["router.projection"].shape
    (8, 3)
    """
    backend = _checked(config, arrays)
    count, places = config.experts.num_experts, list(kept)
    if not places or len({*places}) < len(places) or not {*places} <= {*range(count)}:
        raise ShapeError(
            f"kept must be numbers of experts, 0 to {count - 1}, each once; got {brief(kept)}."
        )
    xp = backend.namespace
    like = arrays["router.projection"]
    index = xp.asarray(places, dtype=default_integer(xp), device=device_of(like))
    found = dict(arrays)
    for name, array in arrays.items():
        if name.startswith(_EXPERTS):
            found[name] = backend.take(array, index, 0)
        elif name.removeprefix("router.") in PER_CHOICE:
            found[name] = backend.take(array, index, array.ndim - 1)
    return _fewer(config, len(places), None), found


def _checked(config: SparseConfig, arrays: Arrays) -> Backend:
    """Refuse what is not a sparse mixture of dense experts; the library of its arrays."""
    instance(config, SparseConfig, "config", "that of a SparseMoE", SpecError)
    instance(arrays, Mapping, "arrays", "a mapping from canonical names to arrays", SpecError)
    kinds = [layer.spec.factorization for layer in config.experts.layers.values()]
    factorized = next((each for each in kinds if each.name != Dense.name), None)
    if factorized is not None:
        raise SpecError(
            f"experts must be dense to become fewer; got {factorized}. Merge or prune first, and "
            "factorize what is left."
        )
    if config.groups is not None:
        raise SpecError(
            "experts must not have been merged before; these were. Start from the original ones."
        )
    match_arrays({**config.parameter_shapes(), **config.buffer_shapes()}, arrays)
    return backend_of(*arrays.values())


def _stacks(config: SparseConfig, arrays: Arrays, end: str) -> dict[str, Array]:
    names = {role: f"{_EXPERTS}{role}{end}" for role in config.experts.layers}
    return {role: arrays[name] for role, name in names.items() if name in arrays}


def _fewer(config: SparseConfig, count: int, groups: tuple[int, ...] | None) -> SparseConfig:
    old = config.experts
    experts = experts_config(
        old.in_features,
        old.hidden_features,
        old.out_features,
        count,
        kind=old.kind,
        act_layer=old.act_layer,
        bias=old.down.bias,
    )
    return replace(config, experts=experts, groups=groups)
