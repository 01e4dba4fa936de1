"""Memory and time of a decomposition before it runs, from the programs that it will run.

A search holds the tensor, a share of it as workspace, its factors a few times over, and, for one
factor at a time, the equations. Everything else is of the size of one expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

from tensormoe._spec import LayerSpec
from tensormoe.decomposition._als import uses_tree
from tensormoe.decomposition._compress import PASSES, core_counts
from tensormoe.decomposition._contractions import (
    Structure,
    Update,
    plan_node,
    plan_update,
    plan_whole,
    structures,
)
from tensormoe.decomposition._controls import EXACT, TURNS, estimated
from tensormoe.decomposition._fit import WORKSPACE
from tensormoe.decomposition._runs import TRIAL
from tensormoe.decomposition._weighted import KEPT
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Leg
from tensormoe.planning import Cost, Program, Roofline, StepCost
from tensormoe.planning._cost import program_cost, program_peak

BASE_MEMORY = 144 * 2**20
"""Bytes of the interpreter, the libraries, and pieces of files."""

# a bound for what is held at once: copies of the factors, matrices of an expert, and float64
# matrices of each part of a factor's equations, or of the smaller side of an expert
_FACTORS, _MATRICES, _SQUARES = 9, 4, 6
# copies of a single factor, which nothing is searched for
_ALONE = 5
# float64 matrices of each side's size
_MOMENTS = 5
# and of each expert's inputs: moments, and roots
_APART = 2
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
        itemsize: bytes per entry in the working dtype.
        compare: whether truncated singular value decompositions are compared with.
    """
    matrix = itemsize * spec.in_features * spec.out_features
    factors = itemsize * spec.num_parameters
    search = max(_search_peak(term, itemsize) for term in _terms(spec))
    copies = _FACTORS if len(spec.shapes) > 1 else _ALONE
    search += copies * factors + _MATRICES * matrix
    spectra = factors + _spectra_peak(spec, matrix) if compare else 0
    return BASE_MEMORY + spec.num_experts * matrix + max(search, spectra)


def moments_needed(spec: LayerSpec, itemsize: int, apart: bool) -> int:
    """Bytes of weighted experts, second moments of both sides and their roots, at most.

    Args:
        spec: the layer.
        itemsize: bytes per entry in the working dtype.
        apart: whether every expert has moments of its own inputs.
    """
    rows, columns = spec.in_features, spec.out_features
    own = _APART * spec.num_experts * rows**2 if apart else 0
    # several networks need them twice, each expert by itself and all alike
    entries = spec.num_experts * rows * columns
    counts = (2 * entries, entries) if apart else (entries,)
    kept = next((count for count in counts if count <= KEPT), 0)
    return itemsize * kept + 8 * (_MOMENTS * (rows**2 + columns**2) + own + 3 * rows * columns)


def _spectra_peak(spec: LayerSpec, matrix: int) -> int:
    """Bytes of singular values: of experts, of all along their larger side, and of them as rows."""
    narrow, wide = sorted((spec.in_features, spec.out_features))
    wide = wide if wide <= EXACT else 0
    rows = min(spec.num_experts, EXACT)
    experts = _MATRICES * matrix + 8 * (_SQUARES * narrow**2 + wide**2)
    return max(experts, 8 * (2 * wide**2 + narrow**2), 8 * 3 * rows**2)


def _search_peak(structure: Structure, itemsize: int) -> int:
    """Bytes of a search beside its tensor, factors and matrices of experts."""
    if len(structure.factors) == 1:
        return 0
    sizes, core = structure.sizes, _core(structure)
    held = core.entries if core.sizes != sizes else 0
    updates = [plan_update(structure, each.name) for each in structure.wanted]
    programs = [gram.program for update in updates for gram in update.grams]
    # blocks of experts are as small as they get
    block = _resized(structure, {structure.open_legs[0]: 1})
    programs += [plan_update(block, each.name).mttkrp for each in structure.wanted]
    if uses_tree(structure, round(WORKSPACE * structure.entries)):
        *others, last = (each.name for each in structure.wanted)
        held = max(held, prod(sizes[leg] for leg in plan_node(structure, last)[1]))
        programs += [plan_update(structure, name, last).mttkrp for name in others]
    squares = max(
        _problems(structure, update) * sum(gram.size**2 for gram in update.grams)
        for update in updates
    )
    peak = max(program_peak(each, each.sizes, itemsize) for each in programs)
    return itemsize * held + _SQUARES * 8 * squares + peak


@lru_cache(maxsize=256)
def seconds_needed(
    candidates: tuple[LayerSpec, ...], itemsize: int, compare: bool, roofline: Roofline
) -> float:
    """About how long one group takes.

    Args:
        candidates: the layers whose ranks are tried; the first one's sizes stand for what is kept.
        itemsize: bytes per entry in the working dtype.
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
    return total + (time([_comparison(spec)]) if compare else 0.0)


def _comparison(spec: LayerSpec) -> StepCost:
    """Truncated singular value decompositions to compare with."""
    narrow, wide = sorted((spec.in_features, spec.out_features))
    flops = spec.num_experts * (2 * 2 * narrow**2 * wide + _EIGENVALUES * narrow**3)
    entries = spec.num_experts * narrow * wide
    if wide <= EXACT:
        flops += 2 * 2 * entries * wide + _EIGENVALUES * wide**3
    else:
        count = estimated(wide, spec.num_parameters // (spec.num_experts * narrow + wide))
        flops += 2 * 2 * TURNS * entries * count
    flops += 2 * 2 * entries * min(spec.num_experts, EXACT)
    return StepCost("compare", round(flops))


def _terms(spec: LayerSpec) -> tuple[Structure, ...]:
    network = spec.network
    return structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)


def _core(whole: Structure) -> Structure:
    """The network on the core that a tensor is compressed to first."""
    return _resized(whole, core_counts(whole) if len(whole.wanted) > 1 else {})


def _resized(structure: Structure, sizes: Mapping[Leg, int]) -> Structure:
    """The network with some legs of other sizes."""
    return replace(structure, size_items=tuple({**structure.sizes, **sizes}.items()))


def _problems(structure: Structure, update: Update) -> int:
    """Problems that the equations for a factor fall apart into, one per entry of shared legs."""
    sizes = structure.sizes
    return prod(sizes[leg] for leg in update.legs[: update.shared])


def _ranges(whole: Structure, core: Structure, itemsize: int) -> Iterator[StepCost]:
    """The passes over a tensor that compression takes."""
    sizes, small = whole.sizes, core.sizes
    for leg in (INPUT, OUTPUT):
        if small[leg] < sizes[leg]:
            # there and back in each pass
            flops = 2 * (2 * PASSES) * whole.entries * small[leg]
            yield StepCost("range", flops, bytes_read=itemsize * whole.entries)


def _sweep(structure: Structure, itemsize: int) -> Iterator[StepCost]:
    """Every factor solved for once."""
    if len(structure.factors) == 1:
        return
    *others, last = [factor.name for factor in structure.wanted]
    contracted = last if len(others) > 1 else None
    programs: list[Program] = [plan_update(structure, last).mttkrp]
    if contracted is not None:
        programs.append(plan_node(structure, last)[0])
    for name in others:
        programs.append(plan_update(structure, name, contracted).mttkrp)
    for factor in structure.wanted:
        update = plan_update(structure, factor.name)
        programs.extend(gram.program for gram in update.grams)
        yield from _solves(structure, factor, update)
    for program in programs:
        yield from program_cost(program, program.sizes, itemsize)


def _subtractions(terms: Sequence[Structure], itemsize: int) -> Iterator[StepCost]:
    """Residuals after the other terms: one for every factor of a term, and one for the error."""
    for term in terms:
        for other in (each for each in terms if each != term):
            program = plan_whole(other)
            for _ in range(len(term.wanted) + (term == terms[-1])):
                yield from program_cost(program, program.sizes, itemsize)
                yield StepCost("left", 0, term.entries, bytes_read=3 * itemsize * term.entries)


def _solves(structure: Structure, factor: Factor, update: Update) -> Iterator[StepCost]:
    """Inverses, and products with them and with what they are inverses of, in float64."""
    entries = prod(structure.shape(factor))
    count = _problems(structure, update)
    for gram in update.grams:
        flops = 2 * count * gram.size**3 + _PRODUCTS * 2 * entries * gram.size
        # at half the speed of float32
        yield StepCost("solve", 2 * flops)
