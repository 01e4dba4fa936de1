"""Starts by truncated singular value decompositions, for networks without cycles.

A factor with one bond spans a subspace of its modes, and the tensor's leading one is the best that
it can span by itself. Contracted with it, tensor and network are smaller, and the next factor with
one bond follows, until one is left, which is what remains of the tensor (Oseledets 2011 for tensor
trains, Grasedyck 2010 for trees, Vannieuwenhoven, Vandebril & Meerbergen 2012 for Tucker). If no
more than one factor had to be cut off, nothing is better (Eckart & Young 1936).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.backend import Array
from tensormoe.decomposition._contractions import Structure
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source, joined
from tensormoe.factorizations import Factor, Leg

if TYPE_CHECKING:
    from numpy.typing import NDArray

# a mode of no more than so many times the directions that are wanted, and one that is small
# anyway, is decomposed as a whole; others are compressed first
_RATIO, _SMALL = 4, 1024
# entries of a tensor that may be copied, whatever its own size
_COPIED = 2**22


@dataclass(frozen=True)
class Step:
    """A factor that is cut off the network.

    Args:
        name: of the factor.
        batch: its legs that all factors left share: the problem falls apart along them.
        own: its other legs that the tensor has.
        bonds: its legs that the tensor has from then on.
    """

    name: str
    batch: tuple[Leg, ...]
    own: tuple[Leg, ...]
    bonds: tuple[Leg, ...]

    def size(self, sizes: Mapping[Leg, int]) -> int:
        """Of the space that the factor spans a part of."""
        return prod(sizes[leg] for leg in self.own)


@dataclass(frozen=True)
class Cuts:
    """The order in which a network without cycles is decomposed.

    Args:
        steps: one after the other.
        last: the factor that is left.
        replaced: bonds that need not cut anything off, and the modes that take their places.
        plain: the factors at those bonds, which are identities.
        ones: factors that others can take up.
    """

    steps: tuple[Step, ...]
    last: str
    replaced: tuple[tuple[Leg, tuple[Leg, ...]], ...]
    plain: tuple[tuple[str, Leg], ...]
    ones: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the result is optimal."""
        return len(self.steps) <= 1

    def direct(self, structure: Structure, source: Source) -> bool:
        """Whether the optimum is computed from the tensor itself, without a core."""
        if not self.exact or not _readable(self, structure, source):
            return False
        sizes = structure.sizes
        return all(
            step.size(sizes) <= max(_SMALL, _RATIO * prod(sizes[leg] for leg in step.bonds))
            for step in self.steps
        )


@lru_cache(maxsize=256)
def cuts(structure: Structure) -> Cuts | None:
    """The order in which a network is decomposed; None where it can't be."""
    if structure.given:
        return None
    sizes, seen = structure.sizes, set(structure.open_legs)
    left = {
        factor.name: {leg for leg in factor.legs if leg in seen or sizes[leg] > 1}
        for factor in structure.factors
    }
    replaced: dict[Leg, tuple[Leg, ...]] = {}
    plain: list[tuple[str, Leg]] = []
    ones: list[str] = []
    while True:
        inside = next((k for k in left if any(left[k] <= left[n] for n in left if n != k)), None)
        if inside is not None:
            ones.append(inside)
            del left[inside]
            # bonds that led to it alone have one direction
            left = {
                k: {leg for leg in legs if leg in seen or _held(leg, left) > 1}
                for k, legs in left.items()
            }
            continue
        full = _full(left, structure)
        if full is None:
            break
        name, bond = full
        mine = left.pop(name)
        modes = tuple(leg for leg in structure.open_legs if leg in mine)
        plain.append((name, bond))
        replaced[bond] = modes
        left = {
            k: (legs - {bond}) | set(modes) if bond in legs else legs for k, legs in left.items()
        }
    steps = _steps(left, structure)
    if steps is None:
        return None
    (last,) = set(left) - {step.name for step in steps}
    return Cuts(steps, last, tuple(replaced.items()), tuple(plain), tuple(ones))


def _steps(given: Mapping[str, set[Leg]], structure: Structure) -> tuple[Step, ...] | None:
    """The cuts that leave one factor, the smallest first; None where there is a cycle."""
    left, seen, steps = dict(given), set(structure.open_legs), []
    while len(left) > 1:
        options = [step for name in left if (step := _step(name, left, seen)) is not None]
        if not options:
            return None
        step = min(options, key=lambda each: each.size(structure.sizes))
        steps.append(step)
        seen |= set(step.bonds)
        del left[step.name]
    return tuple(steps)


def _held(leg: Leg, left: Mapping[str, set[Leg]]) -> int:
    """Number of factors that have a leg."""
    return sum(leg in legs for legs in left.values())


def _full(left: Mapping[str, set[Leg]], structure: Structure) -> tuple[str, Leg] | None:
    """A factor and its only bond, which is as large as its modes together."""
    sizes = structure.sizes
    for name, legs in left.items():
        bonds = [leg for leg in legs if leg not in structure.open_legs]
        holders = [other for other in left if other != name and set(bonds) & left[other]]
        modes = prod(sizes[leg] for leg in legs - {*bonds})
        if len(bonds) == len(holders) == 1 and modes <= sizes[bonds[0]]:
            return name, bonds[0]
    return None


def _step(name: str, left: Mapping[str, set[Leg]], seen: set[Leg]) -> Step | None:
    """The cut at a factor, if it hangs on one other, and shares modes with all or none."""
    legs = left[name]
    others = [left[other] for other in left if other != name]
    bonds, modes = legs - seen, legs & seen
    batch = {leg for leg in modes if any(leg in each for each in others)}
    holders = [each for each in others if each & bonds]
    if modes == batch or len(holders) > 1 or not all(batch <= each for each in others):
        return None
    return Step(name, *(tuple(sorted(each)) for each in (batch, modes - batch, bonds)))


def spectral(structure: Structure, source: Source) -> dict[str, Array] | None:
    """Factors for a search to start from, all but one orthonormal; None where there are none.

    Args:
        structure: the network.
        source: the tensor, or its core.
    """
    plan = cuts(structure)
    if plan is None or not _readable(plan, structure, source):
        return None
    sizes, backend = structure.sizes, source.backend
    made: dict[str, tuple[Array, tuple[Leg, ...]]] = {}
    whole: Array = None
    legs: tuple[Leg, ...] = structure.open_legs
    for step in plan.steps:
        first, rest = legs[0], [leg for leg in legs if leg not in (*step.batch, *step.own)]
        # blocks are of the first leg
        batch = tuple(sorted(step.batch, key=lambda leg: leg != first))
        order = (*batch, *step.own, *rest)
        split = whole is None and first not in step.own
        axes = tuple(legs.index(leg) for leg in order)
        parts = _Parts(source, whole, split, axes, len(batch), len(step.own))
        inner = tuple(sizes[leg] for leg in step.bonds)
        basis = from_host(parts.leading(prod(inner)), source.like, backend)
        legs = (*batch, *step.bonds, *rest)
        axis = legs.index(first) if split else 0
        whole = joined(parts.projected(basis, inner), axis, sizes[legs[axis]], backend)
        stored = (*batch, *step.own, *step.bonds)
        made[step.name] = backend.reshape(basis, tuple(sizes[leg] for leg in stored)), stored
    if whole is None:
        whole = source.block(0, source.shape[0])
    made[plan.last] = whole, legs
    return {
        factor.name: _stored(factor, made.get(factor.name), plan, structure, source)
        for factor in structure.factors
    }


def closed(structure: Structure, source: Source) -> bool:
    """Whether :func:`spectral` finds factors that nothing is better than."""
    plan = cuts(structure)
    return plan is not None and plan.exact and _readable(plan, structure, source)


def _readable(plan: Cuts, structure: Structure, source: Source) -> bool:
    """Whether no large copy of the tensor is made."""
    if source.plain or prod(source.shape) <= _COPIED:
        return True
    return bool(plan.steps) and structure.open_legs[0] not in plan.steps[0].own


def _stored(
    factor: Factor,
    made: tuple[Array, tuple[Leg, ...]] | None,
    plan: Cuts,
    structure: Structure,
    source: Source,
) -> Array:
    """A factor in its own layout, with all of its bonds at their sizes."""
    import numpy as np

    sizes, backend, like = structure.sizes, source.backend, source.like
    shape, replaced = structure.shape(factor), dict(plan.replaced)
    if factor.name in plan.ones:
        return from_host(np.ones(shape), like, backend)
    if made is None:
        bond = dict(plan.plain)[factor.name]
        legs = (*replaced.pop(bond), bond)
        square = np.eye(prod(sizes[leg] for leg in legs[:-1]), sizes[bond])
        array = from_host(square.reshape([sizes[leg] for leg in legs]), like, backend)
    else:
        array, legs = made
    wanted = [inner for leg in factor.legs for inner in replaced.get(leg, (leg,)) if inner in legs]
    array = backend.permute(array, tuple(legs.index(leg) for leg in wanted))
    held = tuple(
        prod(sizes[inner] for inner in replaced.get(leg, (leg,)) if inner in legs)
        for leg in factor.legs
    )
    array = backend.reshape(array, held)
    if held == shape:
        return array
    # a bond may be larger than the number of its directions
    more = [(0, size - has) for size, has in zip(shape, held, strict=True)]
    return from_host(np.pad(to_host(array, backend), more), like, backend)


@dataclass(frozen=True, eq=False)
class _Parts:
    """A tensor in parts of its first leg, or as a whole.

    Args:
        source: the tensor, unless it is at hand.
        whole: the tensor, if it is.
        split: whether parts of the first leg will do.
        axes: of the batch, of what the factor has, and the others.
        batch: how many are of the batch.
        own: how many are the factor's.
    """

    source: Source
    whole: Array
    split: bool
    axes: tuple[int, ...]
    batch: int
    own: int

    @property
    def along(self) -> bool:
        """Whether parts are of the batch."""
        return self.split and self.batch > 0 and self.axes[0] == 0

    def arrays(self) -> Iterator[Array]:
        """The parts, with axes in order."""
        spans = self.source.blocks() if self.split else [(0, self.source.shape[0])]
        for start, stop in spans:
            part = self.source.block(start, stop) if self.whole is None else self.whole
            yield self.source.backend.permute(part, self.axes)

    def matrix(self, part: Array) -> Array:
        """A part as (batch, what the factor has, others)."""
        count, ends = prod(part.shape[: self.batch]), self.batch + self.own
        size = prod(part.shape[self.batch : ends])
        return self.source.backend.reshape(part, (count, size, prod(part.shape[ends:])))

    def leading(self, count: int) -> NDArray[Any]:
        """Leading orthonormal columns (batch, size, count), on the host."""
        import numpy as np

        backend = self.source.backend
        grams: list[NDArray[Any]] = []
        for part in self.arrays():
            matrix = self.matrix(part)
            gram = to_host(backend.matmul(matrix, backend.permute(matrix, (0, 2, 1))), backend)
            if grams and not self.along:
                grams[0] += gram
            else:
                grams.append(gram.astype(np.float64))
        _, vectors = np.linalg.eigh(np.concatenate(grams))
        found = vectors[..., ::-1][..., :count]
        return np.pad(found, ((0, 0), (0, 0), (0, count - found.shape[-1])))

    def projected(self, basis: Array, inner: tuple[int, ...]) -> Iterator[Array]:
        """The parts with axes ``inner`` in place of the factor's, which ``basis`` maps to them."""
        backend, start = self.source.backend, 0
        turned = backend.permute(basis, (0, 2, 1))
        for part in self.arrays():
            matrix, stop = self.matrix(part), start
            if self.along:
                stop += matrix.shape[0]
            mine = turned[start:stop] if self.along else turned
            shape = (*part.shape[: self.batch], *inner, *part.shape[self.batch + self.own :])
            yield backend.reshape(backend.matmul(mine, matrix), shape)
            start = stop
