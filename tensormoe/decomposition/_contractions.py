"""The contractions of alternating least squares, planned once for a network.

For fixed other factors, the squared distance of a network to a tensor is quadratic in one factor.
Its minimum solves ``G X = M``: M is the tensor contracted with all other factors, and G is the
network of the other factors contracted with itself over the open legs. Both follow from the
network's legs, so one implementation serves every factorization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from tensormoe.factorizations import Factor, Leg, Network
from tensormoe.planning import Operand, Program, contraction
from tensormoe.planning._cost import program_cost
from tensormoe.planning._tree import Builder

SOURCE = "source"
"""Name of the operand that is not a factor: the tensor, or the tensor contracted with a factor."""


@dataclass(frozen=True)
class Structure:
    """A network that is not a sum, or a term of one, as decomposition sees it.

    Args:
        factors: the arrays that are multiplied.
        open_legs: the legs of the tensor, in its order.
        size_items: pairs (leg, size).
        given: factors that are not to be found. What is the same for all experts has no leg for
            them; a vector along that leg, of ones unless experts weigh differently, gives it one.
    """

    factors: tuple[Factor, ...]
    open_legs: tuple[Leg, ...]
    size_items: tuple[tuple[Leg, int], ...]
    given: tuple[Factor, ...] = ()

    @property
    def sizes(self) -> dict[Leg, int]:
        """The size of every leg."""
        return dict(self.size_items)

    @property
    def entries(self) -> int:
        """Entries of the tensor."""
        sizes = self.sizes
        return prod(sizes[leg] for leg in self.open_legs)

    @property
    def wanted(self) -> tuple[Factor, ...]:
        """The factors that are to be found."""
        return tuple(factor for factor in self.factors if factor not in self.given)

    def factor(self, name: str) -> Factor:
        """The factor of that name."""
        return next(factor for factor in self.factors if factor.name == name)

    def shape(self, factor: Factor) -> tuple[int, ...]:
        """The array shape of a factor."""
        sizes = self.sizes
        return tuple(sizes[leg] for leg in factor.legs)


def structures(
    network: Network, open_legs: tuple[Leg, ...], sizes: Mapping[Leg, int]
) -> tuple[Structure, ...]:
    """The terms of a network, mostly one.

    Args:
        network: its factors.
        open_legs: of the tensor, in its order.
        sizes: of all legs; those of the network, or of the tensor if it has one more row.
    """
    found = []
    for term in network.terms:
        given = tuple(Factor(f"every {leg}", (leg,)) for leg in open_legs if leg not in term.legs)
        items = tuple(sizes.items())
        found.append(Structure((*given, *term.factors), open_legs, items, given))
    return tuple(found)


@dataclass(frozen=True)
class Gram:
    """A part of G, which is the product of its parts over separate bonds.

    Args:
        program: with legs (bonds…, bonds′…), or (shared…, bonds…, bonds′…) for the only part.
        axis: first of the bonds' axes in M.
        bonds: their sizes.
    """

    program: Program
    axis: int
    bonds: tuple[int, ...]

    @property
    def size(self) -> int:
        """Rows of the part."""
        return prod(self.bonds)


@dataclass(frozen=True)
class Update:
    """The least-squares problem of one factor.

    Args:
        name: of the factor.
        mttkrp: program of M, the matricized tensor times Khatri–Rao product (MTTKRP) of the
            network, with legs (shared…, bonds…, free…).
        grams: the parts of G; the other factors that hang together over bonds make one.
        legs: M's.
        shared: how many open legs the factor has in common with others: the problem falls apart
            along them.
        closed: how many legs come before the free ones.
        axes: from M's order to the factor's own.
    """

    name: str
    mttkrp: Program
    grams: tuple[Gram, ...]
    legs: tuple[Leg, ...]
    shared: int
    closed: int
    axes: tuple[int, ...]


@lru_cache(maxsize=256)
def plan_node(structure: Structure, contracted: str) -> tuple[Program, tuple[Leg, ...]]:
    """The tensor contracted with one factor: the program, and the legs of its result.

    It is a node of the dimension tree (Phan, Tichavský & Cichocki 2013), from which the MTTKRPs of
    all other factors are made, so that the tensor itself is read once for them.
    """
    factor = structure.factor(contracted)
    elsewhere = {leg for each in structure.factors if each.name != contracted for leg in each.legs}
    kept = [leg for leg in structure.open_legs if leg not in factor.legs or leg in elsewhere]
    bonds = [leg for leg in factor.legs if leg not in structure.open_legs]
    # products over a bond of many factors are many small ones: it stands first, where they are fast
    many = [leg for leg in bonds if sum(leg in each.legs for each in structure.factors) > 2]
    legs = (*many, *kept, *(leg for leg in bonds if leg not in many))
    operands = (_operand(SOURCE, structure.open_legs), _operand(contracted, factor.legs))
    return contraction(operands, legs, structure.sizes), legs


@lru_cache(maxsize=256)
def plan_whole(structure: Structure) -> Program:
    """The program that builds the tensor of a network."""
    operands = tuple(_operand(each.name, each.legs) for each in structure.factors)
    return contraction(operands, structure.open_legs, structure.sizes)


@lru_cache(maxsize=256)
def plan_update(structure: Structure, name: str, contracted: str | None = None) -> Update:
    """The least-squares problem of factor ``name``.

    Args:
        structure: the network; it has other factors.
        name: the factor.
        contracted: a factor that the source was contracted with (:func:`plan_node`), if any.
    """
    sizes, factor = structure.sizes, structure.factor(name)
    others = [each for each in structure.factors if each.name != name]
    elsewhere = {leg for each in others for leg in each.legs}
    shared = tuple(leg for leg in factor.legs if leg in structure.open_legs and leg in elsewhere)
    groups = [others] if shared else _components(others)
    bonds = tuple(leg for group in groups for leg in _bonds(factor, group, structure))
    free = tuple(leg for leg in factor.legs if leg not in (*shared, *bonds))
    stored = (*shared, *bonds, *free)
    source = structure.open_legs if contracted is None else plan_node(structure, contracted)[1]
    rest = [each for each in others if each.name != contracted]
    mttkrp = _mttkrp_program(source, rest, stored, sizes)
    grams, axis = [], len(shared)
    for group in groups:
        inner = _bonds(factor, group, structure)
        program = _gram_program(group, shared, inner, structure)
        grams.append(Gram(program, axis, tuple(sizes[leg] for leg in inner)))
        axis += len(inner)
    axes = tuple(stored.index(leg) for leg in factor.legs)
    return Update(name, mttkrp, tuple(grams), stored, len(shared), axis, axes)


def _mttkrp_program(
    source: tuple[Leg, ...],
    others: Sequence[Factor],
    output: tuple[Leg, ...],
    sizes: Mapping[Leg, int],
) -> Program:
    """The source contracted with other factors, along the path of the fewest operations.

    Where it costs no more, the factors are contracted with one another first and then all at once
    with the source, in one large product.
    """
    operands = (_operand(SOURCE, source), *(_operand(each.name, each.legs) for each in others))
    usual = contraction(operands, output, sizes)
    if len(others) < 2:
        return usual
    builder = Builder(operands, sizes)
    theirs = {leg for each in others for leg in each.legs}
    common = [leg for leg in source if leg in theirs]
    legs = (*common, *(leg for leg in output if leg in theirs and leg not in common))
    joined = builder.network(range(1, len(operands)), legs)
    whole = builder.finish(builder.contract(0, joined, frozenset(output), output))
    work = [
        sum(c.matmul_flops + c.elementwise_flops for c in program_cost(p, sizes))
        for p in (whole, usual)
    ]
    return whole if work[0] <= work[1] else usual


def _gram_program(
    group: Sequence[Factor], shared: tuple[Leg, ...], bonds: tuple[Leg, ...], structure: Structure
) -> Program:
    """A group of factors contracted with itself over its open legs."""

    def primed(legs: Sequence[Leg]) -> tuple[Leg, ...]:
        return tuple(leg if leg in structure.open_legs else f"{leg}'" for leg in legs)

    return contraction(
        (
            *(_operand(each.name, each.legs) for each in group),
            *(_operand(each.name, primed(each.legs)) for each in group),
        ),
        (*shared, *bonds, *primed(bonds)),
        structure.sizes | {f"{leg}'": size for leg, size in structure.size_items},
    )


def _bonds(factor: Factor, group: Sequence[Factor], structure: Structure) -> tuple[Leg, ...]:
    """The closed legs that tie a factor to a group of others."""
    theirs = {leg for each in group for leg in each.legs}
    return tuple(leg for leg in factor.legs if leg in theirs and leg not in structure.open_legs)


def _components(factors: Sequence[Factor]) -> list[list[Factor]]:
    """Factors that hang together, in groups."""
    groups: list[list[Factor]] = []
    for factor in factors:
        tied = [g for g in groups if any(set(factor.legs) & set(each.legs) for each in g)]
        groups = [g for g in groups if g not in tied]
        groups.append([factor, *(each for g in tied for each in g)])
    return groups


def _operand(name: str, legs: Sequence[Leg]) -> Operand:
    return Operand(name, tuple(legs), "factor")
