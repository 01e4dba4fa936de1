"""Alternating least squares on any network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from tensormoe.backend import Array, Backend
from tensormoe.decomposition._contractions import (
    SOURCE,
    Structure,
    Update,
    plan_node,
    plan_update,
)
from tensormoe.decomposition._solve import from_host, inverse, to_host
from tensormoe.decomposition._source import Source, run
from tensormoe.factorizations import Leg
from tensormoe.planning import Program

if TYPE_CHECKING:
    from numpy.typing import NDArray

Factors = dict[str, Array]

# right-hand sides at a time: so many, or this part of a matrix of the equations; copies in float64
# stay small so
_COLUMNS, _PART = 32, 8
# and of few bonds, as many entries as a call of NumPy takes in the time that it starts in
_ENTRIES = 4096


def sweep(
    terms: Sequence[Structure],
    source: Source,
    squared_norm: float,
    found: Factors,
    workspace: int,
    damping: float = 0.0,
) -> tuple[Factors, float]:
    """Solve for every factor once, term by term, each for what the other terms leave of the tensor.

    Args:
        terms: the networks whose sum is to stand for the tensor.
        source: the tensor.
        squared_norm: of the tensor.
        found: factors by name, which new ones take the place of.
        workspace: entries that may be held beyond tensor and factors.
        damping: how far directions have to be seen to be followed, see :func:`inverse`.

    Returns:
        New factors, all of a term but the last of unit size, and their relative error up to
        rounding: 3e-4 in float32, and worthless where huge factors cancel one another.
    """
    explained, left = 0.0, source
    for term in terms:
        left = source.without([each for each in terms if each != term], found)
        explained = _sweep_term(term, left, found, workspace, damping)
        _balance(term, found, source.backend)
    norm = left.squared_norm() if len(terms) > 1 else squared_norm
    return found, sqrt(max(norm - explained, 0.0) / squared_norm)


def uses_tree(structure: Structure, workspace: int) -> bool:
    """Whether a node of a dimension tree is kept: the tensor contracted with the last factor."""
    *others, last = structure.wanted
    _, legs = plan_node(structure, last.name)
    # products may take it in another order of its legs, which is a copy
    return len(others) > 1 and 2 * prod(structure.sizes[leg] for leg in legs) <= workspace


def _sweep_term(
    structure: Structure, source: Source, found: Factors, workspace: int, damping: float
) -> float:
    """Solve for every factor of a term, the last one last, and say what the term explains then.

    Where the workspace is large enough, the tensor is contracted with the last factor once for all
    others, so that a sweep passes over it twice; else it passes once for each factor, a block at a
    time.
    """
    *others, last = (factor.name for factor in structure.wanted)
    if uses_tree(structure, workspace):
        node = source.contract(structure, lambda each: plan_node(each, last), found, at_once=True)
        for name in others:
            update = plan_update(structure, name, last)
            mttkrp = run(update.mttkrp, {**found, SOURCE: node}, source.backend)
            found[name], _ = _solved(update, mttkrp, found, source.backend, damping, False)
        del node
    else:
        for name in others:
            found[name], _ = solve_factor(structure, name, source, found, damping, False)
    found[last], explained = solve_factor(structure, last, source, found, damping)
    return explained


def solve_factor(
    structure: Structure,
    name: str,
    source: Source,
    factors: Mapping[str, Array],
    damping: float,
    explain: bool = True,
) -> tuple[Array, float]:
    """The best factor for given others, and the squared norm that the network then explains.

    Args:
        structure: the network.
        name: of the factor.
        source: the tensor.
        factors: all of them, by name.
        damping: see :func:`inverse`.
        explain: whether the squared norm is wanted, which takes another product; else it is 0.
    """

    def planned(each: Structure) -> tuple[Program, tuple[Leg, ...]]:
        update = plan_update(each, name)
        return update.mttkrp, update.legs

    mttkrp = source.contract(structure, planned, factors)
    return _solved(plan_update(structure, name), mttkrp, factors, source.backend, damping, explain)


def _solved(
    update: Update,
    mttkrp: Array,
    factors: Mapping[str, Array],
    backend: Backend,
    damping: float,
    explain: bool,
) -> tuple[Array, float]:
    """A better factor: from the one that is there, as far as the equations can be trusted."""
    import numpy as np

    grams, inverses = _equations(update, factors, backend, damping)
    old = to_host(factors[update.name], backend).transpose(_inverse(update.axes))
    # the solution takes the place of what it is made of
    whole = np.require(to_host(mttkrp, backend), requirements=["C", "W"])
    columns = (*whole.shape[: update.closed], -1)
    given, flat = old.reshape(columns), whole.reshape(columns)
    explained = 0.0
    for span in _spans(flat.shape, max(gram.size for gram in grams)):
        part, target = (each[..., span].astype("float64") for each in (given, flat))
        part += along_bonds(inverses, target - along_bonds(grams, part, update), update)
        if explain:
            # ‖T − N‖² = ‖T‖² − 2⟨M, X⟩ + ⟨X, G X⟩
            explained += float((part * (2.0 * target - along_bonds(grams, part, update))).sum())
        flat[..., span] = part
    del grams, inverses, given, old
    return from_host(whole.transpose(update.axes), mttkrp, backend), explained


def _equations(
    update: Update, factors: Mapping[str, Array], backend: Backend, damping: float
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """The parts of G and their inverses, in float64 on the host."""
    grams, inverses = [], []
    for square in squares(update, factors, backend):
        inverses.append(inverse(square, damping))
        grams.append(square.astype("float64"))
        del square
    return grams, inverses


def squares(
    update: Update, factors: Mapping[str, Array], backend: Backend
) -> Iterator[NDArray[Any]]:
    """The parts of G as matrices (shared…, bonds, bonds) on the host, one at a time."""
    for gram in update.grams:
        found = to_host(run(gram.program, factors, backend), backend)
        yield found.reshape(*found.shape[: update.shared], gram.size, gram.size)
        del found


def _spans(shape: tuple[int, ...], square: int) -> Iterator[slice]:
    """Right-hand sides that are solved for at a time, for the largest matrix of the equations."""
    rows = prod(shape[:-1])
    step = max(_COLUMNS, square // (_PART * rows), _ENTRIES // rows)
    return (slice(start, start + step) for start in range(0, shape[-1], step))


def along_bonds(
    matrices: Sequence[NDArray[Any]], array: NDArray[Any], update: Update
) -> NDArray[Any]:
    """Products with a matrix for each part of G along its bonds."""
    for matrix, gram in zip(matrices, update.grams, strict=True):
        size, count = gram.size, len(gram.bonds)
        shape = array.shape
        batch_shape = shape[: update.shared]
        before, after = shape[update.shared : gram.axis], shape[gram.axis + count :]
        columns = array.reshape(*batch_shape, prod(before), size, prod(after))
        array = (matrix[..., None, :, :] @ columns).reshape(shape)
    return array


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(index) for index in range(len(axes)))


def _balance(structure: Structure, found: Factors, backend: Backend) -> None:
    """The same network with factors of unit size, and all scale in the last one."""
    *others, last = (factor.name for factor in structure.wanted)
    scale = 1.0
    for name in others:
        size = float(backend.namespace.max(backend.namespace.abs(found[name])))
        if size > 0.0:
            found[name] = found[name] * (1.0 / size)
            scale *= size
    found[last] = found[last] * scale
