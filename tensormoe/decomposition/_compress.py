"""A tensor to a small core: input and output modes onto the subspaces that a network can fill.

A factor with bonds of size r next to a mode of size I > r fills a subspace of dimension r at most.
The tensor's own leading subspace of that size is found by a randomized range finder with power
iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4); there the search for factors is the same
problem on a smaller tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.backend import Array
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Operator, Source, along, joined
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
        bases: orthonormal columns (size, smaller size) by leg.
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
    wide = replace(structure, size_items=tuple((sizes | counts).items()))
    held = sum(prod(wide.shape(factor)) for factor in structure.wanted)
    share = max(_SHARE, min(1.0, _COPIES * held / prod(source.shape)))
    bases: dict[Leg, Array] = {}
    for leg, count in counts.items():
        basis, squares = _range(source, leg, count, bases.get(INPUT), rng)
        least = max(round(share ** (1 / len(counts)) * sizes[leg]), _needed(structure, leg))
        bases[leg] = from_host(
            basis[:, : _enough(squares, least, squared_norm)], source.like, backend
        )
    small = tuple(
        (leg, bases[leg].shape[1] if leg in bases else size) for leg, size in structure.size_items
    )
    after = replace(structure, size_items=small)
    shape = tuple(after.sizes[leg] for leg in after.open_legs)

    def projected() -> Iterator[Array]:
        for each in source.operators():
            if INPUT in bases:
                matrix = each.after(backend.permute(bases[INPUT], (1, 0)))
                if OUTPUT in bases:
                    matrix = backend.matmul(matrix, bases[OUTPUT])
            else:
                matrix = each.times(bases[OUTPUT])
            yield matrix

    rows = joined(projected(), 0, prod(shape[:-1]), backend)
    return Core(after, Source(backend.reshape(rows, shape), backend), bases)


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
                axis = factor.legs.index(leg)
                found[factor.name] = along(basis, found[factor.name], axis, backend)
    return found


def _filled(structure: Structure, leg: Leg) -> int | None:
    """The largest dimension that a network can fill in a mode; None where nothing bounds it."""
    holders = [factor for factor in structure.factors if leg in factor.legs]
    if len(holders) != 1:
        return None
    sizes = structure.sizes
    return prod(sizes[other] for other in holders[0].legs if other != leg)


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


def _range(
    source: Source, leg: Leg, count: int, left: Array | None, rng: Generator
) -> tuple[Array, NDArray[Any]]:
    """Orthonormal columns that span the leading subspace of a mode, nearly, and their squares.

    Args:
        source: the tensor.
        leg: the mode, input or output.
        count: how many columns.
        left: a basis of the input mode that the tensor is projected onto first.
        rng: NumPy's generator.

    Returns:
        The columns, the leading one first, and what the tensor has along each, a sum of squares.
    """
    import numpy as np

    backend = source.backend
    other = source.shape[-1 if leg == INPUT else -2]
    if left is not None:
        other = left.shape[1]
    sketch: Array = None
    for turn in range(PASSES):
        total: Array = None
        for matrix in source.operators():
            if left is not None:
                matrix = Operator((matrix.after(backend.permute(left, (1, 0))),), backend)
            if leg == OUTPUT:
                matrix = matrix.transposed
            if turn:
                probe = matrix.transposed.times(sketch)
            else:
                drawn = rng.standard_normal((other, count), dtype=np.float32)
                probe = from_host(drawn, source.like, backend)
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
