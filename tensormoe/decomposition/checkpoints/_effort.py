"""What a decomposition takes before it runs: memory at most, and seconds about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod

from tensormoe._spec import LayerSpec
from tensormoe.decomposition._contractions import Structure, Update, plan_partial, plan_update
from tensormoe.factorizations import INPUT, OUTPUT, Factor
from tensormoe.planning import Cost, Program, Roofline, StepCost
from tensormoe.planning._cost import program_cost, program_peak

__all__ = ["BASE_MEMORY", "memory_needed", "seconds_needed"]

BASE_MEMORY = 144 * 2**20
"""Bytes of the interpreter, the libraries, and pieces of files."""

# of the tensor, for what is made of it while factors are searched for
_ROOM = 0.4
# copies of all factors in a search, of the one that is solved for, and of an orthonormal basis
_COPIES, _SOLVED, _BASIS = 3, 4, 6
# float64 matrices that an inverse takes, and those of eigenvalues
_INVERSE, _EIGEN = 4, 5
# matrices of an expert where errors are taken: given, found, their difference, and its squares
_MATRICES = 4
# sweeps after which a search usually ends, and those on the tensor itself
_SWEEPS, _POLISH = 40, 2
# sweeps with which each of several ranks is tried
_TRIAL = 8
# directions of a core beyond those that a network can fill, and the share of a mode that is no core
_SPARE, _WORTH = 8, 0.8
# products with each part of the equations for one factor
_PRODUCTS = 3
# passes of a range finder over the tensor, for each of two modes
_PASSES = 2
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
    structure = _structure(spec)
    sizes, small = structure.sizes, _core(structure).sizes
    core = itemsize * prod(small[leg] for leg in structure.open_legs) if small != sizes else 0
    basis = itemsize * max(sizes[leg] * small[leg] for leg in (INPUT, OUTPUT)) if core else 0
    compression = core + _BASIS * basis + 2 * matrix
    updates = max(_update_peak(structure, each.name, itemsize) for each in structure.factors)
    search = max(round(_ROOM * tensor), core) + _COPIES * factors + updates
    errors = 2 * factors + _MATRICES * matrix
    narrow = min(spec.in_features, spec.out_features)
    comparison = factors + matrix + _EIGEN * 8 * narrow**2 if compare else 0
    return BASE_MEMORY + tensor + max(compression, search, errors, comparison)


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
        whole = _structure(spec)
        core = _core(whole)
        return time(_ranges(whole, core, itemsize)) + sweeps * time(_sweep(core, itemsize))

    spec, *others = candidates
    total = search(spec, _SWEEPS) + _POLISH * time(_sweep(_structure(spec), itemsize))
    total += sum(search(each, _TRIAL) for each in (candidates if others else ()))
    if compare:
        narrow, wide = sorted((spec.in_features, spec.out_features))
        flops = spec.num_experts * (2 * narrow**2 * wide + _EIGENVALUES * narrow**3)
        total += time([StepCost("compare", round(flops))])
    return total


def _structure(spec: LayerSpec) -> Structure:
    network = spec.network
    legs = (*network.expert_legs, INPUT, OUTPUT)
    return Structure(network.product, legs, tuple(network.sizes.items()))


def _block(structure: Structure) -> Structure:
    """What is contracted at a time, where blocks of experts are as small as they get."""
    leg = structure.open_legs[0]
    return replace(
        structure,
        size_items=tuple((key, 1 if key == leg else size) for key, size in structure.size_items),
    )


def _update_peak(structure: Structure, name: str, itemsize: int) -> int:
    """Bytes of one factor's least-squares problem."""
    if len(structure.factors) == 1:
        return 0
    update, block = plan_update(structure, name), plan_update(_block(structure), name).moment
    moment = itemsize * prod(structure.shape(structure.factor(name)))
    grams = 0
    for gram in update.grams:
        shared = prod(structure.sizes[leg] for leg in update.legs[: update.shared])
        grams += _INVERSE * 8 * shared * prod(gram.bonds) ** 2
        grams = max(grams, program_peak(gram.program, gram.program.sizes, itemsize))
    return _SOLVED * moment + max(
        program_peak(block, block.sizes, itemsize), grams, _absorbed_peak(structure, name, itemsize)
    )


def _absorbed_peak(structure: Structure, name: str, itemsize: int) -> int:
    """Bytes of contracting what is left of the whole tensor by the last factor, if it is held."""
    last, sizes = structure.factors[-1].name, structure.sizes
    if name == last or len(structure.factors) == 2:
        return 0
    _, legs = plan_partial(structure, last)
    if prod(sizes[leg] for leg in legs) > _ROOM * prod(sizes[leg] for leg in structure.open_legs):
        return 0
    program = plan_update(structure, name, last).moment
    return program_peak(program, program.sizes, itemsize)


def _core(whole: Structure) -> Structure:
    """The network on the core that a tensor is compressed to first."""
    sizes = whole.sizes
    for leg in (INPUT, OUTPUT):
        holders = [factor for factor in whole.factors if leg in factor.legs]
        filled = prod(whole.sizes[other] for other in holders[0].legs if other != leg) + _SPARE
        if len(holders) == 1 and len(whole.factors) > 1 and filled < _WORTH * sizes[leg]:
            sizes[leg] = filled
    return replace(whole, size_items=tuple(sizes.items()))


def _ranges(whole: Structure, core: Structure, itemsize: int) -> Iterator[StepCost]:
    """The passes over a tensor that compression takes."""
    sizes, small = whole.sizes, core.sizes
    entries = prod(sizes[leg] for leg in whole.open_legs)
    for leg in (INPUT, OUTPUT):
        if small[leg] < sizes[leg]:
            # there and back in each pass
            flops = 2 * (2 * _PASSES) * entries * small[leg]
            yield StepCost("range", flops, bytes_read=itemsize * entries)


def _sweep(structure: Structure, itemsize: int) -> Iterator[StepCost]:
    """Every factor solved for once."""
    *others, last = [factor.name for factor in structure.factors]
    if not others:
        return
    absorbed = last if len(others) > 1 else None
    programs: list[Program] = [plan_update(structure, last).moment]
    if absorbed is not None:
        programs.append(plan_partial(structure, last)[0])
    for name in others:
        programs.append(plan_update(structure, name, absorbed).moment)
    for factor in structure.factors:
        update = plan_update(structure, factor.name)
        programs.extend(gram.program for gram in update.grams)
        yield from _solves(structure, factor, update)
    for program in programs:
        yield from program_cost(program, program.sizes, itemsize)


def _solves(structure: Structure, factor: Factor, update: Update) -> Iterator[StepCost]:
    """Inverses, and products with them and with what they are inverses of, in float64."""
    entries = prod(structure.shape(factor))
    shared = prod(structure.sizes[leg] for leg in update.legs[: update.shared])
    for gram in update.grams:
        size = prod(gram.bonds)
        flops = 2 * shared * size**3 + _PRODUCTS * 2 * entries * size
        # at half the speed of float32
        yield StepCost("solve", 2 * flops)
