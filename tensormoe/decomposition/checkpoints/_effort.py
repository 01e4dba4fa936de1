"""What a decomposition takes before it runs: memory at most, and seconds about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod

from tensormoe._spec import LayerSpec
from tensormoe.decomposition._contractions import Structure, plan_partial, plan_update
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.planning import Cost, Program, Roofline, StepCost
from tensormoe.planning._cost import program_cost, program_peak

__all__ = ["BASE_MEMORY", "memory_needed", "seconds_needed"]

BASE_MEMORY = 160 * 2**20
"""Bytes of the interpreter, the libraries, and pieces of files."""

# of the tensor, for its core and what is made of that
_ROOM = 0.5
# copies of the factors in a search: old, new, best, taken ahead, and what they are rounded to
_COPIES = 6
# float64 matrices that an inverse takes, and those of eigenvalues
_INVERSE, _EIGEN = 6, 5
# matrices of an expert where errors are taken: given, found, their difference, and its squares
_MATRICES = 4
# sweeps after which a search usually ends, and those on the tensor itself
_SWEEPS, _POLISH = 40, 2
# sweeps with which each of several ranks is tried
_TRIAL = 8
# directions of a core beyond those that a network can fill, and the share of a mode that is no core
_SPARE, _WORTH = 8, 0.8
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
    updates = max(_update_peak(structure, each.name, itemsize) for each in structure.factors)
    search = round(_ROOM * tensor) + updates
    errors = _MATRICES * matrix
    narrow = min(spec.in_features, spec.out_features)
    comparison = matrix + _EIGEN * 8 * narrow**2 if compare else 0
    return BASE_MEMORY + tensor + _COPIES * factors + max(search, errors, comparison)


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
    spec, *others = candidates
    steps = [*_search(spec, _SWEEPS, itemsize), *_sweeps(_structure(spec), _POLISH, itemsize)]
    for each in candidates if others else ():
        steps += _search(each, _TRIAL, itemsize)
    if compare:
        narrow, wide = sorted((spec.in_features, spec.out_features))
        flops = spec.num_experts * (2 * narrow**2 * wide + _EIGENVALUES * narrow**3)
        steps.append(StepCost("compare", round(flops)))
    return roofline.time(Cost(0, tuple(steps), 0))


def _structure(spec: LayerSpec) -> Structure:
    network = spec.network
    legs = (*network.expert_legs, INPUT, OUTPUT)
    return Structure(network.factors, legs, tuple(network.sizes.items()))


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
    most = 0
    for gram in update.grams:
        shared = prod(structure.sizes[leg] for leg in update.legs[: update.shared])
        size = shared * prod(gram.bonds) ** 2
        most = max(most, program_peak(gram.program, gram.program.sizes, itemsize) + 8 * size)
        most += (_INVERSE - 1) * 8 * size
    return 2 * moment + max(program_peak(block, block.sizes, itemsize), most)


def _search(spec: LayerSpec, sweeps: int, itemsize: int) -> Iterator[StepCost]:
    """Compression to a core, and sweeps on it."""
    whole = _structure(spec)
    if len(whole.factors) == 1:
        return
    sizes = whole.sizes
    for leg in (INPUT, OUTPUT):
        holders = [factor for factor in whole.factors if leg in factor.legs]
        filled = prod(whole.sizes[other] for other in holders[0].legs if other != leg) + _SPARE
        if len(holders) == 1 and filled < _WORTH * sizes[leg]:
            entries = prod(sizes[each] for each in whole.open_legs)
            # there and back in each pass, and onto the basis once
            yield StepCost("range", 2 * (2 * _PASSES) * entries * filled, 0, itemsize * entries)
            sizes[leg] = filled
    yield from _sweeps(replace(whole, size_items=tuple(sizes.items())), sweeps, itemsize)


def _sweeps(structure: Structure, count: int, itemsize: int) -> Iterator[StepCost]:
    *others, last = [factor.name for factor in structure.factors]
    if not others:
        return
    programs: list[Program] = [plan_update(structure, last).moment]
    if len(others) > 1:
        programs.append(plan_partial(structure, last)[0])
    absorbed = last if len(others) > 1 else None
    for name in others:
        programs.append(plan_update(structure, name, absorbed).moment)
    for factor in structure.factors:
        programs.extend(gram.program for gram in plan_update(structure, factor.name).grams)
    for program in programs:
        for step in program_cost(program, program.sizes, itemsize):
            yield StepCost(
                step.label,
                count * step.matmul_flops,
                count * step.elementwise_flops,
                count * step.bytes_read,
                count * step.bytes_written,
            )
