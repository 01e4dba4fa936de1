"""What a decomposition takes before it runs: memory at most, and seconds about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

from tensormoe._spec import LayerSpec
from tensormoe.decomposition._als import absorbs
from tensormoe.decomposition._compress import PASSES, core_counts
from tensormoe.decomposition._contractions import (
    Structure,
    Update,
    plan_partial,
    plan_update,
    plan_whole,
    structures,
)
from tensormoe.decomposition._controls import EXACT, TURNS, estimated
from tensormoe.decomposition._fit import ROOM
from tensormoe.decomposition._runs import TRIAL
from tensormoe.factorizations import INPUT, OUTPUT, Factor
from tensormoe.planning import Cost, Program, Roofline, StepCost
from tensormoe.planning._cost import program_cost, program_peak

__all__ = ["BASE_MEMORY", "memory_needed", "seconds_needed"]

BASE_MEMORY = 144 * 2**20
"""Bytes of the interpreter, the libraries, and pieces of files."""

# copies of all factors in a search (checked ones, the last, those before, those that are solved
# for), of the one that is solved for once its equations are, and of an orthonormal basis
_COPIES, _SOLVED, _BASIS = 4, 1, 6
# float64 matrices that an inverse takes, and those of eigenvalues
_INVERSE, _EIGEN = 4, 5
# matrices of an expert where errors are taken: given, found, their difference, and its squares
_MATRICES = 4
# matrices of an expert where another term is subtracted: given, built, and what is left
_LEFT = 3
# sweeps after which a search usually ends, and those on the tensor itself
_SWEEPS, _POLISH = 40, 5
# products with each part of the equations for one factor
_PRODUCTS = 3
# multiply-adds of all eigenvalues of a symmetric matrix, over its size's cube, as the machine's
# matrix products would do them: this work runs at a fifth of their speed, and in float64
_EIGENVALUES = 4 / 3 * 5 * 2


@lru_cache(maxsize=256)
def memory_needed(spec: LayerSpec, itemsize: int, compare: bool) -> int:
    """Bytes of a process that decomposes one group, at most.

    Args:
        spec: the layer of the group.
        itemsize: bytes of an entry in the working dtype.
        compare: whether truncated singular value decompositions are compared with.
    """
    matrix = itemsize * spec.in_features * spec.out_features
    tensor, factors = spec.num_experts * matrix, itemsize * spec.num_parameters
    terms = _terms(spec)
    # what a short search found is held during the long one
    search = max(_fit_peak(term, itemsize) for term in terms) + factors
    if len(terms) > 1:
        together = max(_search_peak(term, _room(term), itemsize) for term in terms)
        search = max(search, together) + _COPIES * factors + _LEFT * matrix
    errors = 2 * factors + _MATRICES * matrix
    comparison = factors + _comparison_peak(spec, matrix) if compare else 0
    return BASE_MEMORY + tensor + max(search, errors, comparison)


def _comparison_peak(spec: LayerSpec, matrix: int) -> int:
    """Bytes of truncated singular value decompositions beside the tensor.

    Args:
        spec: the layer.
        matrix: bytes of an expert's matrix.
    """
    narrow, wide = sorted((spec.in_features, spec.out_features))
    made = 4 * matrix + _EIGEN * 8 * narrow**2
    small = min(spec.num_experts, narrow * wide, EXACT)
    if wide <= EXACT:
        return max(made + 8 * wide**2, 8 * (2 * wide**2 + narrow**2), 8 * 3 * small**2)
    # values that are estimated, from bases of as many columns
    kept = _estimated(spec)
    return max(made, _BASIS * 4 * wide * kept + 2 * matrix)


def _estimated(spec: LayerSpec) -> int:
    """Singular values that are estimated."""
    narrow, wide = sorted((spec.in_features, spec.out_features))
    return estimated(wide, spec.num_parameters // (spec.num_experts * narrow + wide))


@lru_cache(maxsize=256)
def seconds_needed(
    candidates: tuple[LayerSpec, ...], itemsize: int, compare: bool, roofline: Roofline
) -> float:
    """About how long one group takes.

    Args:
        candidates: the layers whose ranks are tried; the first one's sizes stand for what is kept.
        itemsize: bytes of an entry in the working dtype.
        compare: whether truncated singular value decompositions are compared with.
        roofline: of the machine.
    """

    def time(steps: Iterable[StepCost]) -> float:
        return roofline.time(Cost(0, tuple(steps), 0))

    def search(spec: LayerSpec, sweeps: int) -> float:
        total = 0.0
        for whole in _terms(spec):
            core = _core(whole)
            total += time(_ranges(whole, core, itemsize)) + sweeps * time(_sweep(core, itemsize))
        return total

    spec, *others = candidates
    terms = _terms(spec)
    # sums have no core: what one term leaves of the tensor depends on all others
    polish = _POLISH if len(terms) == 1 else _SWEEPS
    total = search(spec, _SWEEPS) + polish * sum(time(_sweep(term, itemsize)) for term in terms)
    total += polish * time(_subtractions(terms, itemsize))
    total += sum(search(each, TRIAL.sweeps) for each in (candidates if others else ()))
    if compare:
        narrow, wide = sorted((spec.in_features, spec.out_features))
        flops = spec.num_experts * (2 * 2 * narrow**2 * wide + _EIGENVALUES * narrow**3)
        entries = spec.num_experts * narrow * wide
        if wide <= EXACT:
            flops += 2 * 2 * entries * wide + _EIGENVALUES * wide**3
        else:
            flops += 2 * 2 * TURNS * entries * _estimated(spec)
        flops += 2 * 2 * entries * min(spec.num_experts, EXACT)
        total += time([StepCost("compare", round(flops))])
    return total


def _terms(spec: LayerSpec) -> tuple[Structure, ...]:
    network = spec.network
    return structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)


def _room(structure: Structure) -> int:
    """Entries that a search on a whole tensor may hold beside it."""
    return round(ROOM * prod(structure.sizes[leg] for leg in structure.open_legs))


def _fit_peak(structure: Structure, itemsize: int) -> int:
    """Bytes beside the tensor: of compression, of a search on the core, or of one on the tensor."""
    copies = _COPIES * itemsize * _entries(structure)
    whole = copies + _search_peak(structure, _room(structure), itemsize)
    small = _core(structure)
    sizes, fewer = structure.sizes, small.sizes
    if fewer == sizes:
        return whole
    entries = prod(fewer[leg] for leg in structure.open_legs)
    bases = [itemsize * sizes[leg] * fewer[leg] for leg in (INPUT, OUTPUT)]
    made = _BASIS * max(bases) + 2 * itemsize * sizes[INPUT] * sizes[OUTPUT]
    held = itemsize * entries + sum(bases)
    search = _COPIES * itemsize * _entries(small)
    search += _search_peak(small, _room(structure) - entries, itemsize)
    return max(held + max(made, search), whole)


def _entries(structure: Structure) -> int:
    return sum(prod(structure.shape(factor)) for factor in structure.wanted)


def _search_peak(structure: Structure, room: int, itemsize: int) -> int:
    """Bytes of a sweep beside its tensor and factors."""
    if len(structure.factors) == 1:
        return 0
    *others, last = structure.wanted
    updates = max(_update_peak(structure, each.name, itemsize) for each in structure.wanted)
    if not absorbs(structure, room):
        return updates
    met = itemsize * prod(structure.sizes[leg] for leg in plan_partial(structure, last.name)[1])
    programs = [plan_update(structure, each.name, last.name).moment for each in others]
    return updates + met + max(program_peak(each, each.sizes, itemsize) for each in programs)


def _block(structure: Structure) -> Structure:
    """What is contracted at a time, where blocks of experts are as small as they get."""
    leg = structure.open_legs[0]
    return replace(
        structure,
        size_items=tuple((key, 1 if key == leg else size) for key, size in structure.size_items),
    )


def _update_peak(structure: Structure, name: str, itemsize: int) -> int:
    """Bytes of one factor's least-squares problem."""
    update, block = plan_update(structure, name), plan_update(_block(structure), name).moment
    moment = itemsize * prod(structure.shape(structure.factor(name)))
    grams = made = 0
    for gram in update.grams:
        shared = prod(structure.sizes[leg] for leg in update.legs[: update.shared])
        square = 8 * shared * prod(gram.bonds) ** 2
        made = max(
            made,
            grams
            + max(_INVERSE * square, program_peak(gram.program, gram.program.sizes, itemsize)),
        )
        grams += 2 * square
    return moment + max(program_peak(block, block.sizes, itemsize), made, grams + _SOLVED * moment)


def _core(whole: Structure) -> Structure:
    """The network on the core that a tensor is compressed to first."""
    sizes = whole.sizes | (core_counts(whole) if len(whole.wanted) > 1 else {})
    return replace(whole, size_items=tuple(sizes.items()))


def _ranges(whole: Structure, core: Structure, itemsize: int) -> Iterator[StepCost]:
    """The passes over a tensor that compression takes."""
    sizes, small = whole.sizes, core.sizes
    entries = prod(sizes[leg] for leg in whole.open_legs)
    for leg in (INPUT, OUTPUT):
        if small[leg] < sizes[leg]:
            # there and back in each pass
            flops = 2 * (2 * PASSES) * entries * small[leg]
            yield StepCost("range", flops, bytes_read=itemsize * entries)


def _sweep(structure: Structure, itemsize: int) -> Iterator[StepCost]:
    """Every factor solved for once."""
    if len(structure.factors) == 1:
        return
    *others, last = [factor.name for factor in structure.wanted]
    absorbed = last if len(others) > 1 else None
    programs: list[Program] = [plan_update(structure, last).moment]
    if absorbed is not None:
        programs.append(plan_partial(structure, last)[0])
    for name in others:
        programs.append(plan_update(structure, name, absorbed).moment)
    for factor in structure.wanted:
        update = plan_update(structure, factor.name)
        programs.extend(gram.program for gram in update.grams)
        yield from _solves(structure, factor, update)
    for program in programs:
        yield from program_cost(program, program.sizes, itemsize)


def _subtractions(terms: Sequence[Structure], itemsize: int) -> Iterator[StepCost]:
    """What the others leave, made anew for every factor of a term, and for the error."""
    for term in terms:
        entries = prod(term.sizes[leg] for leg in term.open_legs)
        for other in (each for each in terms if each != term):
            program = plan_whole(other)
            for _ in range(len(term.wanted) + (term == terms[-1])):
                yield from program_cost(program, program.sizes, itemsize)
                yield StepCost("left", 0, entries, bytes_read=3 * itemsize * entries)


def _solves(structure: Structure, factor: Factor, update: Update) -> Iterator[StepCost]:
    """Inverses, and products with them and with what they are inverses of, in float64."""
    entries = prod(structure.shape(factor))
    shared = prod(structure.sizes[leg] for leg in update.legs[: update.shared])
    for gram in update.grams:
        size = prod(gram.bonds)
        flops = 2 * shared * size**3 + _PRODUCTS * 2 * entries * size
        # at half the speed of float32
        yield StepCost("solve", 2 * flops)
