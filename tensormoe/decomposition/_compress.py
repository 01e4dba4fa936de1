"""A tensor to a small core: input and output modes onto the subspaces that a network can fill.

A factor with bonds of size r next to a mode of size I > r fills a subspace of dimension r at most.
The tensor's own leading subspace of that size is found by a randomized range finder with power
iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4); there the search for factors is the same
problem on a smaller tensor. Where all factors have the experts, as those of a low-rank product per
expert do, the problem falls apart into one for each, with subspaces of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.backend import Array, Backend
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._matrices import Operator, along
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source, joined
from tensormoe.factorizations import INPUT, OUTPUT, Leg

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

# a core of more than this share of a mode is not worth the detour
_WORTH = 0.8
# directions beyond the wanted ones, so that those are found whole
_SPARE = 8
_POWERS = 1

PASSES = 1 + _POWERS
"""Times that a tensor is read there and back for each basis."""

# of the tensor, that its core may be before directions are left out, and of what the core lacks
# that they may hold
_SHARE, _SPARED = 0.15, 0.25
# copies of the factors that a search holds: a core that is no larger is not what takes memory
_COPIES = 3


@dataclass(frozen=True, eq=False)
class Core:
    """A compressed tensor.

    Args:
        structure: the network on the core.
        source: the core.
        bases: orthonormal columns (size, smaller size) by leg; (N, size, smaller size) of experts
            that are apart.
    """

    structure: Structure
    source: Source
    bases: Mapping[Leg, Array]


def compress(structure: Structure, source: Source, squared_norm: float, rng: Generator) -> Core:
    """The core of a tensor for a network; the tensor itself where compression gains nothing.

    A core that would be large beside tensor and factors leaves out directions that hold little next
    to what it lacks anyway: sweeps on the tensor itself find them.
    """
    backend = source.backend
    sizes, counts = structure.sizes, core_counts(structure)
    if not counts:
        return Core(structure, source, {})
    if falls_apart(structure):
        return _apart(structure, source, counts, rng)
    wide = replace(structure, size_items=tuple((sizes | counts).items()))
    held = sum(prod(wide.shape(factor)) for factor in structure.wanted)
    share = max(_SHARE, min(1.0, _COPIES * held / prod(source.shape)))
    bases: dict[Leg, Array] = {}
    for leg, count in counts.items():
        operators = partial(_operators, source, leg, bases.get(INPUT))
        basis, squares = _range(operators, source.like, backend, count, rng)
        least = max(round(share ** (1 / len(counts)) * sizes[leg]), _needed(structure, leg))
        bases[leg] = from_host(
            basis[:, : _enough(squares, least, squared_norm)], source.like, backend
        )
    sides = {leg: basis.shape[1] for leg, basis in bases.items()}
    projections = (_projected(each, bases, backend) for each in source.operators())
    return _core(structure, source, bases, sides, projections)


def _apart(structure: Structure, source: Source, counts: Mapping[Leg, int], rng: Generator) -> Core:
    """The core of experts that share no factor, each in subspaces of its own."""
    import numpy as np

    backend, shape = source.backend, source.shape
    count = prod(shape[:-2])
    found: dict[Leg, list[Array]] = {leg: [] for leg in counts}

    def leading(each: Operator, leg: Leg) -> NDArray[Any]:
        columns, _ = _range(lambda: (each,), source.like, backend, counts[leg], rng)
        return columns

    def kept(leg: Leg, columns: NDArray[Any]) -> Array:
        found[leg].append(from_host(columns, source.like, backend))
        return found[leg][-1]

    def projected(each: Operator) -> Array:
        if INPUT not in counts:
            return each.times(kept(OUTPUT, leading(each.transposed, OUTPUT)))
        basis = kept(INPUT, leading(each, INPUT))
        matrix = each.after(backend.permute(basis, (1, 0)))
        if OUTPUT not in counts:
            return matrix
        # as many rows as there are directions: all of them
        columns, rest = np.linalg.qr(to_host(matrix, backend).T)
        kept(OUTPUT, columns)
        return from_host(rest.T, source.like, backend)

    core = _core(structure, source, {}, counts, map(projected, source.operators()))
    bases: dict[Leg, Array] = {}
    for leg, listed in found.items():
        rows = joined(listed, 0, count * listed[0].shape[0], backend)
        bases[leg] = backend.reshape(rows, (count, *listed[0].shape))
        listed.clear()
    return replace(core, bases=bases)


def _core(
    structure: Structure,
    source: Source,
    bases: Mapping[Leg, Array],
    sides: Mapping[Leg, int],
    projections: Iterable[Array],
) -> Core:
    """A core of projections, expert by expert."""
    small = tuple((leg, sides.get(leg, size)) for leg, size in structure.size_items)
    after = replace(structure, size_items=small)
    shape = tuple(after.sizes[leg] for leg in after.open_legs)
    rows = joined(projections, 0, prod(shape[:-1]), source.backend)
    return Core(after, Source(source.backend.reshape(rows, shape), source.backend), bases)


def _projected(each: Operator, bases: Mapping[Leg, Array], backend: Backend) -> Array:
    """A matrix in the subspaces of its modes."""
    if INPUT not in bases:
        return each.times(bases[OUTPUT])
    matrix = each.after(backend.permute(bases[INPUT], (1, 0)))
    return backend.matmul(matrix, bases[OUTPUT]) if OUTPUT in bases else matrix


def falls_apart(structure: Structure) -> bool:
    """Whether all factors have all experts, so that each is a problem by itself."""
    experts = set(_experts(structure))
    return all(experts <= set(factor.legs) for factor in structure.factors)


def core_counts(structure: Structure) -> dict[Leg, int]:
    """The most directions that a core has of each mode; modes that stay whole are left out."""
    sizes = structure.sizes
    return {
        leg: filled + _SPARE
        for leg in (INPUT, OUTPUT)
        if (filled := _filled(structure, leg)) is not None and filled + _SPARE < _WORTH * sizes[leg]
    }


def expand(core: Core, factors: Mapping[str, Array]) -> dict[str, Array]:
    """Factors of a core as factors of the tensor that it was made of."""
    backend = core.source.backend
    found = dict(factors)
    for factor in core.structure.factors:
        for leg, basis in core.bases.items():
            if leg in factor.legs:
                held = (leg,) if basis.ndim == 2 else (*_experts(core.structure), leg)
                axes = tuple(factor.legs.index(each) for each in held)
                found[factor.name] = along(basis, found[factor.name], axes, backend)
    return found


def _experts(structure: Structure) -> tuple[Leg, ...]:
    """The tensor's legs of experts."""
    return tuple(leg for leg in structure.open_legs if leg not in (INPUT, OUTPUT))


def _filled(structure: Structure, leg: Leg) -> int | None:
    """The largest dimension that a network can fill in a mode; None where nothing bounds it."""
    holders = [factor for factor in structure.factors if leg in factor.legs]
    if len(holders) != 1:
        return None
    sizes, apart = structure.sizes, falls_apart(structure)
    own = structure.open_legs if apart else (leg,)
    return prod(sizes[other] for other in holders[0].legs if other not in own)


def _needed(structure: Structure, leg: Leg) -> int:
    """Directions of a mode without which bonds of its factor would span nothing of their own."""
    sizes = structure.sizes
    (holder,) = (factor for factor in structure.factors if leg in factor.legs)
    bonds = [each for each in holder.legs if each not in structure.open_legs]
    # one of many factors, as in CP, needs no space of its own
    tied = [bond for bond in bonds if sum(bond in f.legs for f in structure.factors) == 2]
    filled = prod(sizes[other] for other in holder.legs if other != leg)
    return max((-(-(sizes[bond] ** 2) // filled) for bond in tied), default=0)


def _enough(squares: NDArray[Any], least: int, squared_norm: float) -> int:
    """Number of directions that a core keeps of those with given squares, which fall."""
    import numpy as np

    spare = _SPARED * max(squared_norm - float(squares.sum()), 0.0)
    # what is lost by keeping 0, 1, … directions
    lost = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return max(int(np.argmax(lost <= spare)), min(least, len(squares)))


def _operators(source: Source, leg: Leg, left: Array | None) -> Iterator[Operator]:
    """Matrices of all experts with a mode as rows, the input mode projected onto a basis first."""
    backend = source.backend
    for each in source.operators():
        if left is not None:
            each = Operator((each.after(backend.permute(left, (1, 0))),), backend)
        yield each.transposed if leg == OUTPUT else each


def _range(
    operators: Callable[[], Iterable[Operator]],
    like: Array,
    backend: Backend,
    count: int,
    rng: Generator,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Orthonormal columns that span the leading subspace of a mode, nearly, and their squares.

    Args:
        operators: the tensor's matrices with that mode as rows, read in each pass.
        like: an array of the library that they are of.
        backend: adapter of the library.
        count: how many columns.
        rng: NumPy's generator.

    Returns:
        The columns, the leading one first, and what the tensor has along each, a sum of squares.
    """
    import numpy as np

    sketch: Array = None
    for turn in range(PASSES):
        total: Array = None
        for matrix in operators():
            if turn:
                probe = matrix.transposed.times(sketch)
            else:
                drawn = rng.standard_normal((matrix.columns, count), dtype=np.float32)
                probe = from_host(drawn, like, backend)
            part = matrix.times(probe)
            total = part if total is None else total + part
        columns, rest = np.linalg.qr(to_host(total, backend))
        if turn == _POWERS:
            # the last product is that of an orthonormal sketch with the tensor's own Gram matrix
            vectors, squares, _ = np.linalg.svd(rest)
            columns = columns @ vectors
        else:
            sketch = from_host(columns, total, backend)
    return columns, squares
