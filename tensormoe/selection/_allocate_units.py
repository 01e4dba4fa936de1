"""Projections of a model as takers of one budget, and the ranks that their shares buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tensormoe._spec import LayerSpec
from tensormoe._validation import positive_ints
from tensormoe.errors import RankError, SpecError, TensormoeError, located
from tensormoe.factorizations import (
    Factorization,
    FactorizationLike,
    factorization_class,
    rank_pattern,
    resolve_factorization,
)
from tensormoe.gates import Gate
from tensormoe.planning._gate_cost import gate_parameters
from tensormoe.selection._allocate_solve import Bounds
from tensormoe.selection._select import select_rank
from tensormoe.selection._sites import LayerSite, Projection


@dataclass(frozen=True)
class Unit:
    """One projection of a layer, which gets a rank of its own.

    Args:
        name: in the model.
        projection: its sizes.
        experts: of the factors.
        before: entries that are there.
        gate: entries of a gate that comes with it.
        itemsize: bytes per entry.
    """

    name: str
    projection: Projection
    experts: tuple[int, ...]
    before: int
    gate: int
    itemsize: int

    def smallest(self, kind: type[Factorization]) -> int:
        """Entries with bonds of 1, the gate included."""
        return self.gate + _smallest(kind, *self._sizes).num_parameters

    def spec(self, kind: type[Factorization], entries: float) -> LayerSpec:
        """The layer with the most capacity within a number of entries, the gate included."""
        # a share that is an integer but for rounding is one
        return _within(kind, *self._sizes, int(entries + 1e-6) - self.gate)

    def entries(self, spec: LayerSpec) -> int:
        """Entries of a layer with the gate."""
        return self.gate + spec.num_parameters

    def bounds(self, kind: type[Factorization]) -> Bounds:
        """Least and most entries: factors are never more than what is there, if they can be."""
        least = self.smallest(kind)
        return Bounds(least, max(least, self.before if rank_pattern(kind) else least))

    @property
    def _sizes(self) -> tuple[int, int, tuple[int, ...], bool]:
        each = self.projection
        return each.in_features, each.out_features, self.experts, each.bias


def units_of(
    sites: Sequence[LayerSite], experts: int | tuple[int, ...], gate: Gate | None
) -> list[list[Unit]]:
    """The projections of each site."""
    levels = positive_ints(experts, "experts", "level")
    found = []
    for site in sites:
        made: list[Unit] = []
        counts = levels if site.experts is None else (site.experts,)
        for name, each in zip(site.unit_names, site.projections, strict=True):
            first = site.experts is None and not made
            counted = gate_parameters(gate, each.in_features, counts) if gate and first else 0
            before = (site.experts or 1) * each.entries
            made.append(Unit(name, each, counts, before, counted, site.itemsize))
        found.append(made)
    return found


def checked_kinds(
    factorization: FactorizationLike | Sequence[FactorizationLike],
) -> tuple[type[Factorization], ...]:
    """Classes of the factorizations that are asked for.

    Raises:
        RankError: one with a rank, which is what is to be found.
        SpecError: unknown names, or none.
    """
    listed: list[Any] = [factorization]
    if isinstance(factorization, tuple | list):
        listed = [*factorization]
    kinds = []
    for each in listed:
        if isinstance(each, Factorization):
            raise RankError(
                f"factorization must be without a rank, which the budget decides; got {each!r}. "
                f"Give its name, {each.name!r}."
            )
        kinds.append(factorization_class(each))
    if not kinds:
        raise SpecError("factorization must be at least one; got none. Give 'cp', for instance.")
    return tuple(dict.fromkeys(kinds))


@lru_cache(maxsize=4096)
def _smallest(
    kind: type[Factorization], rows: int, columns: int, experts: tuple[int, ...], bias: bool
) -> LayerSpec:
    pattern = rank_pattern(kind, len(experts))
    rank = (1,) * len(pattern) if pattern else None
    value = resolve_factorization(kind, rank[0] if rank and len(rank) == 1 else rank)
    return LayerSpec(rows, columns, experts, value, bias)


@lru_cache(maxsize=65536)
def _within(
    kind: type[Factorization],
    rows: int,
    columns: int,
    experts: tuple[int, ...],
    bias: bool,
    entries: int,
) -> LayerSpec:
    smallest = _smallest(kind, rows, columns, experts, bias)
    if smallest.num_parameters >= entries or not rank_pattern(kind, len(experts)):
        return smallest
    try:
        rank = select_rank(kind, rows, columns, experts, budget=entries, bias=bias, gate=None)
    except TensormoeError as error:
        raise located(error, f"{kind.name}, {rows} → {columns}") from None
    return LayerSpec(rows, columns, experts, resolve_factorization(kind, rank), bias)
