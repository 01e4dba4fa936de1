"""Starts of a search: from random factors, or from those that few experts determine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.backend import device_of
from tensormoe.decomposition._als import Factors, sweep
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._spectral import cuts, spectral
from tensormoe.factorizations import INPUT, OUTPUT, Factor, expert_leg

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

# experts that are compared, for each one that is needed
_SAMPLED = 4
# sweeps that find a tensor of rank one
_POWERS = 3
# the least that spaces of experts have to be apart, in a sine; nearer ones determine nothing
_APART = 1e-6
# entries above which a tensor is too large for the copies in float64 that are made of it
_SMALL = 2**19


def starts(structure: Structure, source: Source, count: int, rng: Generator) -> Iterator[Factors]:
    """At most ``count`` factors to start a search from, one after the other.

    Args:
        structure: the network.
        source: the tensor, or its core.
        count: of starts; one is enough where it is the best there is.
        rng: NumPy's generator.
    """
    plan = cuts(structure)
    first = spectral(structure, source)
    if first is not None:
        yield first
    if plan is None or first is None or not plan.exact:
        for index in range(first is not None, count):
            yield start(structure, source, index, rng)


def start(structure: Structure, source: Source, place: int, rng: Generator) -> Factors:
    """Factors to start a search from.

    Args:
        structure: the network.
        source: the tensor, or its core.
        place: of the start among several; every other one is random whatever the network and the
            tensor.
        rng: NumPy's generator.
    """
    fixed = given(structure, source)
    trio = None if place % 2 else _shared_basis(structure)
    if trio is not None and prod(source.shape) <= _SMALL:
        found = _from_experts(structure, source, trio, rng)
        if found is not None:
            return fixed | found
    # in the tensor's scale after the first sweep
    dtype = to_host(source.like, source.backend).dtype
    drawn = {
        factor.name: rng.standard_normal(structure.shape(factor)).astype(dtype, copy=False)
        for factor in structure.wanted
    }
    if not place % 2:
        drawn = _around(drawn, structure, source, rng)
    return fixed | {k: from_host(v, source.like, source.backend) for k, v in drawn.items()}


def _around(
    drawn: Mapping[str, NDArray[Any]], structure: Structure, source: Source, rng: Generator
) -> dict[str, NDArray[Any]]:
    """Random factors around the best rank-one tensor, weighted by how much that explains.

    Where most of a tensor is one outer product, as where all factors are positive, factors that are
    random around zero have to find that first, and end in local minima.
    """
    import numpy as np

    norm, error = source.squared_norm(), 1.0
    if norm == 0.0:
        return dict(drawn)
    modes = {f.name: tuple(x for x in f.legs if x in structure.open_legs) for f in structure.wanted}
    factors = tuple(Factor(name, legs) for name, legs in modes.items() if legs)
    one = replace(structure, factors=factors, given=())
    found: Factors = {
        each.name: from_host(rng.standard_normal(one.shape(each)), source.like, source.backend)
        for each in factors
    }
    for _ in range(_POWERS):
        found, error = sweep((one,), source, norm, found, 0)
    share = max(1.0 - error * error, 0.0)
    around = {}
    for factor in structure.wanted:
        center: NDArray[Any] | float = 1.0
        if modes[factor.name]:
            array = to_host(found[factor.name], source.backend)
            size = float(np.sqrt(np.mean(array**2)))
            shape = [n if x in modes[factor.name] else 1 for x, n in _sized(factor, structure)]
            center = array.reshape(shape) / (size or 1.0)
        around[factor.name] = share**0.5 * center + (1.0 - share) ** 0.5 * drawn[factor.name]
    return around


def _sized(factor: Factor, structure: Structure) -> list[tuple[str, int]]:
    return list(zip(factor.legs, structure.shape(factor), strict=True))


def given(structure: Structure, source: Source) -> Factors:
    """The given factors of a structure: ones, or the weights of experts."""
    found: Factors = {}
    xp, like = source.backend.namespace, source.like
    for factor in structure.given:
        if factor.legs == (expert_leg(0),) and source.weights is not None:
            found[factor.name] = source.weights
        else:
            shape = structure.shape(factor)
            found[factor.name] = xp.ones(shape, dtype=like.dtype, device=device_of(like))
    return found


def zeros(structure: Structure, source: Source) -> Factors:
    """Zeros for the wanted factors of a structure."""
    xp, like = source.backend.namespace, source.like
    return {
        factor.name: xp.zeros(structure.shape(factor), dtype=like.dtype, device=device_of(like))
        for factor in structure.wanted
    }


def _shared_basis(structure: Structure) -> tuple[Factor, Factor, Factor] | None:
    """The factors α, B, A of experts (Σ_j α[n, j] B_j) A_n, or of their transposes."""
    if len(structure.wanted) != 3:
        return None
    experts = set(structure.open_legs) - {INPUT, OUTPUT}
    for mixing, basis, own in permutations(structure.wanted, 3):
        (*bases,) = set(mixing.legs) - experts
        (*inner,) = set(own.legs) - experts - {INPUT, OUTPUT}
        if len(bases) != 1 or len(inner) != 1 or not experts <= {*mixing.legs} & {*own.legs}:
            continue
        (*modes,) = set(basis.legs) - {*bases, *inner}
        if len(modes) == 1 and len(basis.legs) == 3 and modes[0] not in (*mixing.legs, *own.legs):
            return mixing, basis, own
    return None


def _from_experts(
    structure: Structure, source: Source, trio: tuple[Factor, Factor, Factor], rng: Generator
) -> Factors | None:
    """A shared basis from the column spaces of J + 1 experts, exact where there is one.

    Alternating least squares from random factors mostly ends in a local minimum here. Column spaces
    are those of Σ_j α[n, j] B_j, which are r-dimensional in a space of J·r. Those of J experts span
    it, and in their coordinates B_j are known up to r × r matrices; those are known, up to one that
    A takes up, from one more expert. All other experts are then least-squares problems.

    Returns:
        None where experts are too few, or J·r directions do not fit into the mode.
    """
    import numpy as np

    mixing, basis, own = trio
    sizes = structure.sizes
    outer, bond = (next(leg for leg in basis.legs if leg in f.legs) for f in (mixing, own))
    bases, inner = sizes[outer], sizes[bond]
    mode = next(leg for leg in basis.legs if leg in (INPUT, OUTPUT))
    other = INPUT if mode == OUTPUT else OUTPUT
    tensor = to_host(source.block(0, source.shape[0]), source.backend).astype("float64")
    tensor = tensor.reshape(-1, *tensor.shape[-2:])
    if mode == OUTPUT:
        tensor = tensor.swapaxes(1, 2)
    count, width = len(tensor), bases * inner
    if count <= bases or width > tensor.shape[1] or inner > tensor.shape[2]:
        return None
    _, directions = np.linalg.eigh(np.tensordot(tensor, tensor, ((0, 2), (0, 2))))
    span = directions[:, ::-1][:, :width]
    experts = span.T @ tensor
    pool = list(rng.permutation(count)[: _SAMPLED * (bases + 1)])
    spaces = {n: np.linalg.svd(experts[n], full_matrices=False)[0][:, :inner] for n in pool}
    try:
        joined = _joined(pool, spaces, bases)
        parts = np.linalg.solve(joined, experts)
    except np.linalg.LinAlgError:
        return None
    # (J, r·K) of every expert is the outer product of its α and its A
    left, values, right = np.linalg.svd(
        parts.reshape(count, bases, inner * parts.shape[-1]), full_matrices=False
    )
    levels = source.shape[:-2]
    legs = [leg for leg in structure.open_legs if leg not in (INPUT, OUTPUT)]
    known = {
        mixing: ((left[..., 0] * values[:, :1]).reshape(*levels, bases), [*legs, outer]),
        basis: ((span @ joined).reshape(-1, bases, inner), [mode, outer, bond]),
        own: (right[:, 0].reshape(*levels, inner, -1), [*legs, bond, other]),
    }
    found = {}
    for factor, (array, stored) in known.items():
        axes = [stored.index(leg) for leg in factor.legs]
        found[factor.name] = from_host(array.transpose(axes), source.like, source.backend)
    return found


def _joined(pool: list[int], spaces: dict[int, NDArray[Any]], bases: int) -> NDArray[Any]:
    """B side by side (J·r, J·r), from the experts of a pool that are farthest apart."""
    import numpy as np

    chosen, spanned = [pool[0]], spaces[pool[0]]
    while len(chosen) < bases:
        rest = {n: spaces[n] - spanned @ (spanned.T @ spaces[n]) for n in pool if n not in chosen}
        far = _farthest(rest)
        chosen.append(far)
        spanned = np.concatenate([spanned, np.linalg.qr(rest[far])[0]], axis=1)
    columns = np.concatenate([spaces[n] for n in chosen], axis=1)
    inner = columns.shape[1] // bases
    turned = {
        n: np.linalg.solve(columns, spaces[n]).reshape(bases, inner, inner)
        for n in pool
        if n not in chosen
    }
    last = _farthest(turned)
    parts = [spaces[n] @ turn for n, turn in zip(chosen, turned[last], strict=True)]
    return np.concatenate(parts, axis=1)


def _farthest(found: Mapping[int, NDArray[Any]]) -> int:
    """The expert whose matrices have the largest smallest singular value.

    Raises:
        LinAlgError: none has one to speak of.
    """
    import numpy as np

    least = {
        n: float(np.linalg.svd(each, compute_uv=False)[..., -1].min()) for n, each in found.items()
    }
    best = max(least, key=lambda n: least[n])
    if least[best] < _APART:
        raise np.linalg.LinAlgError("experts are too much alike")
    return best
